"""What drives a run once Ray is there: the actors, metrics, evaluations and checkpoints.

`run` builds the services once; `loop` trains with them, `shutdown` ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapo_async.algorithm.guards import RunGuards
from dapo_async.config import Config
from dapo_async.model import ModelConfig
from dapo_async.replay import Counts, TokenCounts
from dapo_async.runtime.beat import Beat
from dapo_async.runtime.checkpointer import Checkpointer
from dapo_async.runtime.cluster.reservation import ClusterRoom, Reservation
from dapo_async.runtime.evaluations import Evaluations
from dapo_async.runtime.gauges import Gauges
from dapo_async.runtime.handles.redo_log import RedoLog
from dapo_async.runtime.launch import RUN_CLASSES, ActorClasses, start_actors
from dapo_async.runtime.mirror import Uploads, mirror_of
from dapo_async.runtime.resume import ResumePoint
from dapo_async.runtime.scale_desk import ScaleDesk
from dapo_async.runtime.step_metrics import Totals, Tracker
from dapo_async.runtime.system import System
from dapo_async.runtime.throughput import NO_RATES, NO_STATE, NO_USE, Devices, Sides
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.utils.state_clock import StateClock


@dataclass(frozen=True, slots=True)
class Measured:
    """What the services have counted; the defaults are those of a run that never started."""

    totals: Totals = field(default_factory=Totals)
    train_s: float = 0.0
    counts: Mapping[str, int] = field(default_factory=lambda: Counts(0).flat())
    failures: Mapping[str, int] = field(default_factory=dict)
    token_flow: Mapping[str, int] = field(default_factory=lambda: TokenCounts().flat())
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: NO_RATES)
    idle: Mapping[str, float] = field(default_factory=lambda: {"rollout": 0.0, "learner": 0.0})
    slots: Mapping[str, float] = field(default_factory=dict)
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    use: Mapping[str, float | None] = field(default_factory=lambda: NO_USE)
    engine_state: Mapping[str, float | None] = field(default_factory=lambda: NO_STATE)
    seconds_by_state: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    weight_versions: int = 0
    handshake: Mapping[str, int] = field(default_factory=dict)
    engine_restarts: int = 0
    evaluations_skipped: int = 0
    workers: Mapping[str, int] = field(default_factory=dict)  # asked for, joined, left
    quarantined: int = 0  # prompts
    guards: Mapping[str, int] = field(default_factory=dict)  # steps by the rule that they broke
    checkpoints: Mapping[str, float] = field(default_factory=dict)


def measured_before(resume: ResumePoint) -> Measured:
    """What the earlier incarnations have counted up to the checkpoint."""
    totals = Totals(**resume.driver.get("totals", {}))
    return Measured(
        totals=totals,
        train_s=totals.train_s,
        counts=resume.counts.flat(),
        failures=resume.failures,
        guards=RunGuards.resumed("warn", resume.driver.get("guards", {})).counts,
    )


@dataclass(frozen=True, slots=True)
class Services:
    """All services of one run."""

    system: System
    tracker: Tracker
    evaluations: Evaluations
    checkpointer: Checkpointer
    before: Measured  # by earlier incarnations
    beat: Beat

    @property
    def longest_step_s(self) -> float:
        """The longest step and the longest checkpoint so far: what one more step may take."""
        return self.tracker.longest_step_s + self.checkpointer.longest_write_s

    def measured(self) -> Measured:
        tracker, publisher = self.tracker, self.system.publisher
        report, before = tracker.replay, self.before
        return Measured(
            totals=tracker.totals,
            train_s=tracker.train_s,
            counts=report.counts.flat() if report else before.counts,
            failures=dict(report.failures) if report else before.failures,
            token_flow=tracker.token_flow,
            rates=tracker.rates or NO_RATES,
            idle=tracker.idle,
            slots=tracker.slots,
            engines=tracker.engines,
            use=tracker.use,
            engine_state=tracker.engine_state,
            seconds_by_state={
                actor: tracker.timeline.totals(actor) for actor in tracker.timeline.actors
            },
            weight_versions=publisher.num_served,
            handshake=dict(publisher.outcomes),
            engine_restarts=self.system.supervisor.num_restarts,
            evaluations_skipped=self.evaluations.num_skipped,
            workers=self.system.fleet.counts,
            quarantined=tracker.num_quarantined,
            guards=dict(tracker.guards.counts),
            checkpoints=self.checkpointer.summary(),
        )


def build_services(
    config: Config,
    *,
    run_dir: RunDir,
    sinks: Sinks,
    clock: StateClock,
    incarnation: str,
    resume: ResumePoint,
    driver_state: Callable[[Tracker], dict[str, Any]],
    classes: ActorClasses = RUN_CLASSES,
    reservation: Reservation | None = None,
) -> Services:
    """Starts the actors in the background; `system.start` waits for them.

    `driver_state` returns what a resumed driver must know, for `driver.json` of a checkpoint.
    `classes`: the actors of a benchmark, which replaces one side of the loop.
    `reservation`: what they have on a joined cluster.
    """
    actors = start_actors(
        config,
        run_dir,
        incarnation=incarnation,
        resume=resume.state,
        classes=classes,
        reservation=reservation,
    )
    redo = RedoLog(resume.version, resume.state)
    system = System(
        config,
        actors,
        say=sinks.say,
        event=sinks.event,
        redo=redo,
        desk=ScaleDesk(run_dir, config),
        room=ClusterRoom(config),
    )
    before = measured_before(resume)
    gauges = Gauges(run_dir.root.name)
    beat = Beat(config, run_dir, bottleneck=lambda: sinks.newest_bottleneck)
    sinks.on_evaluation += [gauges.evaluation, beat.evaluation]

    def show(row: dict[str, Any]) -> None:
        sinks.step(row)
        sinks.guards({str(guard): count for guard, count in tracker.guards.counts.items()})
        gauges.step(row, tracker.by_engine)
        beat.step(row, tracker.by_engine, workers=system.fleet.facts)

    tracker = Tracker(
        system,
        run_dir,
        clock,
        show=show,
        totals=before.totals,
        disk=sinks.disk,
        say=sinks.say,
        guards=RunGuards.resumed(config.train.guards, resume.driver.get("guards", {})),
        first_step=resume.version,
        sides=Sides.of(config),
        devices=Devices.of(config, ModelConfig.from_folder(Path(config.model.path))),
    )
    evaluations = Evaluations(config, system=system, run_dir=run_dir, sinks=sinks)
    uploads = None
    if config.train.checkpoint_mirror:
        mirror = mirror_of(config.train.checkpoint_mirror, run_dir.root)
        uploads = Uploads(mirror, run_dir, first=resume.version, say=sinks.say)
    checkpointer = Checkpointer(
        config,
        system=system,
        tracker=tracker,
        run_dir=run_dir,
        driver_state=lambda: driver_state(tracker),
        in_evaluation=lambda: evaluations.in_flight,
        say=sinks.say,
        uploads=uploads,
    )
    return Services(system, tracker, evaluations, checkpointer, before, beat)
