"""Held-out accuracy of a run: prompts come in, each gets k responses, sums leave.

The actors that host engines call it before, during and after training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dapo_async.rollout.engine import Engine, GroupRequest, SamplingParams
from dapo_async.types import Completion, FinishReason, Prompt


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Sums over prompts; the parts of several engines can be added."""

    num_prompts: int
    num_correct: float  # sum of the prompts' accuracies, each the mean of its judged responses
    num_response_tokens: int
    num_truncated: int
    weight_versions: frozenset[int]  # exactly one when all responses are of one model
    # By the row of each judged prompt; parts have different rows.
    accuracies: Mapping[int, float] = field(default_factory=dict)
    num_unjudged: int = 0  # prompts without any verdict: neither right nor wrong
    num_samples: int = 1  # responses per prompt, the k of avg@k

    def __add__(self, other: Evaluation) -> Evaluation:
        assert self.num_samples == other.num_samples, "parts of two different evaluations"
        return Evaluation(
            self.num_prompts + other.num_prompts,
            self.num_correct + other.num_correct,
            self.num_response_tokens + other.num_response_tokens,
            self.num_truncated + other.num_truncated,
            self.weight_versions | other.weight_versions,
            {**self.accuracies, **other.accuracies},
            self.num_unjudged + other.num_unjudged,
            self.num_samples,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"weight_versions": sorted(self.weight_versions)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`, also after a JSON file, where rows become text."""
        accuracies = {int(row): accuracy for row, accuracy in values["accuracies"].items()}
        versions = frozenset(values["weight_versions"])
        return cls(**{**values, "weight_versions": versions, "accuracies": accuracies})

    @property
    def accuracy(self) -> float:
        """avg@k: mean accuracy of the judged prompts; 0 when there is none."""
        return self.num_correct / max(1, self.num_prompts - self.num_unjudged)

    @property
    def mean_response_tokens(self) -> float:
        return self.num_response_tokens / self.num_responses

    @property
    def truncated(self) -> float:
        """Share of the responses that were cut at their largest length."""
        return self.num_truncated / self.num_responses

    @property
    def num_responses(self) -> int:
        return self.num_prompts * self.num_samples


async def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    judge: Callable[[Prompt, Completion], float | None],
    num_samples: int,
    sampling: SamplingParams,
) -> Evaluation:
    """`num_samples` responses per prompt.

    `judge` returns the accuracy of a response, or None for a failed verdict; it is called in a
    thread. The noise of a response is keyed by (seed, row, sibling, token), so it does not depend
    on how the prompts are shared among engines. When one request fails, the others are cancelled
    and its error is raised.
    """
    # Negative ids never meet the id of a training group.
    requests = [
        GroupRequest(-1 - prompt.row, prompt.token_ids, num_samples, sampling) for prompt in prompts
    ]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(engine.generate(request)) for request in requests]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    answered = [task.result() for task in tasks]
    verdicts = await asyncio.to_thread(
        lambda: [
            [judge(prompt, completion) for completion in completions]
            for prompt, completions in zip(prompts, answered, strict=True)
        ]
    )
    accuracies = {
        prompt.row: sum(known) / len(known)
        for prompt, each in zip(prompts, verdicts, strict=True)
        if (known := [accuracy for accuracy in each if accuracy is not None])
    }
    completions = [completion for siblings in answered for completion in siblings]
    return Evaluation(
        num_prompts=len(prompts),
        num_correct=sum(accuracies.values()),
        num_unjudged=len(prompts) - len(accuracies),
        num_response_tokens=sum(len(completion.token_ids) for completion in completions),
        num_truncated=sum(
            completion.finish_reason is FinishReason.LENGTH for completion in completions
        ),
        weight_versions=frozenset(
            int(version)
            for completion in completions
            for version in set(completion.weight_versions.tolist())
        ),
        accuracies=accuracies,
        num_samples=num_samples,
    )
