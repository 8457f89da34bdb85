"""Starts the actors of a run, in the order of `planned_actors`, each where it is reserved."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
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
from dapo_async.runtime.cluster.network import variables_for_actors
from dapo_async.runtime.cluster.planned_actors import rank_names
from dapo_async.runtime.cluster.reservation import Reservation
from dapo_async.runtime.handles.actors import (
    EvaluatorHandle,
    LearnerHandle,
    ReplayHandle,
    WorkerHandle,
)
from dapo_async.runtime.scale_plan import WORKER, number_of
from dapo_async.tracking.run_dir import RunDir

ActorClass = TypeVar("ActorClass")
Arguments = ParamSpec("Arguments")
AnyHandle = ReplayHandle | LearnerHandle | WorkerHandle | EvaluatorHandle

# Calls that the replay actor has in hand at most: of the driver, and of each worker, which waits
# for credits and for evictions at the same time and may give up groups meanwhile.
DRIVER_CALLS, CALLS_PER_WORKER = 1000, 10
MOST_JOINED = 1000  # workers for whose calls there is room; more if the run starts with more


@dataclass(frozen=True, slots=True)
class Actors:
    """The handles of one run."""

    replay: ReplayHandle
    ranks: Sequence[LearnerHandle]
    workers: list[WorkerHandle]  # changes when workers join or leave
    evaluator: EvaluatorHandle | None  # None: nothing is evaluated during training
    # Start the actor of one more process: of replay, by how many it has had before; of a rank, by
    # its number and the `state/` folder that it loads; of a worker, by its name and how many it has
    # had before; of the evaluator.
    start_replay: Callable[[int], Any]
    start_rank: Callable[[int, Path | None], Any]
    start_worker: Callable[[str, int], Any]
    start_evaluator: Callable[[], Any]
    without_room: Callable[[], Sequence[str]]  # names of actors that no node has room for
    # What follows is for workers that join and leave.
    resize: Callable[[int], None] = lambda _: None  # actors that start later are for so many
    join_worker: Callable[[str, int], WorkerHandle] | None = None  # as `start_worker`, with a place
    leave_worker: Callable[[str], None] = lambda _: None  # gives its place back

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
    reservation: Reservation | None = None,
) -> Actors:
    """Returns at once; the actors start in the background, and `ready` of each waits for it.

    `resume`: the `state/` folder of the checkpoint to resume from. `reservation`: where each actor
    starts; None: anywhere.
    """
    deadlines = config.deadlines
    reservation = reservation or Reservation()
    ranks = rank_names(config)
    workers = [f"{WORKER}{number}" for number in range(config.rollout.num_workers)]
    run, variables = run_dir.root.name, variables_for_actors(config)

    def replay(process: int) -> Any:
        start_replay = _starter(
            ReplayActor,
            f"{run}/replay" + (f".{process}" if process else ""),
            strategy=reservation.beside_learner_again if process else reservation.beside_learner,
            max_concurrency=DRIVER_CALLS
            + CALLS_PER_WORKER * max(MOST_JOINED, config.rollout.num_workers),
        )
        return start_replay(
            config, incarnation=incarnation, run_dir=run_dir, resume=resume, process=process
        )

    handle = ReplayHandle("replay", replay(0), deadlines)
    rank_starts: Counter[int] = Counter()

    def rank(number: int, state: Path | None) -> Any:
        name, start = ranks[number], rank_starts[number]
        rank_starts[number] += 1
        start_rank = _starter(
            classes.learner,
            f"{run}/{name}" + (f".{start}" if start else ""),
            num_cpus=config.model.num_cpus,
            num_gpus=config.gpus_per_rank,
            strategy=reservation.strategy(name),
            variables=variables,
        )
        return start_rank(
            config,
            number=number,
            name=name,
            incarnation=incarnation,
            run_dir=run_dir,
            resume=state,
        )

    def worker(name: str, start: int, *, joins: bool = False) -> Any:
        start_worker = _starter(
            classes.rollout,
            f"{run}/{name}" + (f".{start}" if start else ""),
            # An own Ray has CPUs for the workers of its start; further ones share these.
            num_cpus=config.model.num_cpus if name in workers or not reservation.is_empty else 0,
            num_gpus=config.gpus_per_worker,
            strategy=reservation.renewed(name)
            if start and not joins
            else reservation.strategy(name),
            variables=variables,
        )
        return start_worker(
            config,
            number=number_of(name),
            incarnation=incarnation,
            replay=handle.actor,
            logs=run_dir.engines,
            outer_key=os.environ.get(SERVER_KEY, ""),
            start=start,
        )

    def resize(num_workers: int) -> None:
        nonlocal config
        config = replace(config, rollout=replace(config.rollout, num_workers=num_workers))

    def join_worker(name: str, start: int) -> WorkerHandle:
        reservation.join(name, config)
        return WorkerHandle(name, worker(name, start, joins=True), deadlines)

    evaluator_starts = count()

    def evaluator() -> Any:
        """A dedicated one reserves what it needs. Any other is beside the learner, which writes the
        weights that it reads, and reserves nothing."""
        start, dedicated = next(evaluator_starts), config.evaluation.engine == "dedicated"
        place = reservation.renewed if start else reservation.strategy
        beside = reservation.beside_learner_again if start else reservation.beside_learner
        start_evaluator = _starter(
            EvaluatorActor,
            f"{run}/{EVALUATOR}" + (f".{start}" if start else ""),
            num_cpus=config.model.num_cpus if dedicated else 0,
            num_gpus=config.gpus_of_evaluator,
            strategy=place(EVALUATOR) if dedicated else beside,
            variables=variables,
        )
        return start_evaluator(config, incarnation=incarnation, logs=run_dir.engines)

    return Actors(
        handle,
        [LearnerHandle(name, rank(number, resume), deadlines) for number, name in enumerate(ranks)],
        [WorkerHandle(name, worker(name, 0), deadlines) for name in workers],
        EvaluatorHandle(EVALUATOR, evaluator(), deadlines)
        if config.evaluation.during_training
        else None,
        replay,
        rank,
        worker,
        evaluator,
        reservation.without_room,
        resize,
        join_worker,
        reservation.leave,
    )


def _starter(
    actor_class: Callable[Arguments, ActorClass],
    name: str,
    *,
    num_cpus: float = 0,
    num_gpus: float = 0,
    max_concurrency: int | None = None,
    strategy: Any,
    variables: Mapping[str, str] | None = None,
) -> Callable[Arguments, Any]:
    """Starts one actor, with the arguments of its class; returns Ray's handle.

    `name`: as `ray list actors` and the dashboard show it; each process of a driver has its own.

    `max_concurrency`: calls that the actor may have in hand; None: Ray's 1000. `variables`: of its
    environment, besides those of its node.

    Actors are not restarted by Ray: the supervisor decides what a death means.
    """
    options: dict[str, Any] = {
        "name": name,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "scheduling_strategy": strategy,
    }
    if max_concurrency is not None:
        options["max_concurrency"] = max_concurrency
    if variables:
        options["runtime_env"] = {"env_vars": dict(variables)}
    start: Callable[Arguments, Any] = _ray_class(actor_class).options(**options).remote
    return start


@cache
def _ray_class(actor_class: type[Any] | Callable[..., Any]) -> Any:
    """Once per class: Ray sends each one to the cluster. Its types know nothing of arguments."""
    return ray.remote(actor_class)
