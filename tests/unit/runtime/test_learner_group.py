"""The ranks as one learner: what each one gets, what is summed, and which rank an error names."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from fake_actors import fake_actor
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.config import DeadlinesConfig
from dapo_async.runtime.handles import learner_group
from dapo_async.runtime.handles.actors import LearnerHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.runtime.handles.learner_group import LearnerGroup
from dapo_async.types import StepMetrics, TrainBatch

BATCH = TrainBatch(
    learner_version=4,
    group_ids=(10, 11, 12),
    oldest_versions=(3, 3, 4),
    references=("the only share",),
)
BROKEN = "failed in minibatch: RuntimeError('Connection closed by peer')"


class Rank:
    """A rank without a process: `minibatch` and `ping` answer, raise, or never end."""

    def __init__(self, name: str, *, minibatch: Any = None, ping: Any = None) -> None:
        self.name, self._minibatch_answer, self._ping_answer = name, minibatch, ping
        self.asked: list[tuple[Any, ...]] = []

    async def minibatch(self, *args: Any) -> Any:
        self.asked.append(args)
        return await answer(self._minibatch_answer)

    async def ping(self) -> Any:
        return await answer(self._ping_answer)

    def handle(self, deadlines: DeadlinesConfig) -> LearnerHandle:
        return LearnerHandle(
            self.name, fake_actor(minibatch=self.minibatch, ping=self.ping), deadlines
        )


async def answer(given: Any) -> Any:
    if given is asyncio.Event:
        await asyncio.Event().wait()
    if isinstance(given, Exception):
        raise given
    return given


def learner_of(*ranks: Rank, dp: int = 1, cp: int = 1, tp: int = 1) -> LearnerGroup:
    config = knobs.load(
        QUICKSTART,
        [
            f"learner.data_parallel={dp}",
            f"learner.context_parallel={cp}",
            f"learner.tensor_parallel={tp}",
            "deadlines.work_s=0.1",
        ],
    )
    return LearnerGroup([rank.handle(config.deadlines) for rank in ranks], config)


def spoken(learner: LearnerGroup) -> Exception:
    with pytest.raises((ActorDied, ActorFailed, TimeoutError)) as caught:
        asyncio.run(learner.minibatch(BATCH))
    return caught.value


@pytest.mark.parametrize("shared_by", [{"tp": 2}, {"cp": 2}])
def test_ranks_that_share_a_batch_get_the_same_share_and_count_once(
    shared_by: dict[str, int],
) -> None:
    ranks = [
        Rank(
            f"learner-{number}",
            minibatch=StepMetrics(
                {"loss": (number, 1.0)}, {"top": number}, {"tokens": 10.0**number}
            ),
        )
        for number in range(4)
    ]
    shared = replace(BATCH, references=("first share", "second share"))
    metrics = asyncio.run(learner_of(*ranks, dp=2, **shared_by).minibatch(shared))
    parts = [part for rank in ranks for ((part,),) in [rank.asked]]
    assert [part.references for part in parts] == [
        ("first share",),
        ("first share",),
        ("second share",),
        ("second share",),
    ]
    assert all(part.group_ids == (10, 11, 12) for part in parts)
    assert metrics == StepMetrics({"loss": (2.0, 2.0)}, {"top": 2.0}, {"tokens": 101.0})


def test_rank_that_hangs_is_named_though_another_is_heard_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learner_group, "PING_S", 0.1)
    late = learner_of(
        Rank("learner-0", minibatch=asyncio.Event),
        Rank("learner-1", minibatch=asyncio.Event, ping=asyncio.Event),
        tp=2,
    )
    assert (
        str(spoken(late)) == "learner-1 did not answer for 0.1 s; "
        "before that, the driver waited 0.1 s for learner-0 to finish minibatch"
    )
    failed = learner_of(
        Rank("learner-0", minibatch=ActorFailed(f"learner-0 {BROKEN}")),
        Rank("learner-1", minibatch=asyncio.Event, ping=asyncio.Event),
        tp=2,
    )
    assert (
        str(spoken(failed))
        == f"learner-1 did not answer for 0.1 s; before that, learner-0 {BROKEN}"
    )


def test_ranks_are_stuck_when_one_of_several_fails_in_a_minibatch() -> None:
    broken = ActorFailed("learner-0 failed in minibatch: KeyError()")
    waiting = Rank("learner-1", minibatch=asyncio.Event)
    several = learner_of(Rank("learner-0", minibatch=broken), waiting, tp=2)
    alone = learner_of(Rank("learner-0", minibatch=broken))
    for learner in (several, alone):
        assert "KeyError" in str(spoken(learner))
    assert (several.is_stuck, alone.is_stuck) == (True, False)


def test_rank_that_died_is_named_though_another_is_heard_first() -> None:
    death = ActorDied("learner-1", "died while the driver waited for ping: killed")
    error = spoken(
        learner_of(
            Rank("learner-0", minibatch=ActorFailed(f"learner-0 {BROKEN}")),
            Rank("learner-1", minibatch=asyncio.Event, ping=death),
            tp=2,
        )
    )
    assert error is death


def test_ranks_that_are_still_in_their_step_say_where() -> None:
    waits, hangs = "model/parallel.py:127 _all_gather", "model/layers.py:90 forward > linear"
    late = learner_of(
        Rank("learner-0", minibatch=asyncio.Event, ping=waits),
        Rank("learner-1", minibatch=asyncio.Event, ping=hangs),
        tp=2,
    )
    told = f"still in their step: learner-0 in {waits}, learner-1 in {hangs}"
    assert str(spoken(late)) == f"the driver waited 0.1 s for learner-0 to finish minibatch; {told}"
    failed = learner_of(
        Rank("learner-0", minibatch=ActorFailed(f"learner-0 {BROKEN}")),
        Rank("learner-1", minibatch=asyncio.Event, ping=hangs),
        tp=2,
    )
    error = spoken(failed)
    assert (type(error), str(error)) == (
        ActorFailed,
        f"learner-0 {BROKEN}; still in their step: learner-1 in {hangs}",
    )


def test_without_a_rank_that_died_or_hangs_the_first_error_is_told_as_it_is() -> None:
    error = spoken(
        learner_of(
            Rank("learner-0", minibatch=ActorFailed(f"learner-0 {BROKEN}")),
            Rank("learner-1", minibatch=asyncio.Event),
            tp=2,
        )
    )
    assert str(error) == f"learner-0 {BROKEN}"
    assert (
        str(spoken(learner_of(Rank("learner", minibatch=asyncio.Event))))
        == "the driver waited 0.1 s for learner to finish minibatch"
    )
