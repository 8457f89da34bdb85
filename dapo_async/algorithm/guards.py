"""Rules that find a batch which would do harm, and a run that no longer learns.

In: numbers of a minibatch before its update, and the metrics of each step. Out: the names of the
broken rules, a line for each, counts. The learner asks `broken_by_minibatch` before each update,
the driver gives every step to `RunGuards`. Pure, without torch.

`train.guards` says what a broken rule does:

    warn   the update is made; the run prints a line, counts, and keeps the batch
    skip   the same, but a minibatch that breaks a rule changes no weight
    stop   as skip, and the run ends

A loss or gradient that is not finite never changes a weight. Rules about several steps have no
batch to skip: `skip` is the same as `warn` for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MOST_KL = 0.5  # nats per token, of the behaviour policy from the proximal one (estimator k3)
LEAST_ESS = 0.05  # of a minibatch's tokens
LEAST_ROLLOUTS = 16  # fewer may all be cut by chance
LEAST_ENTROPY = 0.02  # of that of the first step
LEARNED = 0.9  # accuracy from which on a low entropy is no fault
NO_VARIANCE_STEPS = 20
KEPT_BATCHES = 5  # of each rule


class Guard(StrEnum):
    """The rules by name."""

    NON_FINITE = "non_finite"
    EXPLODING_RATIO = "exploding_ratio"
    FEW_EFFECTIVE = "few_effective"
    ALL_TRUNCATED = "all_truncated"
    ENTROPY_COLLAPSE = "entropy_collapse"
    NO_VARIANCE = "no_variance"
    CHECKSUM_MISMATCH = "checksum_mismatch"


MINIBATCH_GUARDS = (
    Guard.NON_FINITE,
    Guard.EXPLODING_RATIO,
    Guard.FEW_EFFECTIVE,
    Guard.ALL_TRUNCATED,
)


@dataclass(frozen=True, slots=True)
class MinibatchFacts:
    """Of one minibatch over all ranks; ρ = π_prox/π_beh per token in the loss."""

    loss: float
    grad_norm: float  # before it is clipped
    num_tokens: float
    kl_sum: float  # of ρ − 1 − log ρ
    ratio_sum: float  # of ρ
    chi2_sum: float  # of ρ² − 1
    num_rollouts: float
    num_truncated: float

    @property
    def effective_share(self) -> float:
        """(mean ρ)² / mean ρ², in (0, 1]."""
        square_sum = self.chi2_sum + self.num_tokens
        if not self.num_tokens or not square_sum > 0:
            return 1.0
        return self.ratio_sum**2 / self.num_tokens / square_sum


def broken_by_minibatch(facts: MinibatchFacts) -> tuple[Guard, ...]:
    """The rules that a minibatch breaks before its update; every rank finds the same."""
    if not (math.isfinite(facts.loss) and math.isfinite(facts.grad_norm)):
        return (Guard.NON_FINITE,)
    broken = []
    if facts.num_tokens and facts.kl_sum / facts.num_tokens > MOST_KL:
        broken.append(Guard.EXPLODING_RATIO)
    if facts.effective_share < LEAST_ESS:
        broken.append(Guard.FEW_EFFECTIVE)
    if facts.num_rollouts >= LEAST_ROLLOUTS and facts.num_truncated == facts.num_rollouts:
        broken.append(Guard.ALL_TRUNCATED)
    return tuple(broken)


def flags(broken: Sequence[Guard]) -> dict[str, float]:
    """1 or 0 per rule about a minibatch, for the totals of its metrics."""
    return {_flag(guard): float(guard in broken) for guard in MINIBATCH_GUARDS}


def guards_in(totals: Mapping[str, float]) -> tuple[Guard, ...]:
    """The rules that the learner has reported with the metrics of a minibatch or step."""
    return tuple(guard for guard in MINIBATCH_GUARDS if totals.get(_flag(guard)))


def _flag(guard: Guard) -> str:
    return guard.value if guard is Guard.NON_FINITE else f"guard.{guard.value}"


@dataclass(slots=True)
class RunGuards:
    """Judges the steps of one run in their order. A resumed run goes on with `state`."""

    mode: str = "warn"  # train.guards
    counts: Counter[str] = field(default_factory=Counter)  # steps that broke a rule, by its name
    stop_reason: str | None = None  # with `stop`: why the run ends
    _first_entropy: float | None = None
    _steps_without_variance: int = 0
    _mismatches: int = 0  # so far, of this start of the run
    _before: frozenset[Guard] = frozenset()  # broken by the step before
    _kept: Counter[Guard] = field(default_factory=Counter)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON values."""
        return {
            "counts": dict(self.counts),
            "first_entropy": self._first_entropy,
            "steps_without_variance": self._steps_without_variance,
            "before": sorted(self._before),
            "kept": {guard.value: count for guard, count in self._kept.items()},
        }

    @classmethod
    def resumed(cls, mode: str, state: Mapping[str, Any]) -> RunGuards:
        """Goes on where `state` ended; empty, as in checkpoints of earlier versions: begins."""
        return cls(
            mode,
            Counter(state.get("counts", {})),
            _first_entropy=state.get("first_entropy"),
            _steps_without_variance=state.get("steps_without_variance", 0),
            _before=frozenset(map(Guard, state.get("before", ()))),
            _kept=Counter({Guard(name): count for name, count in state.get("kept", {}).items()}),
        )

    def to_keep(self, totals: Mapping[str, float]) -> tuple[Guard, ...]:
        """The rules for which the batch of a minibatch is kept on disk: the first few of each."""
        wanted = [guard for guard in guards_in(totals) if self._kept[guard] < KEPT_BATCHES]
        self._kept.update(wanted)
        return tuple(wanted)

    def after_step(self, step: int, values: Mapping[str, float], *, mismatches: int) -> list[str]:
        """Counts what `step` has broken. Returns a line for each rule that the step before kept.

        `values`: the metrics of the step. `mismatches`: publishes so far after which an engine
        served other weights than the learner's (handshake).
        """
        broken = [*guards_in(values), *self._broken_over_steps(values, mismatches)]
        self.counts.update(guard.value for guard in broken)
        lines = [
            f"step {step + 1}: {_LINES[guard](values)} (guard {guard.value})"
            for guard in broken
            if guard not in self._before
        ]
        self._before = frozenset(broken)
        if broken and self.mode == "stop":
            told = "; ".join(_LINES[guard](values) for guard in broken)
            self.stop_reason = (
                f"step {step + 1}: {told} (train.guards=stop); read the batches in guarded/ and "
                "non_finite/, and continue with train.guards=warn, or from an older checkpoint "
                "with --from"
            )
        return lines

    def _broken_over_steps(self, values: Mapping[str, float], mismatches: int) -> Sequence[Guard]:
        broken = []
        if mismatches > self._mismatches:
            broken.append(Guard.CHECKSUM_MISMATCH)
        self._mismatches = mismatches
        entropy = values.get("entropy", math.nan)
        if self._first_entropy is None and math.isfinite(entropy):
            self._first_entropy = entropy
        if (
            self._first_entropy is not None
            and entropy < LEAST_ENTROPY * self._first_entropy
            and values.get("accuracy", 0.0) <= LEARNED
        ):
            broken.append(Guard.ENTROPY_COLLAPSE)
        num_groups = values.get("groups", 0.0)
        has_none = 0.0 < num_groups == values.get("groups_equal_rewards", 0.0)
        self._steps_without_variance = self._steps_without_variance + 1 if has_none else 0
        if self._steps_without_variance >= NO_VARIANCE_STEPS:
            broken.append(Guard.NO_VARIANCE)
        return broken


