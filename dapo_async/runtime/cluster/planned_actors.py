"""Which actors a run starts and what Ray reserves for each. Imports no Ray: dry runs print it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dapo_async.config import Config


@dataclass(frozen=True, slots=True)
class PlannedActor:
    """One actor of a run and what Ray reserves for it."""

    name: str
    num_cpus: float
    num_gpus: float
    detail: str


def planned_actors(config: Config) -> Iterator[PlannedActor]:
    """The actors of a run in starting order."""
    replay, rollout, learner, evaluation = (
        config.replay,
        config.rollout,
        config.learner,
        config.evaluation,
    )
    credits = (replay.max_staleness + 1) * replay.groups_per_step
    yield PlannedActor(
        "replay",
        0,
        0,
        f"{credits} credits = (max_staleness {replay.max_staleness} + 1) "
        f"x groups_per_step {replay.groups_per_step}",
    )
    sizes = {
        "dp": learner.data_parallel,
        "cp": learner.context_parallel,
        "tp": learner.tensor_parallel,
    }
    split = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "cp" or size > 1)
    share = f", {split}" if learner.num_ranks > 1 else ""
    detail = f"{replay.groups_per_step} groups of {replay.group_size} per step{share}"
    num_cpus = config.model.num_cpus
    for name in rank_names(config):
        yield PlannedActor(name, num_cpus, config.gpus_per_rank, detail)
    slots = "adaptive slots" if rollout.adapts_slots else f"{rollout.fixed_slots} slots"
    detail = f"{rollout.engine} engine, {slots}, {rollout.weight_update}"
    for number in range(rollout.num_workers):
        yield PlannedActor(f"rollout-{number}", num_cpus, config.gpus_per_worker, detail)
    if evaluation.during_training:
        dedicated = evaluation.engine == "dedicated"
        kind = rollout.engine if dedicated else "torch"
        yield PlannedActor(
            "evaluator",
            num_cpus if dedicated else 0,
            config.gpus_of_evaluator,
            f"{kind} engine, {rollout.fixed_slots} slots, {evaluation.num_prompts} prompts "
            f"each {evaluation.every_steps} steps, {evaluation.how}",
        )


def rank_names(config: Config) -> list[str]:
    """`learner`, or `learner-0`, `learner-1`, … with several ranks."""
    count = config.learner.num_ranks
    return ["learner"] if count == 1 else [f"learner-{rank}" for rank in range(count)]
