"""The subjects `replay`, `publish` and `end-to-end`: the real loop with one or both sides replaced.

    replay      engines that answer at once and a learner that takes no time: what the replay actor,
                the workers and the hand-over to the learner can do
    publish     the real engines generate; per transport and mode, a learner publishes new weights
    end-to-end  a learner that sleeps with the real engines, the real learner with responses that
                are recorded or made up, and both sides: how much they slow each other

In: the config. Out: one value per step, without the first ones. Data and verifier are made up, and
every group is accepted. Each cell starts its own actors on one Ray.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from dapo_async.bench.made_up import ResponseLengths
from dapo_async.bench.replaced import answering_rollout, sleeping_learner
from dapo_async.bench.session import Cell, Figures, Rounds, run_interruptible
from dapo_async.config import Config, DataConfig, RewardConfig
from dapo_async.rollout.engine import WeightUpdate
from dapo_async.runtime.cluster.connection import RayConnection
from dapo_async.runtime.cluster.reservation import reserve
from dapo_async.runtime.launch import ActorClasses
from dapo_async.runtime.loop import return_credits, train_loop, train_step
from dapo_async.runtime.resume import START
from dapo_async.runtime.services import Services, build_services
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.terminal import Outlet, Progress
from dapo_async.utils.state_clock import StateClock

LOOP_SUBJECTS = ("replay", "publish", "end-to-end")
TRANSPORTS: tuple[str, ...] = ("broadcast", "disk")
MODES: tuple[str, ...] = get_args(WeightUpdate)
REPLACED = ("learner", "rollout", "nothing")
NUM_PROBLEMS = 2000
LAST_STEPS = 3  # with the staleness bound: steps at the end in which no group starts any more


class SilentProgress(Progress):
    """Shows nothing of a run."""

    def __init__(self, out: Outlet) -> None:
        super().__init__(out, num_steps=1, max_staleness=0)

    def say(self, line: str) -> None: ...

    def step(self, row: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class LoopBench:
    """See `BenchSubject`. The config has the address of its Ray."""

    config: Config
    subject: str
    rounds: Rounds
    lengths: ResponseLengths  # of responses that are made up
    prompt_tokens: int
    step_s: float  # of a learner that sleeps
    recorded: Path | None  # run with responses for `end-to-end`
    transports: Sequence[str] = TRANSPORTS
    modes: Sequence[str] = MODES
    replaced: Sequence[str] = REPLACED

    @property
    def cells(self) -> list[Cell]:
        """Without sweeps but that of `publish`."""
        if self.subject == "replay":
            cell: dict[str, str | int | float] = {
                "kind": "replay",
                "workers": self.config.rollout.num_workers,
            }
            return [cell | {"learner step s": self.step_s} if self.step_s else cell]
        if self.subject == "end-to-end":
            return [{"kind": "end-to-end", "replaced": side} for side in self.replaced]
        return [
            {"kind": "publish", "transport": transport, "mode": mode}
            for transport in self.transports
            for mode in self.modes
        ]

    @property
    def notes(self) -> list[str]:
        """See `BenchSubject`."""
        steps = self._num_steps
        return [f"each row is {steps} steps of {self.config.replay.groups_per_step} groups"]

    @property
    def _warm_up_steps(self) -> int:
        """The first steps find a buffer that is still filling."""
        return self.rounds.warm_up + self.config.replay.max_staleness + 1

    @property
    def _num_steps(self) -> int:
        return (
            self._warm_up_steps
            + self.rounds.repeats
            + self.config.replay.max_staleness
            + LAST_STEPS
        )

    @contextmanager
    def measuring(self) -> Iterator[Callable[[Cell], Figures]]:
        """Starts or joins Ray once."""
        with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
            connection = RayConnection(self.config)
            try:
                run_interruptible(runner, connection.open())
                yield lambda cell: run_interruptible(runner, self._measure(cell, Path(folder)))
            finally:
                run_interruptible(runner, connection.close())

    async def _measure(self, cell: Cell, folder: Path) -> Figures:
        config = self._config_of(cell, folder)
        run_dir = RunDir.create(folder / secrets.token_hex(4))
        reservation = await reserve(config, say=lambda _: None)
        with open("/dev/null", "w") as nowhere:
            progress = SilentProgress(Outlet.on(nowhere))
            services = build_services(
                config,
                run_dir=run_dir,
                sinks=Sinks(config, run_dir, progress),
                clock=StateClock("driver"),
                incarnation=secrets.token_hex(4),
                resume=START,
                driver_state=lambda tracker: {},
                classes=self._classes_of(cell, config),
                reservation=reservation,
            )
            try:
                return await self._steps(cell, services, config, run_dir)
            finally:
                services.system.kill()
                reservation.release()

    async def _steps(
        self, cell: Cell, services: Services, config: Config, run_dir: RunDir
    ) -> Figures:
        system, tracker = services.system, services.tracker
        await system.start()
        await tracker.start()
        await system.publisher.publish(
            await system.learner.snapshot(), on_served=partial(return_credits, system, ())
        )
        if cell["kind"] == "publish":
            return await system.watched(self._publishes(services, config))

        async def all_steps() -> None:
            await train_loop(
                system, tracker, services.checkpointer, services.evaluations, config=config
            )
            await system.settle()

        await system.watched(all_steps())
        rows = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
        measured = rows[self._warm_up_steps :][: self.rounds.repeats]
        groups = config.replay.groups_per_step
        figures = {
            "step_s": [row["step_s"] for row in measured],
            "groups_per_s": [groups / row["step_s"] for row in measured],
            "tokens_per_s": [row["tokens_per_s"] for row in measured],
            "publish_s": [row["publish_s"] for row in measured],
            "standstill_s": [row["publish_pause_s"] for row in measured],
        }
        if cell["kind"] == "end-to-end":
            figures |= sides_of(measured, config, replaced=str(cell["replaced"]))
        return figures

    async def _publishes(self, services: Services, config: Config) -> Figures:
        """Steps of the loop, but each publish ends before the next step begins."""
        system, tracker = services.system, services.tracker
        publish_s: list[float] = []
        standstill_s: list[float] = []
        for number in range(self._warm_up_steps + self.rounds.repeats):
            step = await train_step(system, tracker, number, config=config)
            began_s = time.perf_counter()
            await system.publisher.start(
                system.learner.snapshot(),
                on_served=partial(return_credits, system, step.group_ids),
            )
            await system.publisher.finish()
            publish_s.append(time.perf_counter() - began_s)
            standstill_s.append(system.publisher.last_pause_s)
        return {
            "publish_s": publish_s[self._warm_up_steps :],
            "standstill_s": standstill_s[self._warm_up_steps :],
        }

    def _classes_of(self, cell: Cell, config: Config) -> ActorClasses:
        groups = config.replay.groups_per_step
        answering = partial(answering_rollout, self.lengths, self.recorded)
        if cell["kind"] == "replay":
            learner = sleeping_learner(step_s=self.step_s, groups_per_step=groups)
            return ActorClasses(learner, answering())
        if cell.get("replaced") == "nothing":
            return ActorClasses()
        if cell.get("replaced") == "rollout":
            return ActorClasses(rollout=answering())
        return ActorClasses(sleeping_learner(step_s=self.step_s, groups_per_step=groups))

    def _config_of(self, cell: Cell, folder: Path) -> Config:
        """The config without data, evaluations, checkpoints and tracking."""
        config, rollout = self.config, self.config.rollout
        if cell["kind"] == "publish":
            rollout = replace(rollout, weight_update=cast(WeightUpdate, cell["mode"]))
        if cell["kind"] == "replay" or cell.get("replaced") == "rollout":
            rollout = replace(
                rollout, engine="torch", tensor_parallel=1, servers="", server_flags=""
            )
        data = str(_write_problems(folder / "problems.jsonl", digits=self.prompt_tokens))
        weights = config.weights
        if cell["kind"] == "publish":
            transport = cast(Literal["broadcast", "disk"], cell["transport"])
            weights = replace(weights, transport=transport)
        return replace(
            config,
            run_dir=str(folder),
            rollout=rollout,
            weights=weights,
            data=DataConfig(
                train=data,
                heldout=data,
                template="{problem}",
                max_prompt_tokens=config.data.max_prompt_tokens,
                contamination="off",
            ),
            reward=RewardConfig(verifier="exact"),
            replay=replace(config.replay, dynamic_sampling=False, filter=None),
            evaluation=replace(config.evaluation, num_prompts=0, every_steps=0),
            train=replace(
                config.train,
                num_steps=self._num_steps,
                checkpoint_every_steps=self._num_steps + 1,
                max_wall_s=None,
                record=False,
            ),
            tracking=replace(config.tracking, sinks="none"),
        )


def sides_of(
    rows: Sequence[Mapping[str, Any]], config: Config, *, replaced: str
) -> dict[str, list[float]]:
    """Idle shares of both sides, and the speed of each side that is not replaced while it works.

    `decode_step_s`: of the running sequences, prefills included. `decoding`: share of the time in
    which the engines decode. `train_token_s`: of a trained response token.
    """
    figures: dict[str, list[float]] = {f"idle_{side}": [] for side in ("learner", "rollout")}
    for row in rows:
        for side in ("learner", "rollout"):
            if _is_finite(row[f"idle.{side}"]):
                figures[f"idle_{side}"].append(row[f"idle.{side}"])
    if replaced != "rollout":
        slots = config.rollout.num_workers * config.rollout.fixed_slots
        known = [row for row in rows if _is_finite(row.get("slots.idle"))]
        known = [row for row in known if (row.get("tokens_per_s.generated") or 0) > 0]
        running = [slots * (1 - row["slots.idle"]) for row in known]
        figures["running"] = running
        figures["decode_step_s"] = [
            each / row["tokens_per_s.generated"] for each, row in zip(running, known, strict=True)
        ]
        figures["decoding"] = [row["engine_time.running"] for row in known]
    if replaced != "learner":
        figures["train_token_s"] = [
            (1 - row["idle.learner"]) * row["step_s"] / row["tokens"] for row in rows
        ]
    return figures


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _write_problems(path: Path, *, digits: int) -> Path:
    """Problems of random digits, most of which a tokenizer reads one by one."""
    random = np.random.default_rng(0)
    rows = [
        {"prompt": "".join(map(str, random.integers(0, 10, digits))), "answer": "0"}
        for _ in range(NUM_PROBLEMS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
