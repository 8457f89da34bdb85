"""The values that packages exchange: prompts, admissions, completions, groups, batches, metrics.

Every package may import this module; it imports neither torch nor ray. Arrays are numpy, because
they are passed between processes by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem as the engine sees it."""

    row: int  # index in its data set
    text: str  # after the template
    token_ids: NDArray[np.int32]  # [P]
    answer: str  # gold answer, for the verifier
    source: str = ""  # data_source of its record in the data set; may select the verifier


@dataclass(frozen=True, slots=True)
class Admission:
    """One credit spent: the right to generate one group of `group_size` rollouts."""

    group_id: int  # 0, 1, 2, … in the order of first admission
    prompt: Prompt
    group_size: int
    # Per sibling what another engine returned, to be continued; None or empty: nothing.
    partial_completions: tuple[Completion | None, ...] = ()


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token, which is the last of token_ids
    LENGTH = "length"  # max_response_tokens reached: truncated
    ABORT = "abort"  # taken off the engine before its end


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one sibling; one entry per response token in each array."""

    token_ids: NDArray[np.int32]  # [T]
    # [T] log-softmax(logits / temperature) over the full vocabulary
    behaviour_logprobs: NDArray[np.float32]
    weight_versions: NDArray[np.int32]  # [T] version whose logits each token was sampled from
    prefill_version: int  # oldest version of the KV entries that the first token attended to
    finish_reason: FinishReason
    # Of a model with experts in M layers, for routing replay; None: the engine did not return them.
    # [T, M, k] uint8 or uint16: the experts of the token before each response token, in the pass
    # whose logits the response token was sampled from.
    experts: NDArray[np.unsignedinteger[Any]] | None = None
    # [P - 1, M, k] of the prompt without its last token. Siblings share those of the first one.
    prompt_experts: NDArray[np.unsignedinteger[Any]] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself; else another engine may continue it."""
        return self.finish_reason is not FinishReason.ABORT

    @property
    def oldest_version(self) -> int:
        """The oldest weight version of its tokens and its prefill."""
        return int(self.weight_versions.min(initial=self.prefill_version))


def expert_dtype(num_experts: int) -> type[np.unsignedinteger[Any]]:
    """The smallest dtype for the number of an expert."""
    return np.uint8 if num_experts <= 256 else np.uint16


@dataclass(frozen=True, slots=True)
class Rollout:
    """A scored completion."""

    completion: Completion
    text: str  # decoded response, special tokens skipped
    accuracy: float  # raw verdict in [0, 1]: what dynamic sampling filters on
    reward: float  # shaped reward: what advantages use
    extracted: str | None  # the answer that the verifier read; None: no answer found
    reason: str = ""  # of the verdict: one word, by which verdicts are counted

    @property
    def num_tokens(self) -> int:
        return len(self.completion.token_ids)

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason is FinishReason.LENGTH

    @property
    def oldest_version(self) -> int:
        """The oldest weight version of its tokens and its prefill."""
        return self.completion.oldest_version


