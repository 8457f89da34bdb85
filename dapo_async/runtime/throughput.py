"""Rates and use of the devices between two reports, from the counts of all actors.

In: the reports of all actors at two instants. Out: numbers by their names in `metrics.jsonl`. All
rates of a row are over the same seconds, so they add up as the counts do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self, TypeVar

from dapo_async.config import Config
from dapo_async.model import ModelConfig
from dapo_async.model.cost import forward_flops, kv_bytes, weight_bytes
from dapo_async.model.peak import Peak
from dapo_async.replay import TokenCounts, TokenOutcome
from dapo_async.rollout import EngineWork, KVUse, SlotUse, TimeUse
from dapo_async.runtime.actors.reports import ReplayReport, WorkerReport

NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LEAST_S = 0.5  # a best rate is measured over at least so much time with running sequences


@dataclass(frozen=True, slots=True)
class Sides:
    """How many devices each side has: the GPUs that it reserves, or its actors on a CPU.

    Engines may join and leave: their number over some time is a mean.
    """

    engines: float = 1
    rollout_devices: float = 1
    learner_devices: int = 1

    @classmethod
    def of(cls, config: Config) -> Self:
        rollout, learner = config.rollout, config.learner
        per_engine = rollout.tensor_parallel if config.model.torch_device == "cuda" else 1
        return cls(
            rollout.num_workers,
            rollout.num_workers * per_engine,
            learner.num_ranks,
        )

    def with_engines(self, engines: float) -> Sides:
        """The same engines, but so many; at least a part of one, because it is divided by."""
        engines = max(engines, 1e-3)
        each = self.rollout_devices / self.engines
        return replace(self, engines=engines, rollout_devices=engines * each)


class EngineCount:
    """The number of engines over time, as a step function."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int]] = []  # since when; how many

    def add(self, time_s: float, count: int) -> None:
        if not self._steps or self._steps[-1][1] != count:
            self._steps.append((time_s, count))

    def mean(self, start_s: float, end_s: float) -> float:
        """The mean between two times after the first `add`; exact where the number stays."""
        ends = [*(time_s for time_s, _ in self._steps[1:]), math.inf][: len(self._steps)]
        spent = [
            (max(0.0, min(end_s, until_s) - max(start_s, since_s)), count)
            for (since_s, count), until_s in zip(self._steps, ends, strict=True)
        ]
        counts = {count for seconds, count in spent if seconds > 0}
        if len(counts) == 1:
            return counts.pop()
        total_s = sum(seconds for seconds, _ in spent)
        if total_s <= 0:
            return self._steps[-1][1] if self._steps else 1.0
        return sum(seconds * count for seconds, count in spent) / total_s


@dataclass(frozen=True, slots=True)
class EngineFlow:
    """What one engine has done up to a report."""

    tokens: TokenCounts = field(default_factory=TokenCounts)
    time: TimeUse = field(default_factory=TimeUse)
    work: EngineWork = field(default_factory=EngineWork)
    slots: SlotUse | None = None
    kv: KVUse = field(default_factory=KVUse)

    @classmethod
    def of(cls, report: WorkerReport) -> Self:
        return cls(report.tokens, report.time_use, report.work, report.slot_use, report.kv_use)

    def __add__(self, later: Self) -> EngineFlow:
        """The sum of two processes of one worker, one after the other."""
        slots = later.slots or self.slots
        if self.slots is not None and later.slots is not None:
            slots = _sum_of(self.slots, later.slots)
        return EngineFlow(
            self.tokens + later.tokens,
            _sum_of(self.time, later.time),
            _sum_of(self.work, later.work),
            slots,
            _sum_of(self.kv, later.kv),
        )

    def ended(self, balance: int) -> EngineFlow:
        """What stays of the processes of a worker, of which the last one is lost.

        `balance`: response tokens that the replay actor got from them, less those that it gave. The
        other tokens died with it, and other engines generate them again. What it did after its last
        report is not known; if it gave more tokens than it had reported, it has generated them.
        """
        lost = self.tokens.in_flight - balance
        missing = TokenCounts(generated=max(0, -lost))
        again = TokenCounts(ended={TokenOutcome.REPEATED: max(0, lost)})
        return replace(self, tokens=self.tokens + missing + again)

    def seconds(self) -> dict[str, float]:
        """By state of the engine; they add up to the time since its start."""
        return _parts(self.time)

    def pace(self, before: EngineFlow | None) -> dict[str, float]:
        """Tokens per second, share of time running and occupied slots since `before`."""
        old = before or EngineFlow()
        seconds = _subtracted(self.seconds(), old.seconds())
        elapsed_s = sum(seconds.values())
        if elapsed_s <= 0:
            return {}
        slots = self.slot_seconds().get("occupied", 0.0) - old.slot_seconds().get("occupied", 0.0)
        return {
            "tokens_per_s": (self.tokens.generated - old.tokens.generated) / elapsed_s,
            "running": seconds["running"] / elapsed_s,
            "slots": slots / elapsed_s,
        }

    def slot_seconds(self) -> dict[str, float]:
        """By state of a slot; they add up to slots × the time since its start."""
        return _parts(self.slots) if self.slots is not None else {}


