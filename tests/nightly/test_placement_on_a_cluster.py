"""Placement groups on emulated Ray nodes, which claim GPUs that this machine does not have.

Four nodes of eight GPUs. Only the placement matters, so hardly any actor is started.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paths import QUICKSTART
from run_support import TINY, command, running

from dapo_async.config import Config, load

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SMALL: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 10**8, "include_dashboard": False}
CUDA = ("model.device=cuda", "rollout.engine=sglang", "model.num_cpus=0.01")
# 16 ranks in groups of 4, and 8 engines of 2 GPUs: 32 of 32 GPUs.
LARGE = (
    *CUDA,
    "learner.tensor_parallel=4",
    "learner.data_parallel=4",
    "rollout.num_workers=8",
    "rollout.tensor_parallel=2",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray's own emulation: one raylet per node. The driver is on a node without GPUs."""
    given = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args=SMALL)
    try:
        for _ in range(4):
            started.add_node(num_gpus=8, resources={"machine": 1}, **SMALL)
        ray.init(address=started.address, log_to_driver=False)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def config_of(cluster: Any, *overrides: str) -> Config:
    return load(QUICKSTART, [f"ray.address={cluster.address}", *overrides], files=False)


def free_gpus() -> float:
    import ray

    return float(ray.available_resources().get("GPU", 0.0))


