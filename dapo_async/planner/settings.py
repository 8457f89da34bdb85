"""Reads a scenario file (YAML): the rates of both sides, the workload, the cluster.

Every key has a default or is named as missing; an unknown key is refused with the nearest known
one. `docs/planner.md` has the table of keys. The commands `simulate` and `plan` call it.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from dapo_async.planner.cost_model import Efficiency, Training, publish_times
from dapo_async.planner.engine import EngineSpeed
from dapo_async.planner.hardware import find_gpu
from dapo_async.planner.lengths import Lengths, mixture
from dapo_async.planner.planned_model import read_model
from dapo_async.planner.rates import ComputedRates, Rates, between_points
from dapo_async.planner.scenario import LearnerSpeed, Outage, Scenario

REQUIRED = object()
# Section → key → default.
KEYS: Mapping[str, Mapping[str, Any]] = {
    "engine": {
        "slots": REQUIRED,
        "step_s": REQUIRED,
        "context_s": 0.0,
        "prefill_s": 0.0,
        "kv_tokens": None,
        "reserve_tokens": 256,
        "gpus": 1,
        "weight_update": "recompute",
    },
    "learner": {
        "token_s": REQUIRED,
        "fixed_s": 0.0,
        "jitter": 0.0,
        "gpus": 1,
        "tensor_parallel": 1,
        "context_parallel": 1,
        "scaling": 0.75,
        "minibatches": 1,
    },
    "lengths": {
        "mean": None,
        "max": REQUIRED,
        "tail": 0.8,
        "shared": 0.5,
        "drift": 1.0,
        "mixture": None,
        "samples": None,
    },
    "replay": {
        "groups_per_step": REQUIRED,
        "group_size": 16,
        "max_staleness": 2,
        "admission": "paced",
        "acceptance": 1.0,
    },
    "publish": {"seconds": 0.0, "pause_s": 0.0},
    "control": {"fetch_s": 0.0, "snapshot_s": 0.0},
    "shared": {"engine": 1.0, "learner": 1.0},
    "checkpoint": {"seconds": 0.0, "every_steps": 0},
    "evaluation": {"seconds": 0.0, "every_steps": 0},
}
MODEL_KEYS: Mapping[str, Any] = {
    "path": REQUIRED,
    "gpu": REQUIRED,
    "hardware": None,
    "transport": "broadcast",
    "microbatch_tokens": 16_384,
    "recompute": "auto",
    "zero_stage": "auto",
    **{item.name: item.default for item in fields(Efficiency)},
}
TOP: Mapping[str, Any] = {
    "engines": REQUIRED,
    "prompt_tokens": 0,
    "steps": 60,
    "warm_up_steps": 20,
    "seed": 0,
    "colocated": False,
    "outages": (),
    "model": None,
    "plan": None,
}
WEIGHT_UPDATES = ("recompute", "keep_kv", "drain")
CHOICES = {
    ("replay", "admission"): ("paced", "eager"),
    ("engine", "weight_update"): WEIGHT_UPDATES,
}
PLAN_KEYS: Mapping[str, Any] = {
    "gpus": REQUIRED,
    "max_staleness": (1, 2, 3, 4),
    "slots": None,
    "engine_gpus": None,
    "tensor_parallel": None,
    "context_parallel": None,
    "weight_update": None,
    "gpu_hour": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What `plan` may change, and the rates of other sizes."""

    rates: Rates
    gpus: tuple[int, ...] = ()  # to be split; empty: the file has no section `plan`
    max_staleness: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    engine_gpus: tuple[int, ...] = ()  # of one engine
    tensor_parallel: tuple[int, ...] = ()  # of the learner
    context_parallel: tuple[int, ...] = (1,)  # of the learner
    weight_update: tuple[str, ...] = ()
    gpu_hour: float | None = None  # its price