Use = TypeVar("Use", TimeUse, SlotUse, EngineWork, KVUse)


def _sum_of(first: Use, second: Use) -> Use:
    """Adds everything but the number of slots, which is the second one's."""
    sums = {
        item.name: getattr(first, item.name) + getattr(second, item.name)
        for item in fields(first)
        if item.name != "slots"
    }
    return replace(second, **sums)


def _parts(use: TimeUse | SlotUse) -> dict[str, float]:
    names = [item.name for item in fields(use) if item.name not in ("slots", "elapsed_s")]
    return {name: getattr(use, name) for name in names}


@dataclass(frozen=True, slots=True)
class Flow:
    """What has passed through a run up to one instant of this incarnation."""

    time_s: float
    tokens: TokenCounts
    groups: Mapping[str, int]  # generated, accepted, trained
    engines: Mapping[str, EngineFlow] = field(default_factory=dict)

    @classmethod
    def of(
        cls, time_s: float, replay: ReplayReport | None, engines: Mapping[str, EngineFlow]
    ) -> Self:
        """The newest reports; None before the replay actor's first one."""
        tokens = sum((each.tokens for each in engines.values()), start=TokenCounts())
        if replay is None:
            groups = {"generated": 0, "accepted": 0, "trained": 0}
            return cls(time_s, tokens, groups, dict(engines))
        trained = replay.counts.trained
        groups = {"generated": replay.offered, "accepted": replay.accepted, "trained": trained}
        return cls(time_s, tokens + replay.tokens, groups, dict(engines))

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

    def engine_time(self, before: Flow) -> dict[str, float]:
        """Shares of the engines' time since `before`, by state; they add up to 1."""
        spent = _added(
            _subtracted(engine.seconds(), before.engines[name].seconds())
            for name, engine in self.engines.items()
            if name in before.engines
        )
        total_s = sum(spent.values())
        return {state: seconds / total_s for state, seconds in spent.items()} if total_s else {}

    def engine_state(self, before: Flow) -> dict[str, float]:
        """Memory for keys and values (KV), prefix cache and decode batch of the engines.

        `kv.use`: share of the memory in use, mean over time and engines. `kv.retractions`:
        sequences that lost their memory, since the engines' start. `prefix.hit`: share of the
        prompt tokens that sequences began with and whose KV was there. `decode.batch`: sequences
        per decode step. `slots_per_engine`: slots of an engine, mean over time. A number without
        any event since `before` is left out.
        """
        pairs = [
            (before.engines[name], engine)
            for name, engine in self.engines.items()
            if name in before.engines
        ]
        elapsed_s = sum(new.kv.elapsed_s - old.kv.elapsed_s for old, new in pairs)
        prompts = sum(new.kv.input_tokens - old.kv.input_tokens for old, new in pairs)
        steps = sum(new.work.steps - old.work.steps for old, new in pairs)
        found: dict[str, float] = {}
        if elapsed_s > 0:
            full_s = sum(new.kv.full_s - old.kv.full_s for old, new in pairs)
            found["kv.use"] = full_s / elapsed_s
        slots = [(old.slots, new.slots) for old, new in pairs if old.slots and new.slots]
        slots_s = sum(new.elapsed_s - old.elapsed_s for old, new in slots)
        if slots_s > 0:
            slot_s = sum(
                sum(_parts(new).values()) - sum(_parts(old).values()) for old, new in slots
            )
            found["slots_per_engine"] = slot_s / slots_s
        if pairs:
            found["kv.retractions"] = sum(new.kv.retractions for _, new in pairs)
        if prompts > 0:
            cached = sum(new.kv.cached_tokens - old.kv.cached_tokens for old, new in pairs)
            found["prefix.hit"] = cached / prompts
        if steps > 0:
            found["decode.batch"] = sum(n.work.decoded - o.work.decoded for o, n in pairs) / steps
        return found


def rollout_idle(shares: Mapping[str, float]) -> dict[str, float]:
    """The share of time in which no sequence runs and no learner has the device, from
    `engine_time`; empty without it."""
    in_use = ("running", "evaluation", "asleep")
    return {"rollout": 1.0 - sum(shares[state] for state in in_use)} if shares else {}


