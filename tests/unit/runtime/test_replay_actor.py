"""The replay actor without Ray: its answers to workers, and the batches that it keeps on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from paths import QUICKSTART
from replay_world import make_group

from dapo_async import config as knobs
from dapo_async.replay.group_io import read_groups
from dapo_async.runtime.actors import replay as replay_actor
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import TrainBatch


@pytest.fixture
def make_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], replay_actor.ReplayActor]:
    """An actor for one group per step, by `max_staleness`, without Ray; takes wait for 0.1 s."""
    monkeypatch.setattr("ray.put", lambda group: group)
    (tmp_path / "rollouts").mkdir()
    config = knobs.load(QUICKSTART)

    def make(max_staleness: int) -> replay_actor.ReplayActor:
        small = replace(
            config.replay,
            groups_per_step=1,
            group_size=2,
            max_staleness=max_staleness,
            dynamic_sampling=False,
        )
        return replay_actor.ReplayActor(
            replace(config, replay=small, deadlines=replace(config.deadlines, work_s=0.1)),
            incarnation="first",
            run_dir=RunDir(tmp_path),
        )

    return make


@pytest.mark.parametrize("asks", [True, False])
def test_the_next_answer_to_a_worker_names_its_evicted_groups(
    make_actor: Callable[[int], replay_actor.ReplayActor], asks: bool
) -> None:
    actor = make_actor(1)

    async def scene() -> None:
        await actor.serve(0)
        first, second = (await actor.admit("rollout-0", 2)).admissions
        with pytest.raises(TimeoutError):  # both have deadline 1, and only one can be taken at 1
            await actor.take(1)
        offered = make_group(first.group_id, incarnation="first")
        if asks:
            reply = await actor.admit("rollout-0", 1)
            assert reply.evicted == (second.group_id,)
            assert await actor.offer("rollout-0", offered) == ()
        else:
            assert await actor.offer("rollout-1", offered) == ()
            assert await actor.offer("rollout-0", offered) == (second.group_id,)

    asyncio.run(scene())


@pytest.mark.parametrize("non_finite", [True, False])
def test_batch_of_a_step_that_was_not_finite_is_kept_on_disk(
    tmp_path: Path, make_actor: Callable[[int], replay_actor.ReplayActor], non_finite: bool
) -> None:
    actor = make_actor(0)

    async def step() -> TrainBatch:
        await actor.serve(0)
        (admission,) = (await actor.admit("rollout-0", 1)).admissions
        await actor.offer("rollout-0", make_group(admission.group_id, incarnation="first"))
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.trained(batch.group_ids, skipped=True, non_finite=non_finite)
        return batch

    batch = asyncio.run(step())
    kept = tmp_path / "non_finite" / "step_000000.safetensors"
    assert kept.exists() == non_finite
    if non_finite:
        (group,) = read_groups(kept)
        assert group.group_id == batch.group_ids[0]
        assert (
            group.rollouts[0].completion.token_ids.tolist()
            == batch.references[0].rollouts[0].completion.token_ids.tolist()
        )
