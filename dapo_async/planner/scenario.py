"""What a simulated run has: both sides, the workload, the rules, and what goes wrong.

All times are seconds. `simulator.py` plays a `Scenario`; `settings.py` reads one from a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dapo_async.planner.engine import EngineSpeed
from dapo_async.planner.lengths import MOST_TAIL, Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpeed:
    """How long the learner needs for a minibatch: fixed_s + token_s · tokens."""

    token_s: float  # per token of prompt and response
    fixed_s: float = 0.0  # per minibatch
    group_s: float = 0.0  # per group
    jitter: float = 0.0  # a minibatch takes up to this share longer or shorter

    def minibatch_s(self, *, tokens: float, groups: int) -> float:
        return self.fixed_s + self.token_s * tokens + self.group_s * groups


@dataclass(frozen=True, slots=True)
class Outage:
    """An engine is lost. Its groups continue on other engines."""

    engine: int
    at_s: float
    back_s: float  # the engine serves the newest weights again


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run. Equal scenarios give equal results."""

    num_engines: int
    engine: EngineSpeed
    learner: LearnerSpeed
    lengths: Lengths = field(default_factory=Lengths)
    prompt_tokens: int = 0
    group_size: int = 16
    groups_per_step: int = 512
    num_minibatches: int = 1
    max_staleness: int = 1
    num_steps: int = 40
    warm_up_steps: int = 10  # not measured
    # Share of the groups that filters keep, at the first and at the last step; linear in between.
    acceptance: tuple[float, float] = (1.0, 1.0)
    admission: Literal["paced", "eager"] = "paced"
    weight_update: Literal["recompute", "keep_kv", "drain"] = "recompute"
    publish_s: float = 0.0  # from the end of a step until every engine serves the new weights
    pause_s: float = 0.0  # of these: an engine decodes nothing
    # The control plane, while the learner trains nothing.
    fetch_s: float = 0.0  # per minibatch, from a finished batch to its training
    snapshot_s: float = 0.0  # per step: weights are copied for the publish
    checkpoint_s: float = 0.0  # the learner waits
    checkpoint_every_steps: int = 0  # 0: none
    evaluation_s: float = 0.0  # the engines decode evaluations only
    evaluation_every_steps: int = 0  # 0: none
    outages: tuple[Outage, ...] = ()
    # Groups that may be out or in training, in steps. Other systems bound them so: by a fraction
    # of a staleness bound, or by C sequences in flight and a queue of q steps. None: all credits.
    credit_steps: float | None = None
    # The engines wait while the learner trains, because both use the same GPUs.
    colocated: bool = False
    # Both sides share the cores of a machine: a decode step, and training, take so many times as
    # long while the other side works. 1: each side has its own GPUs.
    engine_slowdown: float = 1.0
    learner_slowdown: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_slots(self) -> int:
        """Of all engines."""
        return self.num_engines * self.engine.num_slots

    @property
    def mean_tokens(self) -> float:
        """Of a response, halfway through the run."""
        lengths = self.lengths
        return min(lengths.max_tokens, lengths.mean_tokens * (1 + lengths.drift) / 2)

    @property
    def tokens_per_group(self) -> float:
        """Prompt and response tokens of a group, halfway through the run."""
        return self.group_size * (self.prompt_tokens + self.mean_tokens)

    @property
    def control_s(self) -> float:
        """Of a step: the learner waits for the control plane."""
        return self.num_minibatches * self.fetch_s + self.snapshot_s

    @property
    def train_s(self) -> float:
        """Of a step without any wait, halfway through the run."""
        tokens = self.groups_per_step * self.tokens_per_group
        fixed_s = self.num_minibatches * self.learner.fixed_s
        groups_s = self.groups_per_step * self.learner.group_s
        return fixed_s + groups_s + tokens * self.learner.token_s


def _check(scenario: Scenario) -> None:
    """Raises ValueError, one line, for what can't be played."""
    for name in ("num_engines", "group_size", "groups_per_step", "num_minibatches", "num_steps"):
        if getattr(scenario, name) < 1:
            raise ValueError(f"{name} ({getattr(scenario, name)}) must be at least 1; raise it")
    if scenario.groups_per_step % scenario.num_minibatches:
        raise ValueError(
            f"groups_per_step ({scenario.groups_per_step}) must be a multiple of num_minibatches "
            f"({scenario.num_minibatches}); change one of them"
        )
    if scenario.engine.num_slots < 1:
        raise ValueError("an engine has no slots; give it at least one")
    if not 0 < min(scenario.acceptance) <= max(scenario.acceptance) <= 1:
        raise ValueError(
            f"acceptance ({scenario.acceptance}) must be above 0 and at most 1; a run without "
            "accepted groups trains nothing"
        )
    lengths = scenario.lengths
    if not 1 <= lengths.mean_tokens <= lengths.max_tokens:
        raise ValueError(
            f"lengths: the mean ({lengths.mean_tokens:g}) must be between 1 and the longest "
            f"response ({lengths.max_tokens}); change one of them"
        )
    if not (0 <= lengths.shared <= 1 and 0 <= lengths.tail <= MOST_TAIL and lengths.drift > 0):
        raise ValueError(
            f"lengths: shared ({lengths.shared}) must be between 0 and 1, tail ({lengths.tail:g}) "
            f"between 0 and {MOST_TAIL:g}, and drift ({lengths.drift}) above 0; correct them"
        )
    if scenario.engine.reserve_tokens < 1:
        raise ValueError(
            f"reserve_tokens ({scenario.engine.reserve_tokens:g}) must be at least 1: a sequence "
            "that starts in a full cache would be retracted at once; raise it"
        )
    longest = scenario.prompt_tokens + lengths.max_tokens
    if scenario.engine.kv_tokens < longest:
        raise ValueError(
            f"the KV cache of an engine holds {scenario.engine.kv_tokens:.0f} tokens, the longest "
            f"sequence has {longest}; use more GPUs per engine or shorter responses"
        )
    if not 0 <= scenario.pause_s <= scenario.publish_s:
        raise ValueError(
            f"pause_s ({scenario.pause_s:g}) must be between 0 and publish_s "
            f"({scenario.publish_s:g}); it is a part of it"
        )
    for name in ("engine_slowdown", "learner_slowdown"):
        if getattr(scenario, name) < 1:
            raise ValueError(
                f"shared: {name} ({getattr(scenario, name):g}) must be at least 1: no side "
                "becomes faster while the other works; correct it"
            )
    if min(scenario.fetch_s, scenario.snapshot_s) < 0:
        raise ValueError("fetch_s and snapshot_s must be at least 0; correct them")
    if scenario.warm_up_steps + 4 > scenario.num_steps:
        raise ValueError(
            f"num_steps ({scenario.num_steps}) must be at least warm_up_steps "
            f"({scenario.warm_up_steps}) + 4; simulate more steps"
        )
    for outage in scenario.outages:
        if not 0 <= outage.engine < scenario.num_engines or outage.back_s <= outage.at_s:
            raise ValueError(
                f"outage {outage} must name an engine from 0 to {scenario.num_engines - 1} and end "
                "after it began; correct it"
            )