def read_scenario_file(
    path: Path, *, measured: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Scenario, Cluster]:
    """The scenario of a file. Raises ValueError with one line that names the file.

    `measured`: sections whose keys replace those of the file.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"scenario file {path} can't be read ({error.strerror}); give a YAML file such as "
            "docs/examples/plan_7b_64gpus.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"scenario file {path} is not valid YAML: {what}; correct it") from error
    if not isinstance(values, dict):
        raise ValueError(f"scenario file {path} must hold keys and sections; see docs/planner.md")
    for name, section in (measured or {}).items():
        there = values.get(name)
        values[name] = {**(there if isinstance(there, Mapping) else {}), **section}
    try:
        return read_scenario(values, folder=path.resolve().parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_scenario(
    values: Mapping[str, Any], *, folder: Path | None = None
) -> tuple[Scenario, Cluster]:
    """The scenario of the content of a file. Raises ValueError with one line.

    `folder`: what a relative `model.path` is relative to; None: the current folder.
    """
    computed, given = None, values
    if values.get("model") is not None:
        values, computed = _with_model(values, folder or Path())
    top = _section("", {key: each for key, each in values.items() if key not in KEYS}, TOP)
    of = {name: _section(name, values.get(name), keys) for name, keys in KEYS.items()}
    for (section, key), choices in CHOICES.items():
        _choice(f"{section}.{key}", of[section][key], choices)
    engine, learner, replay = of["engine"], of["learner"], of["replay"]
    _check_groups_of_ranks(learner)
    scenario = Scenario(
        num_engines=_whole("engines", top["engines"]),
        engine=_engine_speed(engine),
        learner=LearnerSpeed(
            token_s=_token_s(learner),
            fixed_s=_number("learner.fixed_s", learner["fixed_s"]),
            jitter=_number("learner.jitter", learner["jitter"]),
        ),
        lengths=_lengths(of["lengths"], seed=_whole("seed", top["seed"], least=0)),
        prompt_tokens=_whole("prompt_tokens", top["prompt_tokens"], least=0),
        group_size=_whole("replay.group_size", replay["group_size"]),
        groups_per_step=_whole("replay.groups_per_step", replay["groups_per_step"]),
        num_minibatches=_whole("learner.minibatches", learner["minibatches"]),
        max_staleness=_whole("replay.max_staleness", replay["max_staleness"], least=0),
        num_steps=_whole("steps", top["steps"]),
        warm_up_steps=_whole("warm_up_steps", top["warm_up_steps"], least=0),
        acceptance=_acceptance(replay["acceptance"]),
        admission=replay["admission"],
        weight_update=engine["weight_update"],
        publish_s=_number("publish.seconds", of["publish"]["seconds"]),
        pause_s=_number("publish.pause_s", of["publish"]["pause_s"]),
        fetch_s=_number("control.fetch_s", of["control"]["fetch_s"]),
        snapshot_s=_number("control.snapshot_s", of["control"]["snapshot_s"]),
        engine_slowdown=_number("shared.engine", of["shared"]["engine"]),
        learner_slowdown=_number("shared.learner", of["shared"]["learner"]),
        checkpoint_s=_number("checkpoint.seconds", of["checkpoint"]["seconds"]),
        checkpoint_every_steps=_whole(
            "checkpoint.every_steps", of["checkpoint"]["every_steps"], least=0
        ),
        evaluation_s=_number("evaluation.seconds", of["evaluation"]["seconds"]),
        evaluation_every_steps=_whole(
            "evaluation.every_steps", of["evaluation"]["every_steps"], least=0
        ),
        outages=_outages(top["outages"]),
        colocated=bool(top["colocated"]),
    )
    rates = Rates(
        engine=scenario.engine,
        engine_gpus=_whole("engine.gpus", engine["gpus"]),
        learner=scenario.learner,
        learner_gpus=_whole("learner.gpus", learner["gpus"]),
        tensor_parallel=_whole("learner.tensor_parallel", learner["tensor_parallel"]),
        context_parallel=_whole("learner.context_parallel", learner["context_parallel"]),
        scaling=_share("learner.scaling", learner["scaling"]),
        token_s=_points(learner["token_s"]),
        computed=computed,
        is_engine_computed=computed is not None and "step_s" not in (given.get("engine") or {}),
    )
    return scenario, _cluster(top["plan"], rates, scenario)


def _check_groups_of_ranks(learner: Mapping[str, Any]) -> None:
    gpus = _whole("learner.gpus", learner["gpus"])
    size = _whole("learner.tensor_parallel", learner["tensor_parallel"])
    slices = _whole("learner.context_parallel", learner["context_parallel"])
    if gpus % (size * slices):
        more = f" x learner.context_parallel ({slices})" if slices > 1 else ""
        raise ValueError(
            f"learner.gpus ({gpus}) must be a multiple of learner.tensor_parallel ({size}){more}; "
            "change one of them"
        )


def step_table(points: Mapping[int, float], slots: int) -> tuple[float, ...]:
    """Decode step times for 0 … `slots` running sequences, from measured ones.

    Linear between the points; below the first and above the last, along the nearest line. Raises
    ValueError if a point or a result is not positive.
    """
    if not points or any(n < 0 or not seconds > 0 for n, seconds in points.items()):
        raise ValueError(
            f"engine.step_s ({dict(points)}) must give positive seconds by running sequences, such "
            "as {1: 0.012, 128: 0.018}"
        )
    known = sorted(points.items())
    if len(known) == 1:
        return (known[0][1],) * (slots + 1)
    table = []
    for n in range(slots + 1):
        place = max(1, next((i for i, (m, _) in enumerate(known) if m >= n), len(known) - 1))
        (low, low_s), (high, high_s) = known[place - 1], known[place]
        table.append(low_s + (high_s - low_s) * (n - low) / (high - low))
    if min(table) <= 0:
        raise ValueError(
            f"engine.step_s ({dict(points)}) falls to {min(table):.3g} s within {slots} slots; "
            "give a point for few and for many running sequences"
        )
    return tuple(table)


def _with_model(values: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], ComputedRates]:
    """The values with the rates that the cost model knows, and the cost model.

    Measured rates in the file stay.
    """
    settings = _section("model", values["model"], MODEL_KEYS)
    for name in ("engine", "learner"):
        if not isinstance(values.get(name) or {}, Mapping):
            raise ValueError(f"{name} ({values[name]!r}) must be a section of keys")
    engine = _section("engine", {"step_s": 1.0, **(values.get("engine") or {})}, KEYS["engine"])
    learner = _section(
        "learner", {"token_s": 1.0, **(values.get("learner") or {})}, KEYS["learner"]
    )
    computed = _computed(settings, values, learner, folder)
    speed = computed.engine(
        gpus=_whole("engine.gpus", engine["gpus"]), slots=_whole("engine.slots", engine["slots"])
    )
    trains = computed.learner(
        gpus=_whole("learner.gpus", learner["gpus"]),
        tensor_parallel=_whole("learner.tensor_parallel", learner["tensor_parallel"]),
        context_parallel=_whole("learner.context_parallel", learner["context_parallel"]),
    )
    publish_s, pause_s = publish_times(
        computed.model,
        disk=_choice("model.transport", settings["transport"], ("broadcast", "disk")) == "disk",
        efficiency=computed.efficiency,
    )
    rates = {
        "step_s": dict(enumerate(speed.step_s)),
        "context_s": speed.context_s,
        "prefill_s": speed.prefill_s,
        "kv_tokens": speed.kv_tokens,
    }
    training = {"token_s": trains.token_s, "fixed_s": trains.fixed_s}
    if "token_s" in (values.get("learner") or {}):
        training = {}  # the measured time of a token has a part of the fixed one
    merged = {
        **values,
        "engine": {**rates, **(values.get("engine") or {})},
        "learner": {**training, **(values.get("learner") or {})},
        "publish": values.get("publish") or {"seconds": publish_s, "pause_s": pause_s},
    }
    return merged, computed


def _computed(
    settings: Mapping[str, Any],
    values: Mapping[str, Any],
    learner: Mapping[str, Any],
    folder: Path,
) -> ComputedRates:
    """The cost model of the section `model`, for the workload of the file."""
    replay = _section("replay", values.get("replay"), KEYS["replay"])
    lengths = _lengths(_section("lengths", values.get("lengths"), KEYS["lengths"]), seed=0)
    groups = _whole("replay.groups_per_step", replay["groups_per_step"])
    minibatches = _whole("learner.minibatches", learner["minibatches"])
    hardware = settings["hardware"]
    for key, known in {"recompute": ("none", "mlp", "all"), "zero_stage": (1, 2, 3)}.items():
        if settings[key] not in ("auto", *known) or isinstance(settings[key], bool):
            listed = ", ".join(map(str, known))
            raise ValueError(f"model.{key} ({settings[key]!r}) must be auto or one of {listed}")
    return ComputedRates(
        model=read_model(folder / str(settings["path"])),
        gpu=find_gpu(str(settings["gpu"]), None if hardware is None else folder / str(hardware)),
        work=Training(
            prompt_tokens=_whole("prompt_tokens", values.get("prompt_tokens", 0), least=0),
            response_tokens=round(lengths.mean_tokens),
            longest_tokens=lengths.max_tokens,
            group_size=_whole("replay.group_size", replay["group_size"]),
            groups=max(1, groups // minibatches),
            microbatch_tokens=_whole("model.microbatch_tokens", settings["microbatch_tokens"]),
            recompute=settings["recompute"],
            zero_stage=settings["zero_stage"],
            forwards=1 - 1 / minibatches,  # proximal logprobs of all but the first one
            several_minibatches=minibatches > 1,
        ),
        efficiency=Efficiency(
            **{
                item.name: _number(f"model.{item.name}", settings[item.name])
                for item in fields(Efficiency)
            }
        ),
    )


def _points(token_s: Any) -> dict[int, float]:
    """Measured seconds per token by GPUs of the learner; empty for a single number."""
    if not isinstance(token_s, Mapping):
        return {}
    points = {
        _whole("learner.token_s", gpus): _number("learner.token_s", seconds)
        for gpus, seconds in token_s.items()
    }
    if not points or min(points.values()) <= 0:
        raise ValueError(
            f"learner.token_s ({dict(token_s)}) must give positive seconds per token by GPUs, such "
            "as {8: 2.0e-5, 32: 6.5e-6}"
        )
    return points


def _token_s(learner: Mapping[str, Any]) -> float:
    """At the learner's GPUs."""
    points, gpus = _points(learner["token_s"]), _whole("learner.gpus", learner["gpus"])
    if not points:
        return _number("learner.token_s", learner["token_s"])
    if len(points) > 1:
        return between_points(points, gpus)
    ((at, seconds),) = points.items()
    return float(seconds * (at / gpus) ** _share("learner.scaling", learner["scaling"]))


