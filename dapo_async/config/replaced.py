"""Knobs and values of earlier versions: each gives one line that names what replaced it.

`yaml_io` looks up every key of a config file and of the overrides here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALWAYS = "was removed: it is always {}"
_USE = "was replaced: set {}"

# Old dotted name → what to say about it.
REPLACED: Mapping[str, str] = {
    "data.source_key": _ALWAYS.format("the column data_source, or the column of the preset"),
    "data.deduplicate": "was removed: some presets remove repeated problems; "
    "set data.train=PRESET=PATH to use such a preset",
    "data.language": _USE.format(
        "the preset dapo_math_17k_en or dapo_math_17k_zh, as in data.train=dapo_math_17k_en=PATH"
    ),
    "data.check_against": _USE.format("data.contamination=MODE,SOURCE,..."),
    "reward.by_source": _USE.format("reward.verifier=DEFAULT,SOURCE=VERIFIER"),
    "reward.timeout_s": _ALWAYS.format("5"),
    "algorithm.correction_floor": _USE.format("algorithm.correction_band=[FLOOR,CAP]"),
    "algorithm.correction_cap": _USE.format("algorithm.correction_band=[FLOOR,CAP]"),
    "algorithm.second_moment": _USE.format("algorithm.correction=m2po, with the limit 0.04"),
    "reward.shuffle": _USE.format(
        "reward.verifier=MODULE:FUNCTION, such as the one in docs/rewards.md"
    ),
    "rollout.num_cpus": _USE.format("model.num_cpus, for ranks and workers"),
    "rollout.num_gpus": _USE.format("model.device=cuda and rollout.tensor_parallel"),
    "rollout.max_restarts": _ALWAYS.format("3"),
    "replay.patience": _ALWAYS.format("32 x replay.groups_per_step"),
    "replay.max_rejected_in_a_row": _ALWAYS.format("32 x replay.groups_per_step"),
    "replay.lockstep": _USE.format("replay.admission=lockstep; for false, set nothing"),
    "learner.num_cpus": _USE.format("model.num_cpus, for ranks and workers"),
    "learner.num_gpus": _USE.format("model.device=cuda"),
    "learner.beta1": _ALWAYS.format("0.9"),
    "learner.beta2": _ALWAYS.format("0.999"),
    "learner.recompute_layers": _USE.format("learner.recompute=all"),
    "learner.max_skipped_steps": _ALWAYS.format("3"),
    "weights.bucket_bytes": _ALWAYS.format("64 MiB"),
    "weights.probe_tokens": _ALWAYS.format("16"),
    "weights.probe_tolerance": "was removed: model.dtype sets it",
    "evaluation.num_cpus": _USE.format("model.num_cpus"),
    "evaluation.num_gpus": _USE.format("model.device=cuda and evaluation.engine=dedicated"),
    "train.sample_groups": "was removed: it is always 2; set train.record=true for all groups",
    "tracking.experiment": "was replaced: set the environment variable MLFLOW_EXPERIMENT_NAME",
    "deadlines.take_s": _USE.format("deadlines.work_s"),
    "deadlines.step_s": _USE.format("deadlines.work_s"),
    "deadlines.evaluate_s": _USE.format("deadlines.work_s"),
    "deadlines.save_s": _USE.format("deadlines.work_s"),
    "deadlines.publish_s": _USE.format("deadlines.answer_s"),
    "deadlines.silence_s": _USE.format("deadlines.answer_s"),
    "deadlines.stop_s": _ALWAYS.format("10 s"),
    "deadlines.tracking_s": _ALWAYS.format("10 s"),
    "ray.num_cpus": "was removed: a Ray that the run starts has all CPUs of this machine, "
    "or more if the actors reserve more",
}

# (name, old value) → what to say about it.
REPLACED_VALUES: Mapping[tuple[str, str], str] = {
    ("tracking.mlflow", "None"): _USE.format("tracking.sinks=none to turn MLflow off"),
    ("model.device", "shared_cuda"): _USE.format("model.device=cuda and model.placement=shared"),
    ("evaluation.engine", "lease"): _USE.format("evaluation.engine=snapshot or dedicated"),
}


def refuse_replaced(tree: Mapping[str, Any]) -> None:
    """Raises ValueError for the first key of the nested `tree`, or value, that was replaced."""
    for name, value in _leaves(tree):
        if name in REPLACED:
            raise ValueError(f"{name} {REPLACED[name]}")
        if (name, str(value)) in REPLACED_VALUES:
            shown = "null" if value is None else value
            raise ValueError(f"{name}={shown} {REPLACED_VALUES[name, str(value)]}")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