def _non_finite(values: Mapping[str, float]) -> str:
    return "the loss or gradient is not finite"


def _exploding(values: Mapping[str, float]) -> str:
    kl = values.get("behaviour_kl_k3", math.nan)
    return f"the learner is {kl:.2g} nats per token away from the policy that sampled"


def _few_effective(values: Mapping[str, float]) -> str:
    return f"effective samples {values.get('behaviour_ess', math.nan):.1%} of the tokens"


def _all_truncated(values: Mapping[str, float]) -> str:
    return "all responses are cut at rollout.max_response_tokens"


def _collapsed(values: Mapping[str, float]) -> str:
    return f"the entropy fell to {values.get('entropy', math.nan):.2g} nats"


def _no_variance(values: Mapping[str, float]) -> str:
    return (
        f"the rewards of each group have been equal for {NO_VARIANCE_STEPS} steps, so nothing is "
        "learned"
    )


def _mismatch(values: Mapping[str, float]) -> str:
    return "an engine served other weights than the learner's"


_LINES = {
    Guard.NON_FINITE: _non_finite,
    Guard.EXPLODING_RATIO: _exploding,
    Guard.FEW_EFFECTIVE: _few_effective,
    Guard.ALL_TRUNCATED: _all_truncated,
    Guard.ENTROPY_COLLAPSE: _collapsed,
    Guard.NO_VARIANCE: _no_variance,
    Guard.CHECKSUM_MISMATCH: _mismatch,
}