@dataclass(frozen=True, slots=True)
class Group:
    """The G siblings of one prompt: the unit of admission, filtering, credit and advantage."""

    group_id: int
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    incarnation: str  # the run's incarnation whose weights generated it; others are refused
    temperature: float  # behaviour logprobs are those of logits / temperature
    num_failed: int = 0  # responses without a verdict; they are left out

    @property
    def oldest_version(self) -> int:
        return min(rollout.oldest_version for rollout in self.rollouts)

    @property
    def weight_versions(self) -> frozenset[int]:
        """All versions that sampled one of its tokens."""
        return frozenset(
            int(version)
            for rollout in self.rollouts
            for version in np.unique(rollout.completion.weight_versions)
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens that the learner has to process."""
        return sum(len(self.prompt.token_ids) + rollout.num_tokens for rollout in self.rollouts)

    @property
    def num_response_tokens(self) -> int:
        return sum(rollout.num_tokens for rollout in self.rollouts)

    @property
    def accuracies(self) -> tuple[float, ...]:
        return tuple(rollout.accuracy for rollout in self.rollouts)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Of the verdicts, one per rollout."""
        return tuple(rollout.reason for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What the replay actor reads of a group: mostly `Group`'s properties of the same names."""

    group_id: int
    incarnation: str
    oldest_version: int
    num_versions: int  # how many versions sampled one of its tokens
    prompt_tokens: int
    response_tokens: tuple[int, ...]  # per rollout, like the rest
    rewards: tuple[float, ...]
    accuracies: tuple[float, ...]
    reasons: tuple[str, ...]
    num_failed: int = 0

    @property
    def num_response_tokens(self) -> int:
        return sum(self.response_tokens)

    @classmethod
    def of(cls, group: Group) -> Self:
        completions = [rollout.completion for rollout in group.rollouts]
        versions = np.concatenate([each.weight_versions for each in completions])
        prefilled = min(each.prefill_version for each in completions)
        oldest = int(versions.min(initial=prefilled))
        return cls(
            group.group_id,
            group.incarnation,
            oldest,
            int(np.count_nonzero(np.bincount(versions - oldest))),
            len(group.prompt.token_ids),
            tuple(len(each.token_ids) for each in completions),
            tuple(rollout.reward for rollout in group.rollouts),
            group.accuracies,
            group.reasons,
            group.num_failed,
        )


class RejectReason(StrEnum):
    """Why a filter rejected a group; the summary counts each."""

    ALL_CORRECT = "all_correct"
    ALL_WRONG = "all_wrong"
    ALL_EQUAL = "all_equal"  # equal accuracies that are neither 0 nor 1
    FILTERED = "filtered"  # by the user's own filter (replay.filter)
    TOO_FEW_TOKENS = "too_few_tokens"  # no response token to train on


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The groups of one minibatch as ids, counts and references, without their tokens.

    A step with one minibatch is one batch.
    """

    learner_version: int  # the learner's weight version when the batch was taken
    group_ids: tuple[int, ...]
    oldest_versions: tuple[int, ...]  # per group
    # What the learner ranks fetch. From the buffer: the payload of each group. From the replay
    # actor: one Ray object per data-parallel rank, with its share of the plan and its rollouts.
    references: tuple[Any, ...]
    evicted: tuple[int, ...] = ()  # since the take before; their generation is to be aborted
    closes_step: bool = True  # False: more minibatches of this step follow
    process: int = 0  # replay actors before the one that owns the objects
    num_halvings: int = 0  # of every pass, because a learner rank has lacked memory before


class MemoryShort(RuntimeError):
    """A learner rank lacks memory for a pass that the other ranks are in; halves of it may fit."""


class StateUnusable(ValueError):
    """A learner rank can't load its part of a checkpoint; the message names the file."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Diagnostics of one step, added up over microbatches and ranks and divided once.

    `sums[name]` is (sum, count) and is reported as the mean; `maxima[name]` is a maximum;
    `totals[name]` adds up and is reported as it is.
    """

    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    maxima: Mapping[str, float] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: StepMetrics) -> StepMetrics:
        sums, maxima, totals = dict(self.sums), dict(self.maxima), dict(self.totals)
        for name, (total, count) in other.sums.items():
            total_before, count_before = sums.get(name, (0.0, 0.0))
            sums[name] = (total_before + total, count_before + count)
        for name, value in other.maxima.items():
            # np.maximum keeps a nan on either side; max() would depend on the order.
            maxima[name] = float(np.maximum(maxima.get(name, value), value))
        for name, value in other.totals.items():
            totals[name] = totals.get(name, 0.0) + value
        return StepMetrics(sums, maxima, totals)

    def flat(self) -> dict[str, float]:
        """One number per name; means with count 0 are left out."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return {**means, **self.maxima, **self.totals}
