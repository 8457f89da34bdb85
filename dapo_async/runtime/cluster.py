"""An own Ray on this machine, or a running cluster; and what a run would start there."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from dapo_async.config import Config
from dapo_async.runtime.environment import LOCAL
from dapo_async.runtime.learner_port import rank_names

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class PlannedActor:
    """One actor of a run and what Ray reserves for it."""

    name: str
    num_cpus: float
    num_gpus: float
    detail: str


def planned_actors(config: Config) -> Iterator[PlannedActor]:
    """What a run starts, in starting order; `--dry-run` prints it."""
    replay, rollout, learner = config.replay, config.rollout, config.learner
    credits = (replay.max_staleness + 1) * replay.groups_per_step
    yield PlannedActor("replay", 0, 0, f"{credits} credits = (max_staleness {replay.max_staleness} + 1) x groups_per_step {replay.groups_per_step}")
    dp, tp = learner.data_parallel, learner.tensor_parallel
    share = f", dp {dp} x tp {tp}" if dp * tp > 1 else ""
    for name in rank_names(config):
        yield PlannedActor(name, learner.num_cpus, learner.num_gpus, f"{replay.groups_per_step} groups of {replay.group_size} per step{share}")
    for number in range(rollout.num_workers):
        yield PlannedActor(
            f"rollout-{number}", rollout.num_cpus, rollout.num_gpus, f"torch engine, {rollout.num_slots} slots, {rollout.weight_update}"
        )
    evaluation = config.evaluation
    if has_evaluator(config):
        dedicated = evaluation.engine == "dedicated"
        detail = f"torch engine, {rollout.num_slots} slots, {evaluation.num_prompts} prompts each {evaluation.every_steps} steps"
        yield PlannedActor("evaluator", evaluation.num_cpus if dedicated else 0, evaluation.num_gpus if dedicated else 0, detail)


def has_evaluator(config: Config) -> bool:
    """Whether the run has an evaluator of its own."""
    return config.evaluation.during_training and config.evaluation.engine != "lease"


def connect(config: Config) -> None:
    """Starts an own Ray or joins the one at `ray.address`. Raises ValueError when it cannot be joined or is too small."""
    actors = list(planned_actors(config))
    needed = sum(actor.num_cpus for actor in actors)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.ray.address == LOCAL:
        cpus = config.ray.num_cpus or max(os.cpu_count() or 1, int(needed + 0.999))
        gpus = int(sum(actor.num_gpus for actor in actors) + 0.999)
        ray.init(address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, **quiet)
    else:
        try:
            ray.init(address=config.ray.address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            first = str(error).strip().split("\n")[0]
            raise ValueError(
                f"ray.address ({config.ray.address}) can't be joined: {first}; start a cluster there, or set ray.address=local"
            ) from error
    resources = ray.cluster_resources()
    for kind, knob in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        shares = {actor.name: getattr(actor, knob) for actor in actors}
        wanted, there = sum(shares.values()), resources.get(kind, 0.0)
        if there < wanted:
            listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ValueError(
                f"the run reserves {wanted:g} {kind}s ({listed}), the cluster has {there:g}; lower rollout.num_workers or {knob}, or add nodes"
            )


def disconnect() -> None:
    """Ends an own Ray or leaves a joined one. A Ray that is gone already is left alone: shutting it down would abort this process."""
    if not ray.is_initialized():
        return
    host, port = ray.get_runtime_context().gcs_address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        log.debug("Ray at %s:%s is gone", host, port)
    else:
        ray.shutdown()


def own_host(config: Config) -> str:
    """The interface that the calling actor binds its servers to: loopback for an own Ray, else its node's address in the cluster."""
    return LOOPBACK if config.ray.address == LOCAL else str(ray.util.get_node_ip_address())