def _engine_speed(engine: Mapping[str, Any]) -> EngineSpeed:
    slots, step_s = _whole("engine.slots", engine["slots"]), engine["step_s"]
    points = step_s if isinstance(step_s, Mapping) else {1: step_s}
    numbers = {
        _whole("engine.step_s", n, least=0): _number("engine.step_s", seconds)
        for n, seconds in points.items()
    }
    kv_tokens = engine["kv_tokens"]
    return EngineSpeed(
        step_s=step_table(numbers, slots),
        context_s=_number("engine.context_s", engine["context_s"]),
        prefill_s=_number("engine.prefill_s", engine["prefill_s"]),
        kv_tokens=float("inf") if kv_tokens is None else _number("engine.kv_tokens", kv_tokens),
        reserve_tokens=_number("engine.reserve_tokens", engine["reserve_tokens"]),
    )


def _lengths(values: Mapping[str, Any], *, seed: int) -> Lengths:
    samples: tuple[float, ...] = ()
    if values["samples"] is not None:
        samples = tuple(sorted(_number("lengths.samples", each) for each in values["samples"]))
        if not samples or samples[0] <= 0:
            raise ValueError("lengths.samples must be lengths above 0; leave other ones out")
    elif values["mixture"] is not None:
        samples = mixture([tuple(part) for part in values["mixture"]])
    longest, mean = _whole("lengths.max", values["max"]), values["mean"]
    if mean is None:
        if not samples:
            raise ValueError("lengths.mean is missing; give the mean response length in tokens")
        mean = fmean(min(each, longest) for each in samples)
    return Lengths(
        tail=_number("lengths.tail", values["tail"]),
        shared=_number("lengths.shared", values["shared"]),
        mean_tokens=_number("lengths.mean", mean),
        max_tokens=longest,
        seed=seed,
        samples=samples,
        drift=_number("lengths.drift", values["drift"]),
    )


