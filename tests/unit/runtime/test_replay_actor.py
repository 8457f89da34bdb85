"""The replay room's actor beside its buffer: what it keeps of a batch that trained badly."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from replay_world import make_group
from run_support import QUICKSTART

from dapo_async import config as knobs
from dapo_async.replay.group_io import read_groups
from dapo_async.runtime.actors import replay as replay_actor
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import TrainBatch


@pytest.mark.parametrize("non_finite", [True, False])
def test_batch_of_a_step_that_was_not_finite_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, non_finite
) -> None:
    config = knobs.load(QUICKSTART)
    small = replace(config.replay, groups_per_step=1, group_size=2, dynamic_sampling=False)
    (tmp_path / "rollouts").mkdir()
    room = replay_actor.ReplayActor(
        replace(config, replay=small), incarnation="first", run_dir=RunDir(tmp_path)
    )
    monkeypatch.setattr(replay_actor.ray, "put", lambda group: group)

    async def step() -> TrainBatch:
        await room.serve(0)
        (admission,) = await room.admit("rollout-0", 1)
        await room.offer(make_group(admission.group_id, incarnation="first"))
        batch = await room.take(0)
        assert isinstance(batch, TrainBatch)
        await room.trained(batch.group_ids, skipped=True, non_finite=non_finite)
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
