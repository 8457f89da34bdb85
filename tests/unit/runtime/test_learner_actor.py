"""The learner actor beside its step: a copy has one version on every rank."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.learner.batch_plan import RankShare
from dapo_async.runtime.actors.learner import LearnerActor
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import StepMetrics, TrainBatch

SHARE = RankShare((), ((),), 1.0)
Fetched = tuple[RankShare, list[NDArray[np.uint8]]]


class Rank:
    """Minibatches that only count."""

    version, num_updates = 5, 0

    def minibatch(self, *_: Any, **__: Any) -> StepMetrics:
        self.num_updates += 1
        return StepMetrics()

    def end_step(self) -> None:
        self.version += 1

    def capture_state(self) -> int:
        return self.version


def actor(number: int, folder: Path) -> LearnerActor:
    made = LearnerActor(
        knobs.load(QUICKSTART),
        number=number,
        name=f"learner-{number}",
        incarnation="first",
        run_dir=RunDir(folder),
    )
    made._rank = Rank()  # type: ignore[assignment]
    return made


def batch_of(groups: Any) -> TrainBatch:
    return TrainBatch(
        learner_version=5,
        group_ids=(0,),
        oldest_versions=(5,),
        references=(groups,),
    )


async def frozen_in_a_step(folder: Path) -> list[int]:
    """Versions of the states that two ranks copy, while only one of them has its groups."""
    ranks, arrived = (
        [actor(number, folder) for number in range(2)],
        [asyncio.Event(), asyncio.Event()],
    )

    async def groups(number: int) -> Fetched:
        await arrived[number].wait()
        return SHARE, []

    steps = [
        asyncio.create_task(rank.minibatch(batch_of(groups(number))))
        for number, rank in enumerate(ranks)
    ]
    arrived[0].set()
    await asyncio.sleep(0.05)
    frozen = [asyncio.create_task(rank.capture_state()) for rank in ranks]
    await asyncio.sleep(0.05)
    arrived[1].set()
    await asyncio.gather(*steps)
    return await asyncio.gather(*frozen)


def test_copies_have_one_version_though_one_rank_still_waits_for_its_groups(
    tmp_path: Path,
) -> None:
    assert asyncio.run(frozen_in_a_step(tmp_path)) == [6, 6]


def test_a_rank_tells_where_its_step_is_while_it_lasts(tmp_path: Path) -> None:
    rank, begun, over = actor(0, tmp_path), threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> StepMetrics:
        begun.set()
        over.wait(60.0)
        return StepMetrics()

    async def places() -> list[str | None]:
        async def groups() -> Fetched:
            return SHARE, []

        rank._rank.minibatch = hang  # type: ignore[method-assign]
        before, step = (
            await rank.ping(),
            asyncio.create_task(rank.minibatch(batch_of(groups()))),
        )
        await asyncio.to_thread(begun.wait, 20.0)
        during = await rank.ping()
        over.set()
        await step
        return [before, during, await rank.ping()]

    before, during, after = asyncio.run(places())
    assert (before, after) == (None, None)
    assert during is not None
    place, _, innermost = during.partition(" > ")
    assert place.startswith("runtime/actors/learner.py:")
    assert place.endswith(" _minibatch")
    assert innermost == "wait"
