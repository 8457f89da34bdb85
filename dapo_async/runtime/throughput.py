"""Rates of a run: tokens and groups per second between two reports, per engine and per device.

In: the reports of all actors at two instants. Out: numbers by their names in `metrics.jsonl`. All
rates of a row are over the same seconds, so they add up as the counts do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from dapo_async.config import Config
from dapo_async.replay import TokenCounts
from dapo_async.runtime.actors.reports import ReplayReport


@dataclass(frozen=True, slots=True)
class Sides:
    """How many devices each side has: the GPUs that it reserves, or its actors on a CPU."""

    engines: int = 1
    rollout_devices: int = 1
    learner_devices: int = 1

    @classmethod
    def of(cls, config: Config) -> Self:
        rollout, learner = config.rollout, config.learner
        per_engine = rollout.tensor_parallel if config.model.torch_device == "cuda" else 1
        return cls(
            rollout.num_workers,
            rollout.num_workers * per_engine,
            learner.data_parallel * learner.tensor_parallel,
        )


@dataclass(frozen=True, slots=True)
class Flow:
    """What has passed through a run up to one instant of this incarnation."""

    time_s: float
    tokens: TokenCounts
    groups: Mapping[str, int]  # generated, accepted, trained

    @classmethod
    def of(cls, time_s: float, replay: ReplayReport | None, engines: Iterable[TokenCounts]) -> Self:
        tokens = sum(engines, start=TokenCounts())
        if replay is None:
            return cls(time_s, tokens, {"generated": 0, "accepted": 0, "trained": 0})
        trained = replay.counts.trained
        groups = {"generated": replay.offered, "accepted": replay.accepted, "trained": trained}
        return cls(time_s, tokens + replay.tokens, groups)

    def rates(self, before: Flow, sides: Sides) -> dict[str, dict[str, float]]:
        """`tokens_per_s` and `groups_per_s` since `before`, each by kind.

        Kinds of tokens: prefilled, generated, accepted (of groups that passed the filters),
        trained. Kinds of groups: generated (judged by the filters), accepted, trained.
        `per_engine.<kind>` is divided by the engines; `per_device.<kind>` by the devices of the
        side that does it. Empty if no time has passed.
        """
        elapsed_s = self.time_s - before.time_s
        if elapsed_s <= 0:
            return {}
        new, old = self.tokens, before.tokens
        tokens = {
            "prefilled": new.prefilled - old.prefilled,
            "generated": new.generated - old.generated,
            "accepted": new.accepted - old.accepted,
            "trained": new.trained - old.trained,
        }
        groups = {kind: count - before.groups[kind] for kind, count in self.groups.items()}
        return {
            "tokens_per_s": _per_second(tokens, elapsed_s, sides),
            "groups_per_s": _per_second(groups, elapsed_s, sides),
        }


def _per_second(counts: Mapping[str, int], elapsed_s: float, sides: Sides) -> dict[str, float]:
    rates = {kind: count / elapsed_s for kind, count in counts.items()}
    rollout = {kind: rate for kind, rate in rates.items() if kind != "trained"}
    return {
        **rates,
        **{f"per_engine.{kind}": rate / sides.engines for kind, rate in rollout.items()},
        **{f"per_device.{kind}": rate / sides.rollout_devices for kind, rate in rollout.items()},
        "per_device.trained": rates["trained"] / sides.learner_devices,
    }


# Of a run that ended before its first report.
NO_RATES = Flow.of(1.0, None, ()).rates(Flow.of(0.0, None, ()), Sides())
