"""Starts an own Ray or joins a running cluster."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import ray
from ray._private import parameter, ray_constants
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.node import Node

from dapo_async.config import Config
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.head_watch import head_address, ray_listens
from dapo_async.runtime.cluster.own_ray import LONGEST_REASON, refusal
from dapo_async.runtime.cluster.planned_actors import planned_actors
from dapo_async.runtime.cluster.ports import ray_ports

log = logging.getLogger(__name__)
# Processes of an own Ray that a run does not use: the autoscaler's monitor, the server behind the
# dashboard and the forwarder of logs. ray.init waits for the second, and has no option for any.
UNUSED_SERVICES = ("start_monitor", "start_api_server", "start_log_monitor")
NODE_S, POLL_S = 30.0, 0.02  # an own Ray's node is there within this time; between two looks
VERSIONS = re.compile(r"Ray: (\S+) Python: (\S+)")  # in Ray's error


def connect(config: Config) -> str:
    """Starts an own Ray or joins the one at `ray.address`; returns a line about it.

    `ray.address` is LOCAL or HOST:PORT here: `address.choose` has resolved auto. Raises ValueError
    when Ray can't be started or joined. `reservation` checks whether a cluster is large enough.
    """
    actors = list(planned_actors(config))
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.ray.address == LOCAL:
        # Ray starts a process for each CPU in advance, so it gets no more than the actors use.
        cpus = max(len(actors), ceil(sum(actor.num_cpus for actor in actors)))
        gpus = _gpus(ceil(sum(actor.num_gpus for actor in actors)))
        # Without the address Ray would look for a running cluster, and then refuse num_cpus.
        try:
            with (
                shielded(),
                _without(UNUSED_SERVICES),
                _on_loopback(),
                _at_ports(config),
                _node_found_soon(),
                _processes_at_once(cpus),
            ):
                ray.init(
                    address=LOCAL, num_cpus=cpus, num_gpus=gpus, include_dashboard=False, **quiet
                )
        # Whatever Ray raises comes from this machine; a failed raylet ends with SystemExit.
        except (Exception, SystemExit) as error:
            raise ValueError(refusal(error)) from error
    else:
        try:
            ray.init(address=config.ray.address, **quiet)
        except (Exception, SystemExit) as error:
            raise ValueError(_not_joined(config.ray.address, error)) from error
    if config.ray.address == LOCAL:
        return "started a new Ray"
    free, there = ray.available_resources(), ray.cluster_resources()
    resources = ", ".join(
        f"{there.get(kind, 0.0):g} {kind}s ({free.get(kind, 0.0):g} free)"
        for kind in ("CPU", "GPU")
    )
    nodes = sum(node["Alive"] for node in ray.nodes())
    count = "1 node" if nodes == 1 else f"{nodes} nodes"
    return f"joined the Ray cluster at {config.ray.address}: {count}, {resources}"


def _gpus(needed: int) -> int:
    """All GPUs that this process may use, for workers that join later; none for a run without.

    Ray refuses more than there are.
    """
    if not needed:
        return 0
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    there = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    return max(needed, there if visible is None else min(there, len(visible)))


def _not_joined(address: str, error: BaseException) -> str:
    """One line for a cluster that answers and can't be joined."""
    reason = " ".join(str(error).split()).rstrip(".;") or repr(error)
    remedy = "start a cluster there"
    if "Version mismatch" in reason:
        remedy = _version_remedy(reason)
    return (
        f"ray.address ({address}) can't be joined: {reason[:LONGEST_REASON]}; {remedy}, or set "
        "ray.address=local"
    )


def _version_remedy(reason: str) -> str:
    """`reason` lists the cluster's versions, then those of this process."""
    found = VERSIONS.findall(reason)
    if len(found) != 2:
        return "install the Ray and Python versions of the cluster here"
    (ray_there, python_there), (ray_here, python_here) = found
    if ray_there != ray_here:
        return f"install Ray {ray_there} and Python {python_there} here, as in the cluster"
    remedy = f"use Python {python_there} here, as in the cluster"
    if python_there.split(".")[:2] == python_here.split(".")[:2]:
        remedy += ", or set RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor"
    return remedy


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that this thread starts meanwhile get no SIGTERM.

    Batch queues send it to every process, and a raylet that gets it kills the actors before the
    driver can save a checkpoint. Ray shields its processes from SIGINT in the same way.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without(services: Sequence[str]) -> Iterator[None]:
    """An own Ray starts without these `services`, which saves one to two seconds on two cores.

    They are private methods of Ray. A Ray that has no such method starts the service.
    """

    def nothing(_: Node, **__: object) -> None:
        return None

    before = {name: getattr(Node, name) for name in services if hasattr(Node, name)}
    for name in before:
        setattr(Node, name, nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """An own Ray starts at 127.0.0.1, and all its processes listen there only.

    Ray does so by itself where it forms no clusters (macOS), and has no option for it elsewhere.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _at_ports(config: Config) -> Iterator[None]:
    """An own Ray listens at its share of `network.ports`; ray.init has no options for them."""
    ports, before = ray_ports(config), parameter.RayParams

    def with_ports(**given: Any) -> Any:
        return before(**(given | ports))

    setattr(parameter, before.__name__, with_ports)
    try:
        yield
    finally:
        setattr(parameter, before.__name__, before)


@contextmanager
def _node_found_soon() -> Iterator[None]:
    """Ray asks for a node that is not there yet once a second only, which costs half a second."""
    before: Any = Node.start_ray_processes

    def start_and_wait(node: Any) -> None:
        before(node)
        gcs, end_s = node.get_gcs_client(), time.monotonic() + NODE_S
        while time.monotonic() < end_s and node.remaining_processes_alive():
            if node.node_id in {each.hex() for each in gcs.get_all_node_info()}:
                break
            time.sleep(POLL_S)

    setattr(Node, before.__name__, start_and_wait)
    try:
        yield
    finally:
        setattr(Node, before.__name__, before)


@contextmanager
def _processes_at_once(count: int) -> Iterator[None]:
    """An own Ray starts so many processes of actors at once; by itself, one per core, and each
    further one waits until another has started."""
    name = "RAY_worker_maximum_startup_concurrency"
    given = os.environ.get(name)
    os.environ.setdefault(name, str(count))
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def disconnect() -> None:
    """Ends an own Ray or leaves a joined one.

    Does nothing when Ray is gone already: shutting it down would abort this process.
    """
    if not ray.is_initialized():
        return
    if ray_listens():
        # An actor's handle that another thread's garbage collection drops while Ray shuts down
        # would end this process with exit code 1 (Ray's QuickExit).
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            ray.shutdown()
        finally:
            if was_enabled:
                gc.enable()
    else:
        log.debug("Ray at %s is gone", head_address())
