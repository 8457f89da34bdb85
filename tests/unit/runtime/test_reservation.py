"""Where a reservation lets each actor start, without a cluster."""

from __future__ import annotations

import asyncio

from paths import QUICKSTART
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from dapo_async.config import load
from dapo_async.runtime.cluster.placement import planned_gangs
from dapo_async.runtime.cluster.reservation import Reservation, reserve

NODE = "a" * 56


def reservation_of(*overrides: str) -> Reservation:
    gangs = planned_gangs(load(QUICKSTART, list(overrides), files=False))
    groups = [
        PlacementGroup(PlacementGroupID.from_random(), bundle_cache=[dict(gang.bundle)])
        if gang.bundle
        else None
        for gang in gangs
    ]
    return Reservation(gangs, groups, NODE)


def test_an_own_ray_reserves_nothing_and_makes_no_call() -> None:
    said: list[str] = []
    config = load(QUICKSTART, ["ray.address=local"], files=False)
    reservation = asyncio.run(reserve(config, say=said.append))
    assert said == []
    assert reservation.beside_learner == "DEFAULT"
    assert reservation.strategy("rollout-0") == reservation.renewed("rollout-0") == "DEFAULT"


def test_ranks_of_a_group_have_the_bundles_of_one_placement_group() -> None:
    reservation = reservation_of("learner.tensor_parallel=2", "learner.data_parallel=2")
    places = [reservation.strategy(f"learner-{rank}") for rank in range(4)]
    assert all(isinstance(place, PlacementGroupSchedulingStrategy) for place in places)
    assert [place.placement_group_bundle_index for place in places] == [0, 1, 0, 1]
    ids = [place.placement_group.id for place in places]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    beside = reservation.beside_learner
    assert isinstance(beside, NodeAffinitySchedulingStrategy)
    assert (beside.node_id, beside.soft) == (NODE, False)


def test_learner_and_engine_of_one_gpu_have_one_bundle_also_after_a_restart() -> None:
    reservation = reservation_of(
        "model.device=cuda", "model.placement=shared", "weights.transport=disk"
    )
    learner, engine = (reservation.strategy(name) for name in ("learner", "rollout-0"))
    again = reservation.renewed("rollout-0")
    assert learner.placement_group.id == engine.placement_group.id == again.placement_group.id
    assert {each.placement_group_bundle_index for each in (learner, engine, again)} == {0}


def test_actors_that_reserve_nothing_need_no_placement_group() -> None:
    reservation = reservation_of("model.num_cpus=0")
    assert reservation.strategy("rollout-0") == reservation.renewed("rollout-0") == "SPREAD"
    assert reservation.strategy("learner").node_id == NODE