def wait_until(done: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (value := done()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)
    return value


@contextmanager
def reserved(config: Config, lines: list[str]) -> Iterator[Any]:
    from dapo_async.runtime.cluster.reservation import reserve

    all_gpus = free_gpus()
    reservation = asyncio.run(reserve(config, say=lines.append))
    try:
        yield reservation
    finally:
        reservation.release()
        wait_until(lambda: free_gpus() >= all_gpus, timeout_s=20.0, what="the release")


def refusal(config: Config) -> str:
    """The one line of a refused run; nothing stays reserved."""
    before = free_gpus()
    with pytest.raises(ValueError) as error, reserved(config, []):
        pass
    wait_until(lambda: free_gpus() == before, timeout_s=20.0, what="the GPUs of a refused run")
    assert "\n" not in str(error.value)
    return str(error.value)


def node_of(strategy: Any) -> str:
    """Where the bundle of an actor is."""
    from ray.util.placement_group import placement_group_table

    table = placement_group_table(strategy.placement_group)
    return str(table["bundles_to_node_id"][strategy.placement_group_bundle_index])


def nodes_of(reservation: Any, names: Sequence[str]) -> list[str]:
    return [node_of(reservation.strategy(name)) for name in names]


def test_no_group_of_a_full_cluster_is_split_and_engines_are_spread(cluster: Any) -> None:
    lines: list[str] = []
    with reserved(config_of(cluster, *LARGE), lines) as reservation:
        learner = nodes_of(reservation, [f"learner-{rank}" for rank in range(16)])
        groups = [set(learner[first : first + 4]) for first in range(0, 16, 4)]
        assert [len(group) for group in groups] == [1, 1, 1, 1]
        assert sorted(Counter(learner).values()) == [8, 8]
        engines = nodes_of(reservation, [f"rollout-{number}" for number in range(8)])
        assert sorted(Counter(engines).values()) == [4, 4]
        assert not set(engines) & set(learner)
        assert reservation.beside_learner.node_id == learner[0]
        assert free_gpus() == 0
    assert len(lines) == 4
    assert sum("8 of 8 GPUs free: learner-" in line for line in lines) == 2
    assert sum(line.endswith(", replay") for line in lines) == 1


def test_cluster_that_is_one_gpu_short_is_refused_in_one_line(cluster: Any) -> None:
    began_s = time.monotonic()
    line = refusal(
        config_of(cluster, *LARGE, "rollout.tensor_parallel=1", "rollout.num_workers=17")
    )
    assert time.monotonic() - began_s < 5.0
    assert line == (
        "the run reserves 33 GPUs (learner 16, 17 engines 17), the cluster has 32; "
        "set rollout.num_workers=16, or add nodes, or set ray.wait_for_nodes_s if an autoscaler "
        "or a queue adds some"
    )


def test_command_of_a_run_that_does_not_fit_ends_with_exit_code_2_and_no_folder(
    cluster: Any, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    more = ("rollout.num_workers=12", f"run_dir={root}", f"ray.address={cluster.address}")
    ended = command("train", str(QUICKSTART), *TINY, *more)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(
        "dapo-async: the run reserves 13 CPUs (learner 1, 12 engines 12), the cluster has 10; set "
        "rollout.num_workers=9, or add nodes"
    )
    assert ended.stderr.count("\n") == 1
    assert not root.exists()


def test_fragmented_cluster_is_refused_in_one_line(cluster: Any) -> None:
    line = refusal(
        config_of(
            cluster,
            *CUDA,
            "learner.tensor_parallel=5",
            "learner.data_parallel=4",
            "rollout.num_workers=3",
            "rollout.tensor_parallel=4",
        )
    )
    assert line.startswith(
        "the cluster is fragmented: it has 32 GPUs and the run reserves 32 GPUs, but each "
        "tensor-parallel group of the learner needs 5 GPUs on one node, each engine needs 4 GPUs "
        "on one node, and the nodes have 0 GPUs, 8 GPUs, 8 GPUs, 8 GPUs, 8 GPUs; "
    )


def test_gpus_that_another_job_holds_are_waited_for_with_a_deadline(cluster: Any) -> None:
    lines: list[str] = []
    with reserved(config_of(cluster, *CUDA, "rollout.num_workers=6"), []):
        config = config_of(cluster, *LARGE, "deadlines.start_s=2")
        line = refusal(config)
        assert " had no room for rollout-" in line
        assert " within 2 s (deadlines.start_s): 5 nodes have " in line
    with reserved(config_of(cluster, *LARGE), lines):
        assert not [line for line in lines if "no room" in line]


def test_a_run_holds_nothing_until_other_jobs_have_released_enough_for_all_of_it(
    cluster: Any,
) -> None:
    """Held piece by piece, engines would take what frees first, and the learner would never fit."""
    from ray.util.placement_group import placement_group, remove_placement_group

    from dapo_async.runtime.cluster.reservation import reserve

    nodes = [node.node_id for node in cluster.worker_nodes]
    others = [
        placement_group([{"GPU": gpus}], strategy="STRICT_PACK", _soft_target_node_id=node)
        for node, gpus in zip(nodes, (4, 8), strict=False)
    ]
    for group in others:
        assert group.wait(20)
    shape = ("learner.tensor_parallel=8", "learner.data_parallel=3", "rollout.tensor_parallel=2")
    config = config_of(cluster, *CUDA, *shape, "rollout.num_workers=4")
    lines: list[str] = []

    async def release_while_it_waits() -> Any:
        waiting = asyncio.create_task(reserve(config, say=lines.append))
        for group, free in ((others[1], 20), (others[0], 28)):
            await asyncio.sleep(3.0)
            assert not waiting.done()
            assert free_gpus() == free, "the run holds a part of what it needs"
            remove_placement_group(group)
        return await waiting

    reservation = asyncio.run(release_while_it_waits())
    try:
        learner = nodes_of(reservation, [f"learner-{rank}" for rank in range(24)])
        assert sorted(Counter(learner).values()) == [8, 8, 8]
        engines = nodes_of(reservation, [f"rollout-{number}" for number in range(4)])
        assert len(set(engines)) == 1
        assert free_gpus() == 0
    finally:
        reservation.release()
        wait_until(lambda: free_gpus() == 32, timeout_s=20.0, what="the release")


def test_two_runs_that_start_together_are_reserved_one_after_the_other(cluster: Any) -> None:
    from dapo_async.runtime.cluster.reservation import reserve

    config = config_of(cluster, *LARGE)

    async def run_and_end() -> float:
        reservation = await reserve(config, say=lambda _: None)
        held_s = time.monotonic()
        await asyncio.sleep(1.0)
        reservation.release()
        return held_s

    async def both() -> list[float]:
        return sorted(await asyncio.gather(run_and_end(), run_and_end()))

    first_s, second_s = asyncio.run(both())
    assert second_s - first_s > 1.0
    wait_until(lambda: free_gpus() == 32, timeout_s=20.0, what="the release")


def test_demand_for_missing_nodes_is_posted_where_an_autoscaler_sees_it(cluster: Any) -> None:
    from ray.autoscaler.v2.sdk import get_cluster_status

    from dapo_async.runtime.cluster.reservation import reserve

    config = config_of(cluster, *LARGE, "rollout.num_workers=9", "ray.wait_for_nodes_s=60")
    seen: list[Any] = []

    async def look_while_it_waits() -> None:
        waiting = asyncio.create_task(reserve(config, say=lines.append))
        while not seen and not waiting.done():
            await asyncio.sleep(0.5)
            status = await asyncio.to_thread(get_cluster_status, cluster.address)
            seen.extend(status.resource_demands.placement_group_demand)
        waiting.cancel()  # as an interrupt does
        await asyncio.gather(waiting, return_exceptions=True)

    lines: list[str] = []
    asyncio.run(look_while_it_waits())
    assert "  no room yet: rollout-8 (0.01 CPUs, 2 GPUs on one node each)" in lines
    (bundles,) = [each.bundles_by_count for each in seen]
    assert [(each.bundle, each.count) for each in bundles] == [({"CPU": 0.01, "GPU": 2.0}, 1)]
    wait_until(lambda: free_gpus() == 32, timeout_s=20.0, what="the release by an interrupt")


def test_an_engine_of_a_lost_node_starts_on_a_node_that_joins_later(cluster: Any) -> None:
    import ray

    class Engine:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    with reserved(config_of(cluster, *LARGE), []) as reservation:
        engines = [f"rollout-{number}" for number in range(8)]
        before = dict(zip(engines, nodes_of(reservation, engines), strict=True))
        lost = before["rollout-0"]
        (node,) = [each for each in cluster.worker_nodes if each.node_id == lost]
        cluster.remove_node(node)
        wait_until(
            lambda: not any(each["Alive"] for each in ray.nodes() if each["NodeID"] == lost),
            timeout_s=60.0,
            what="the loss of a node",
        )
        options = {"num_cpus": 0.01, "num_gpus": 2}
        strategy = reservation.renewed("rollout-0")
        engine: Any = ray.remote(Engine).options(**options, scheduling_strategy=strategy).remote()
        answer = engine.node.remote()
        assert ray.wait([answer], timeout=1.0)[0] == [], "there is no room yet"
        joined = cluster.add_node(num_gpus=8, resources={"machine": 1}, **SMALL)
        assert ray.get(answer, timeout=60.0) == joined.node_id
        kept = [name for name, node_id in before.items() if node_id != lost]
        assert nodes_of(reservation, kept) == [before[name] for name in kept]
        ray.kill(engine)


def test_a_dead_worker_of_a_run_is_replaced_and_the_end_gives_everything_back(
    cluster: Any, tmp_path: Path
) -> None:
    import ray

    def names() -> set[str]:
        return {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}

    more = ("train.num_steps=5000", "rollout.num_workers=2", f"ray.address={cluster.address}")
    with running(tmp_path / "my-run", *TINY, *more) as live:
        live.wait_for(r"^  \S+ +2 of 2 CPUs free: learner, (rollout-\d, )?replay$")
        live.wait_for(r"^step +3/")
        workers = {"my-run/rollout-0", "my-run/rollout-1"}
        assert names() == {"my-run/replay", "my-run/learner", *workers}
        os.kill(live.pid("rollout-1"), signal.SIGKILL)
        live.wait_for(r"rollout-1 generates again")
        assert names() - {"my-run/rollout-1"} == {
            "my-run/replay",
            "my-run/learner",
            "my-run/rollout-0",
            "my-run/rollout-1.1",
        }
        os.kill(live.driver, signal.SIGINT)
        assert live.finish(timeout_s=60.0).exit_code == 130, live.output
    cpus = ray.cluster_resources()["CPU"]
    wait_until(
        lambda: ray.available_resources()["CPU"] == cpus, timeout_s=30.0, what="all CPUs back"
    )


def test_nodes_that_join_while_the_run_waits_are_used(cluster: Any) -> None:
    """An autoscaler, or a batch queue that starts the nodes one after another."""
    from dapo_async.runtime.cluster.reservation import reserve

    # 45 GPUs: groups of 5 ranks leave 3 GPUs of a node for one engine of 3.
    shape = ("learner.tensor_parallel=5", "learner.data_parallel=5", "rollout.tensor_parallel=3")
    config = config_of(cluster, *CUDA, *shape, "rollout.num_workers=6", "ray.wait_for_nodes_s=120")
    lines: list[str] = []

    async def join_while_it_waits() -> Any:
        waiting = asyncio.create_task(reserve(config, say=lines.append))
        for _ in range(2):
            await asyncio.sleep(1.0)
            assert not waiting.done()
            cluster.add_node(num_gpus=8, **SMALL)  # in the main thread: it sets signal handlers
        return await waiting

    reservation = asyncio.run(join_while_it_waits())
    try:
        assert any("no room yet" in line for line in lines)
        learner = nodes_of(reservation, [f"learner-{rank}" for rank in range(25)])
        groups = [set(learner[first : first + 5]) for first in range(0, 25, 5)]
        assert [len(group) for group in groups] == [1] * 5
        assert len(set.union(*groups)) == 5
        engines = nodes_of(reservation, [f"rollout-{number}" for number in range(6)])
        assert len(set(engines)) >= 5
    finally:
        reservation.release()
