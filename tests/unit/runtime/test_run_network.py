"""Which address an actor listens at, and which variables of NCCL and gloo it has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from paths import QUICKSTART

from dapo_async.config import Config, load
from dapo_async.runtime import launch
from dapo_async.runtime.cluster import network
from dapo_async.runtime.cluster.reservation import Reservation
from dapo_async.tracking.run_dir import RunDir

NODE = "127.0.0.2"


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of a run on a cluster whose node is `NODE`."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: NODE)
    return load(QUICKSTART, ["ray.address=10.0.0.1:6379"])


def named(config: Config, interface: str) -> Config:
    return replace(config, network=replace(config.network, interface=interface))


def test_actor_listens_at_its_nodes_address_or_at_the_named_interface(joined: Config) -> None:
    assert network.own_host(joined) == NODE
    assert network.own_host(load(QUICKSTART, ["ray.address=local"])) == "127.0.0.1"
    assert network.own_host(named(joined, "lo")) == "127.0.0.1"
    with pytest.raises(ValueError, match=r"network.interface \(ib7\) is no interface"):
        network.own_host(named(joined, "ib7"))


def test_named_interface_comes_before_the_users_variable(joined: Config) -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = "ib0"
    network.use_network(joined)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    network.use_network(named(joined, "lo"))
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, Any]]]:
    """The name and Ray's options of each actor that is started."""
    started: list[tuple[str, Mapping[str, Any]]] = []

    class ActorClass:
        def options(self, **options: Any) -> ActorClass:
            started.append((options["name"].partition("/")[2], options))
            return self

        def remote(self, *_: object, **__: object) -> None: ...

    monkeypatch.setattr(launch, "_ray_class", lambda _: ActorClass())
    return started


def test_variables_of_nccl_and_gloo_reach_every_actor_of_a_joined_cluster(
    joined: Config, tmp_path: Path, started: list[tuple[str, Mapping[str, Any]]]
) -> None:
    given = {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5_0", "GLOO_SOCKET_IFNAME": "eth1"}
    os.environ.update(given | {"HF_TOKEN": "secret"})

    def runtime_envs(config: Config) -> dict[str, Any]:
        started.clear()
        launch.start_actors(config, RunDir(tmp_path), incarnation="1", resume=None)
        return {name: options.get("runtime_env") for name, options in started}

    passed = {"env_vars": given}
    assert runtime_envs(joined) == {
        "replay": None,
        "learner": passed,
        "rollout-0": passed,
        "evaluator": passed,
    }
    local = replace(joined, ray=replace(joined.ray, address="local"))
    assert not any(runtime_envs(local).values())


def test_evaluator_of_a_lost_node_starts_on_another_one(
    joined: Config, tmp_path: Path, started: list[tuple[str, Mapping[str, Any]]]
) -> None:
    where = Reservation(learner_node="ab" * 28)
    actors = launch.start_actors(
        joined, RunDir(tmp_path), incarnation="1", resume=None, reservation=where
    )
    actors.start_evaluator()
    soft = {name: options["scheduling_strategy"].soft for name, options in started[-2:]}
    assert soft == {"evaluator": False, "evaluator.1": True}
