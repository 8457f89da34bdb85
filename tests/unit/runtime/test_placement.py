"""The plan of resources on made-up nodes: whole groups, spread engines, refusals in one line."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from paths import QUICKSTART

from dapo_async.config import Config, load
from dapo_async.runtime.cluster.misfit import awaited, misfit
from dapo_async.runtime.cluster.placement import (
    Gang,
    Node,
    Side,
    assign,
    most_engines,
    plan_lines,
    planned_gangs,
    short_names,
)

CUDA = ["model.device=cuda", "rollout.engine=sglang"]
# The cluster of the issue: 16 ranks and 8 engines of 2 GPUs on 4 nodes of 8 GPUs.
LARGE = [
    *CUDA,
    "learner.tensor_parallel=4",
    "learner.data_parallel=4",
    "rollout.num_workers=8",
    "rollout.tensor_parallel=2",
]


def config_of(*overrides: str) -> Config:
    return load(QUICKSTART, list(overrides), files=False)


def nodes_of(*gpus: float, cpus: float = 64, **more: float) -> list[Node]:
    """Nodes that are all free."""
    totals = [{"CPU": cpus, "GPU": float(count), **more} for count in gpus]
    return [Node(f"id{n}", f"10.0.0.{n}", total, total) for n, total in enumerate(totals)]


def places(config: Config, nodes: Sequence[Node]) -> dict[str, int | None]:
    """The node of each actor."""
    gangs = planned_gangs(config)
    placed = assign(gangs, [node.free for node in nodes])
    return {name: place for gang, place in zip(gangs, placed, strict=True) for name in gang.names}


def used(gangs: Sequence[Gang], placed: Sequence[int | None]) -> Counter[tuple[int, str]]:
    """What is reserved, by node and kind."""
    totals: Counter[tuple[int, str]] = Counter()
    for gang, place in zip(gangs, placed, strict=True):
        if place is not None:
            for kind, need in gang.needs.items():
                totals[place, kind] += need  # type: ignore[assignment]
    return totals


def test_gangs_are_whole_tensor_parallel_groups_and_engines() -> None:
    gangs = planned_gangs(config_of(*LARGE))
    assert [gang.names for gang in gangs[:2]] == [
        ("learner-0", "learner-1", "learner-2", "learner-3"),
        ("learner-4", "learner-5", "learner-6", "learner-7"),
    ]
    assert (gangs[0].bundle, gangs[0].count, gangs[0].needs) == (
        {"CPU": 1.0, "GPU": 1.0},
        4,
        {"CPU": 4.0, "GPU": 4.0},
    )
    assert [gang.names for gang in gangs[4:6]] == [("rollout-0",), ("rollout-1",)]
    assert (gangs[4].bundle, gangs[4].count) == ({"CPU": 1.0, "GPU": 2.0}, 1)
    assert Counter(gang.side for gang in gangs) == {Side.LEARNER: 4, Side.ENGINE: 8}


def test_learner_fills_few_nodes_and_engines_are_spread_over_the_others() -> None:
    where = places(config_of(*LARGE), nodes_of(8, 8, 8, 8))
    learner = [where[f"learner-{rank}"] for rank in range(16)]
    assert learner == [0] * 8 + [1] * 8
    assert [where[f"rollout-{number}"] for number in range(8)] == [2, 3, 2, 3, 2, 3, 2, 3]


def test_learner_of_one_node_is_on_the_node_of_the_driver() -> None:
    where = places(config_of(*CUDA, "rollout.num_workers=2"), nodes_of(2, 8))
    assert where == {"learner": 0, "rollout-0": 1, "rollout-1": 0}
    larger = places(config_of(*CUDA, "learner.data_parallel=3"), nodes_of(2, 8))
    assert [larger[f"learner-{rank}"] for rank in range(3)] == [1, 1, 1]
    on_cpus = places(config_of("rollout.num_workers=2"), nodes_of(0, 0, cpus=2))
    assert on_cpus == {"learner": 0, "rollout-0": 1, "rollout-1": 0}


def test_a_group_of_eight_is_whole_although_the_first_node_has_six_free() -> None:
    gangs = [*CUDA, "learner.tensor_parallel=8", "rollout.num_workers=6"]
    where = places(config_of(*gangs), nodes_of(6, 8))
    assert {where[f"learner-{rank}"] for rank in range(8)} == {1}
    assert {where[f"rollout-{number}"] for number in range(6)} == {0}


def test_node_types_keep_learner_and_engines_apart() -> None:
    config = config_of(*CUDA, "learner.node_resource=train", "rollout.node_resource=serve")
    nodes = [*nodes_of(8, serve=1), *nodes_of(8, train=1), *nodes_of(8)]
    assert places(config, nodes) == {"learner": 1, "rollout-0": 0}
    assert misfit(config, nodes) is None
    assert misfit(config, nodes[:1]) == (
        "no node has the custom resource learner.node_resource names (train); start nodes with "
        "ray start --resources='{\"train\": 1}', or set ray.wait_for_nodes_s if an autoscaler or "
        "a queue adds some"
    )


def test_learner_and_engine_that_share_a_gpu_reserve_one_whole_gpu() -> None:
    config = config_of(*CUDA, "model.placement=shared", "weights.transport=disk")
    (gang,) = planned_gangs(config)
    assert gang.names == ("learner", "rollout-0")
    assert (gang.bundle, gang.count) == ({"CPU": 2.0, "GPU": 1.0}, 1)
    assert places(config, nodes_of(0, 1)) == {"learner": 1, "rollout-0": 1}


def test_each_rank_of_a_tensor_parallel_group_shares_a_bundle_with_one_engine() -> None:
    several = ["learner.tensor_parallel=4", "learner.data_parallel=2", "rollout.num_workers=8"]
    config = config_of(*CUDA, *several, "model.placement=shared", "weights.transport=disk")
    gangs = planned_gangs(config)
    assert [(gang.count, gang.needs) for gang in gangs] == 2 * [(4, {"CPU": 8.0, "GPU": 4.0})]
    ranks = [gangs[1].bundle_of(f"learner-{number}") for number in range(4, 8)]
    engines = [gangs[1].bundle_of(f"rollout-{number}") for number in range(4, 8)]
    assert ranks == engines == [0, 1, 2, 3]
    assert places(config, nodes_of(4, 4))["rollout-7"] == 1
    line = misfit(config, nodes_of(4, 3))
    assert line is not None
    assert "the run reserves 8 GPUs (learner 8), the cluster has 7" in line


def test_actors_that_reserve_nothing_fit_anywhere() -> None:
    config = config_of("model.num_cpus=0", "rollout.num_workers=3")
    names = ("learner", "rollout-0", "rollout-1", "rollout-2")
    assert places(config, nodes_of(0, cpus=0)) == dict.fromkeys(names, 0)


def test_fractions_of_a_cpu_add_up_without_rounding() -> None:
    config = config_of("model.num_cpus=0.1", "rollout.num_workers=9")
    assert misfit(config, nodes_of(0, cpus=1)) is None
    assert misfit(config_of("model.num_cpus=0.1", "rollout.num_workers=10"), nodes_of(0, cpus=1))


def test_cluster_that_is_one_gpu_short_is_refused_with_the_number_that_fits() -> None:
    line = misfit(config_of(*LARGE), nodes_of(8, 8, 8, 7))
    assert line == (
        "the run reserves 32 GPUs (learner 16, 8 engines 16), the cluster has 31; set "
        "rollout.num_workers=7, or add nodes, or set ray.wait_for_nodes_s if an autoscaler or a "
        "queue adds some"
    )
    assert misfit(config_of(*LARGE, "rollout.num_workers=7"), nodes_of(8, 8, 8, 7)) is None


def test_fragmented_cluster_is_refused_with_what_each_needs_on_one_node() -> None:
    eight = [
        *CUDA,
        "learner.tensor_parallel=8",
        "rollout.num_workers=4",
        "rollout.tensor_parallel=4",
    ]
    line = misfit(config_of(*eight), nodes_of(9, 7, 8))
    assert line == (
        "the cluster is fragmented: it has 24 GPUs and the run reserves 24 GPUs, but each "
        "tensor-parallel group of the learner needs 8 GPUs on one node, each engine needs 4 GPUs "
        "on one node, and the nodes have 9 GPUs, 7 GPUs, 8 GPUs; set rollout.num_workers=3, or "
        "add nodes, or set ray.wait_for_nodes_s if an autoscaler or a queue adds some"
    )
    assert misfit(config_of(*eight, "rollout.num_workers=3"), nodes_of(9, 7, 8)) is None


@pytest.mark.parametrize(
    ("knobs", "nodes", "line"),
    [
        (
            ["learner.tensor_parallel=8"],
            nodes_of(6, 6),
            "no node can hold one tensor-parallel group of the learner, even if it is empty: it "
            "needs 8 GPUs on one node, the largest has 6 GPUs; lower learner.tensor_parallel (8), "
            "or add larger nodes, or ",
        ),
        (
            ["rollout.tensor_parallel=16"],
            nodes_of(8, 8, 8, 8),
            "no node can hold one engine, even if it is empty: it needs 16 GPUs on one node, the "
            "largest has 8 GPUs; lower rollout.tensor_parallel (16), or add larger nodes, or ",
        ),
        (
            ["model.num_cpus=65"],
            nodes_of(8, 8),
            "no node can hold one learner rank, even if it is empty: it needs 65 CPUs on one node, "
            "the largest has 64 CPUs; lower model.num_cpus (65), or add larger nodes, or ",
        ),
        (
            ["model.num_cpus=8", "rollout.tensor_parallel=4"],
            [*nodes_of(2, cpus=64), *nodes_of(8, cpus=4), *nodes_of(1, cpus=8)],
            "no node can hold one engine, even if it is empty: it needs 8 CPUs and 4 GPUs on one "
            "node, none has that many of both; lower rollout.tensor_parallel (4) or "
            "model.num_cpus (8), or add larger nodes, or ",
        ),
    ],
)
def test_what_no_node_can_hold_is_named_with_its_knob(
    knobs: list[str], nodes: list[Node], line: str
) -> None:
    config = config_of(*CUDA, *knobs)
    found = misfit(config, nodes)
    assert found is not None
    assert found.replace("4 GPUs and 8 CPUs", "8 CPUs and 4 GPUs").startswith(line)
    assert awaited(config, nodes) == found.partition(";")[0]


def test_cpus_that_are_short_are_named_and_not_the_gpus() -> None:
    line = misfit(
        config_of(*CUDA, "model.num_cpus=8", "rollout.num_workers=7"), nodes_of(8, cpus=32)
    )
    assert line is not None
    assert line.startswith(
        "the run reserves 64 CPUs (learner 8, 7 engines 56), the cluster has 32; "
    )
    fragmented = misfit(config_of(*CUDA, "model.num_cpus=8"), nodes_of(8, 8, cpus=12, a=1))
    assert fragmented is None
    apart = misfit(
        config_of(*CUDA, "model.num_cpus=8", "rollout.num_workers=2"), nodes_of(8, 8, cpus=12)
    )
    assert apart is not None
    assert "it has 24 CPUs and the run reserves 24 CPUs" in apart


def test_plan_finds_room_whenever_there_is_some() -> None:
    """Compared with a search of all placements, on 300 small clusters."""
    random_ = random.Random(0)
    for _ in range(300):
        tp, dp = random_.choice([1, 2, 3, 4]), random_.choice([1, 2, 3])
        engines, size = random_.choice([1, 2, 3]), random_.choice([1, 2, 3])
        sizes = [random_.randint(1, 7) for _ in range(random_.randint(1, 3))]
        evaluator = random_.random() < 0.3
        learner = [Gang(Side.LEARNER, tuple(map(str, range(tp))), {"GPU": 1.0})] * dp
        gangs = [*learner, *[Gang(Side.ENGINE, ("e",), {"GPU": float(size)})] * engines]
        gangs += [Gang(Side.EVALUATOR, ("evaluator",), {"GPU": 1.0})] if evaluator else []
        capacities = [{"GPU": float(count)} for count in sizes]
        placed = assign(gangs, capacities)
        reserved = used(gangs, placed)
        assert all(share <= sizes[place] for (place, _), share in reserved.items())
        possible = any(
            all(share <= sizes[place] for (place, _), share in used(gangs, each).items())
            for each in itertools.product(range(len(sizes)), repeat=len(gangs))
        )
        assert (None not in placed) == possible, (tp, dp, engines, size, sizes, evaluator)
        assert (most_engines(gangs, capacities) >= engines) == possible


def test_a_thousand_nodes_are_planned_within_seconds() -> None:
    config = config_of(
        *CUDA,
        "learner.tensor_parallel=8",
        "learner.data_parallel=64",
        "rollout.num_workers=3000",
        "rollout.tensor_parallel=2",
    )
    assert misfit(config, nodes_of(*[8] * 814)) is None
    line = misfit(config, nodes_of(*[8] * 813))
    assert line is not None
    assert "set rollout.num_workers=2996, " in line


def test_plan_names_nodes_actors_and_what_is_missing() -> None:
    gangs, nodes = planned_gangs(config_of(*LARGE)), nodes_of(8, 8, 8)
    placed = assign(gangs, [node.free for node in nodes])
    assert list(plan_lines(gangs, nodes, placed)) == [
        "  10.0.0.0  8 of 8 GPUs free: learner-0..7, replay",
        "  10.0.0.1  8 of 8 GPUs free: learner-8..15",
        "  10.0.0.2  8 of 8 GPUs free: rollout-0..3",
        "  no room yet: rollout-4..7 (1 CPU, 2 GPUs on one node each)",
    ]


def test_plan_of_many_nodes_is_short() -> None:
    config = config_of(*CUDA, "rollout.num_workers=160", "rollout.tensor_parallel=8")
    gangs, nodes = planned_gangs(config), nodes_of(*[8] * 161)
    lines = list(plan_lines(gangs, nodes, assign(gangs, [node.free for node in nodes])))
    assert len(lines) == 17
    assert lines[-1] == "  and 145 further nodes"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["learner"], "learner"),
        (["learner-0", "learner-1", "learner-2", "replay"], "learner-0..2, replay"),
        (["rollout-0", "rollout-2", "rollout-3"], "rollout-0, rollout-2..3"),
        (["learner-9", "rollout-10"], "learner-9, rollout-10"),
    ],
)
def test_names_with_numbers_in_a_row_are_joined(names: list[str], short: str) -> None:
    assert short_names(names) == short