def _acceptance(value: Any) -> tuple[float, float]:
    ends = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(ends) != 2:
        raise ValueError(
            f"replay.acceptance ({value!r}) must be one share, or those of the first and the last "
            "step, such as [0.8, 0.4]"
        )
    first, last = (_number("replay.acceptance", each) for each in ends)
    return first, last


def _outages(values: Any) -> tuple[Outage, ...]:
    outages = []
    for value in values:
        fields = _section("outages", value, dict.fromkeys(("engine", "at_s", "back_s"), REQUIRED))
        outages.append(
            Outage(
                _whole("outages.engine", fields["engine"], least=0),
                _number("outages.at_s", fields["at_s"]),
                _number("outages.back_s", fields["back_s"]),
            )
        )
    return tuple(outages)


def _cluster(plan: Any, rates: Rates, scenario: Scenario) -> Cluster:
    if plan is None:
        return Cluster(rates=rates)
    values = _section("plan", plan, PLAN_KEYS)

    def whole(key: str, default: int | None = None, *, least: int = 1) -> tuple[int, ...]:
        given = values[key] if values[key] is not None else default
        several = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        if not several:
            raise ValueError(f"plan.{key} is empty; give at least one number")
        return tuple(_whole(f"plan.{key}", each, least=least) for each in several)

    modes = values["weight_update"] or (scenario.weight_update,)
    if isinstance(modes, str):
        modes = (modes,)
    return Cluster(
        rates=rates,
        gpus=whole("gpus"),
        max_staleness=whole("max_staleness", least=0),
        slots=whole("slots", scenario.engine.num_slots),
        engine_gpus=whole("engine_gpus", rates.engine_gpus),
        tensor_parallel=whole("tensor_parallel", rates.tensor_parallel),
        context_parallel=whole("context_parallel", rates.context_parallel),
        weight_update=tuple(_choice("plan.weight_update", each, WEIGHT_UPDATES) for each in modes),
        gpu_hour=None
        if values["gpu_hour"] is None
        else _number("plan.gpu_hour", values["gpu_hour"]),
    )


def _section(name: str, values: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section with its defaults."""
    prefix = f"{name}." if name else ""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} ({values!r}) must be a section of keys; see docs/planner.md")
    for key in values:
        if key not in keys:
            known = [*keys, *KEYS] if not name else list(keys)
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"unknown key {prefix}{key}; {hint}")
    merged = {**keys, **values}
    missing = [f"{prefix}{key}" for key, value in merged.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing; docs/planner.md describes every key")
    return merged


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(choices)}")
    return str(value)


def _share(name: str, value: Any) -> float:
    number = _number(name, value)
    if number > 1:
        raise ValueError(f"{name} ({number:g}) must be from 0 to 1; correct it")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):  # YAML reads 1e-6 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise ValueError(f"{name} ({value!r}) must be a number of at least 0; correct it")
    return float(value)


def _whole(name: str, value: Any, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} ({value!r}) must be a whole number of at least {least}")
    return value