@dataclass(slots=True)
class BestRate:
    """The most tokens per second that an engine of this run has generated while it ran.

    The rate over some steps is compared with it: the engine's efficiency. It is learned from the
    run itself, so early steps are compared with less.
    """

    tokens_per_s: float = 0.0
    _since: dict[str, EngineFlow] = field(default_factory=dict)  # where a measurement began

    def learn(self, now: Flow) -> None:
        """Measures each engine over at least `LEAST_S` seconds of running sequences."""
        for name, engine in now.engines.items():
            tokens, running_s, _ = _speed(self._since.setdefault(name, engine), engine)
            if running_s >= LEAST_S:
                self.tokens_per_s = max(self.tokens_per_s, tokens / running_s)
                self._since[name] = engine

    def efficiency(self, before: Flow, after: Flow) -> float | None:
        """Tokens per second of the time awake, over the best; the mean of the engines.

        At most 1: a short interval can be faster than the best. None if nothing was generated.
        """
        common = before.engines.keys() & after.engines.keys()
        speeds = [_speed(before.engines[name], after.engines[name]) for name in common]
        rates = [tokens / elapsed_s for tokens, _, elapsed_s in speeds if elapsed_s > 0]
        while_running = [tokens / running_s for tokens, running_s, _ in speeds if running_s > 0]
        best = self.tokens_per_s or max(while_running, default=0.0)
        return min(1.0, sum(rates) / len(rates) / best) if rates and best else None


def _speed(before: EngineFlow, after: EngineFlow) -> tuple[int, float, float]:
    """Generated tokens, seconds with running sequences, and all seconds awake."""
    seconds = _subtracted(after.seconds(), before.seconds())
    running_s = seconds["running"] + seconds["evaluation"]
    awake_s = sum(seconds.values()) - seconds["asleep"]
    return after.tokens.generated - before.tokens.generated, running_s, awake_s


@dataclass(frozen=True, slots=True)
class Devices:
    """The model and the devices, for the use of FLOPs (MFU) and of memory bandwidth (MBU)."""

    model: ModelConfig
    num_bytes: int  # of a number in the engine
    per_engine: int = 1  # devices

    @classmethod
    def of(cls, config: Config, model: ModelConfig) -> Self:
        sides = Sides.of(config)
        per_engine = round(sides.rollout_devices / sides.engines)
        return cls(model, NUM_BYTES[config.model.dtype], per_engine)

    def engine_use(self, before: Flow, after: Flow, peaks: Mapping[str, Peak]) -> dict[str, float]:
        """`mfu.rollout` and `mbu.rollout`, while sequences ran; empty if none did.

        FLOPs: dense products and causal attention of all prefilled and decoded tokens. Bytes: the
        weights once per decode step, and keys and values of each sequence. What is computed again
        is not counted. `peaks`: of one device, by engine.
        """
        flops = num_bytes = most_flops = most_bytes = 0.0
        for name, engine in after.engines.items():
            if name not in peaks or name not in before.engines:
                continue
            flops_now, bytes_now = self._done(engine)
            flops_old, bytes_old = self._done(before.engines[name])
            flops, num_bytes = flops + flops_now - flops_old, num_bytes + bytes_now - bytes_old
            seconds = _subtracted(engine.seconds(), before.engines[name].seconds())
            device_s = (seconds["running"] + seconds["evaluation"]) * self.per_engine
            most_flops += device_s * peaks[name].flops_per_s
            most_bytes += device_s * peaks[name].bytes_per_s
        if most_flops <= 0:
            return {}
        return {"mfu.rollout": flops / most_flops, "mbu.rollout": num_bytes / most_bytes}

    def _done(self, engine: EngineFlow) -> tuple[float, float]:
        """FLOPs and bytes of an engine so far."""
        work, tokens = engine.work, engine.tokens
        flops = forward_flops(
            self.model,
            tokens=tokens.prefilled + work.decoded,
            pairs=work.prefill_pairs + work.decode_pairs,
            predicted=tokens.generated,
        )
        weights = work.steps * weight_bytes(self.model, num_bytes=self.num_bytes)
        cache = work.decode_pairs * kv_bytes(self.model, num_bytes=self.num_bytes)
        return flops, weights + cache


def _subtracted(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in after.items()}


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


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
NO_RATES = Flow.of(1.0, None, {}).rates(Flow.of(0.0, None, {}), Sides())
NO_STATE = dict.fromkeys(
    ("kv.use", "kv.retractions", "prefix.hit", "decode.batch", "slots_per_engine")
)
NO_USE = dict.fromkeys(("mfu.learner", "mfu.rollout", "mbu.rollout", "efficiency.rollout"))
