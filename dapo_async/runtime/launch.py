"""Starts the actors of a run, in the order of `planned_actors`, each on the node that suits it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray

from dapo_async.config import Config
from dapo_async.rollout.sglang import SERVER_KEY
from dapo_async.runtime.actors.evaluator import NAME as EVALUATOR
from dapo_async.runtime.actors.evaluator import EvaluatorActor
from dapo_async.runtime.actors.learner import LearnerActor
from dapo_async.runtime.actors.replay import ReplayActor
from dapo_async.runtime.actors.rollout import RolloutActor
from dapo_async.runtime.cluster.connect import SPREAD, near, node_for_learner
from dapo_async.runtime.cluster.planned_actors import rank_names
from dapo_async.runtime.handles.actors import (
    EvaluatorHandle,
    LearnerHandle,
    ReplayHandle,
    WorkerHandle,
)
from dapo_async.tracking.run_dir import RunDir

ActorClass = TypeVar("ActorClass")
Arguments = ParamSpec("Arguments")
WORKER = "rollout-"  # and its number: the name of a worker
AnyHandle = ReplayHandle | LearnerHandle | WorkerHandle | EvaluatorHandle

# Calls that the replay actor has in hand at most: of the driver, and of each worker, which waits
# for credits and for evictions at the same time and may give up groups meanwhile.
DRIVER_CALLS, CALLS_PER_WORKER = 1000, 10


@dataclass(frozen=True, slots=True)
class Actors:
    """The handles of one run."""

    replay: ReplayHandle
    ranks: Sequence[LearnerHandle]
    workers: Sequence[WorkerHandle]
    evaluator: EvaluatorHandle | None  # None: nothing is evaluated during training
    # Start the actor of one more process: of a worker, by its name and how many it has had before;
    # of the evaluator.
    start_worker: Callable[[str, int], Any]
    start_evaluator: Callable[[], Any]

    @property
    def all(self) -> list[AnyHandle]:
        evaluators = [self.evaluator] if self.evaluator is not None else []
        return [self.replay, *self.ranks, *self.workers, *evaluators]


@dataclass(frozen=True, slots=True)
class ActorClasses:
    """What is started for a rank and for a worker; a benchmark replaces one of them."""

    learner: type[LearnerActor] = LearnerActor
    rollout: type[RolloutActor] = RolloutActor


RUN_CLASSES = ActorClasses()


def start_actors(
    config: Config,
    run_dir: RunDir,
    *,
    incarnation: str,
    resume: Path | None,
    classes: ActorClasses = RUN_CLASSES,
) -> Actors:
    """Returns at once; the actors start in the background, and `ready` of each waits for it.

    `resume`: the `state/` folder of the checkpoint to resume from.
    """
    rollout, deadlines = config.rollout, config.deadlines
    names = rank_names(config)
    # Replay actor and learner pass batches through the memory of one node.
    node = node_for_learner(
        num_cpus=len(names) * config.model.num_cpus, num_gpus=len(names) * config.gpus_per_rank
    )
    start_replay = _starter(
        ReplayActor,
        strategy=near(node, reserves=False),
        max_concurrency=DRIVER_CALLS + CALLS_PER_WORKER * rollout.num_workers,
    )
    replay = start_replay(config, incarnation=incarnation, run_dir=run_dir, resume=resume)
    start_rank = _starter(
        classes.learner,
        num_cpus=config.model.num_cpus,
        num_gpus=config.gpus_per_rank,
        strategy=near(node, reserves=True),
    )
    ranks = [
        LearnerHandle(
            name,
            start_rank(
                config,
                number=number,
                name=name,
                incarnation=incarnation,
                run_dir=run_dir,
                resume=resume,
            ),
            deadlines,
        )
        for number, name in enumerate(names)
    ]
    shares_gpu = config.model.device == "shared_cuda"
    start_worker = _starter(
        classes.rollout,
        num_cpus=config.model.num_cpus,
        num_gpus=config.gpus_per_worker,
        strategy=near(node, reserves=True) if shares_gpu else SPREAD,  # the learner's GPU
    )

    def worker(name: str, start: int) -> Any:
        return start_worker(
            config,
            number=int(name.removeprefix(WORKER)),
            incarnation=incarnation,
            replay=replay,
            logs=run_dir.engines,
            outer_key=os.environ.get(SERVER_KEY, ""),
            start=start,
        )

    def evaluator() -> Any:
        return _start_evaluator(config, incarnation=incarnation, node=node, logs=run_dir.engines)

    names = [f"{WORKER}{number}" for number in range(rollout.num_workers)]
    return Actors(
        ReplayHandle("replay", replay, deadlines),
        ranks,
        [WorkerHandle(name, worker(name, 0), deadlines) for name in names],
        EvaluatorHandle(EVALUATOR, evaluator(), deadlines)
        if config.evaluation.during_training
        else None,
        worker,
        evaluator,
    )


def _start_evaluator(config: Config, *, incarnation: str, node: str, logs: Path) -> Any:
    """A dedicated evaluator reserves what it needs; any other runs on the learner's `node`, which
    writes the weights that it reads, and reserves nothing."""
    if config.evaluation.engine == "dedicated":
        start = _starter(
            EvaluatorActor,
            num_cpus=config.model.num_cpus,
            num_gpus=config.gpus_of_evaluator,
            strategy=SPREAD,
        )
    else:
        start = _starter(EvaluatorActor, strategy=near(node, reserves=False))
    return start(config, incarnation=incarnation, logs=logs)


def _starter(
    actor_class: Callable[Arguments, ActorClass],
    *,
    num_cpus: float = 0,
    num_gpus: float = 0,
    max_concurrency: int | None = None,
    strategy: Any,
) -> Callable[Arguments, Any]:
    """Starts one actor per call, with the arguments of its class; returns Ray's handle.

    `max_concurrency`: calls that the actor may have in hand; None: Ray's 1000.

    Actors are not restarted by Ray: the supervisor decides what a death means.
    """
    options: dict[str, Any] = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "scheduling_strategy": strategy,
    }
    if max_concurrency is not None:
        options["max_concurrency"] = max_concurrency
    ray_class: Any = ray.remote(actor_class)  # Ray's own types know nothing of the arguments
    start: Callable[Arguments, Any] = ray_class.options(**options).remote
    return start
