"""Why a cluster can't hold a run, in one line, and which knob helps. Imports no Ray.

In: the config and the nodes. `gang_wait` refuses a run with it, or says which nodes it waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from dapo_async.config import Config
from dapo_async.runtime.cluster.placement import (
    KINDS,
    ROUNDING,
    Gang,
    Node,
    Side,
    assign,
    gangs_of,
    most_engines,
    planned_gangs,
    room_for,
)

WAIT_KNOB = "ray.wait_for_nodes_s"
WAIT = f"set {WAIT_KNOB} if an autoscaler or a queue adds some"


def misfit(config: Config, nodes: Sequence[Node]) -> str | None:
    """Why the cluster can't hold the run even when all of it is free, in one line; else None."""
    found = _fault(config, nodes)
    return None if found is None else f"{found[0]}; {found[1]}"


def awaited(config: Config, nodes: Sequence[Node]) -> str | None:
    """The same without a remedy, for a run that waits for nodes."""
    found = _fault(config, nodes)
    return None if found is None else found[0]


def _fault(config: Config, nodes: Sequence[Node]) -> tuple[str, str] | None:
    """What is wrong, and the remedy."""
    gangs, totals = planned_gangs(config), [node.total for node in nodes]
    if None not in assign(gangs, totals):
        return None
    for knob, resource in _node_resources(config):
        if not any(total.get(resource) for total in totals):
            return (
                f"no node has the custom resource {knob} names ({resource})",
                f"start nodes with ray start --resources='{{\"{resource}\": 1}}', or {WAIT}",
            )
    if (found := _too_large(config, gangs, totals)) is not None:
        return found
    most = most_engines(gangs, totals)
    fewer = (
        f"set rollout.num_workers={most}"
        if most
        else "lower learner.tensor_parallel or learner.data_parallel"
    )
    remedy = f"{fewer}, or add nodes, or {WAIT}"
    for kind in KINDS:
        wanted = sum(gang.needs.get(kind, 0.0) for gang in gangs)
        there = sum(total.get(kind, 0.0) for total in totals)
        if there + ROUNDING < wanted:
            return (
                f"the run reserves {wanted:g} {kind}s ({_sides(gangs, kind)}), the cluster has "
                f"{there:g}"
            ), remedy
    return _fragmented(gangs, nodes), remedy


def _too_large(
    config: Config, gangs: Sequence[Gang], totals: Sequence[Mapping[str, float]]
) -> tuple[str, str] | None:
    """A gang that is too large for every node, even if that is empty; else None."""
    for side in Side:
        for gang in gangs_of(gangs, side)[:1]:
            if any(room_for(total, gang.needs) for total in totals):
                continue
            marks = gang.bundle.keys() - set(KINDS)
            able = [total for total in totals if all(total.get(mark) for mark in marks)]
            largest = {
                kind: max((total.get(kind, 0.0) for total in able), default=0.0) for kind in KINDS
            }
            short = [kind for kind in KINDS if largest[kind] + ROUNDING < gang.needs.get(kind, 0.0)]
            kinds = short[:1] or [kind for kind in KINDS if gang.needs.get(kind)]
            has = (
                f"the largest has {_amounts(largest, kinds)}"
                if short
                else "none has that many of both"
            )
            return (
                f"no node can hold one {_gang_name(gang)}, even if it is empty: it needs "
                f"{_amounts(gang.needs, kinds)} on one node, {has}"
            ), f"lower {' or '.join(_sizes(config, gang, kinds))}, or add larger nodes, or {WAIT}"
    return None


def _sizes(config: Config, gang: Gang, kinds: Sequence[str]) -> Iterator[str]:
    """The knobs that make a gang smaller, with their values."""
    learner, rollout = config.learner.tensor_parallel, config.rollout.tensor_parallel
    if gang.side is Side.LEARNER and (learner > 1 or "GPU" in kinds):
        yield f"learner.tensor_parallel ({learner})"
    if gang.side is not Side.LEARNER and "GPU" in kinds:
        yield f"rollout.tensor_parallel ({rollout})"
    if "CPU" in kinds:
        yield f"model.num_cpus ({config.model.num_cpus:g})"


def _node_resources(config: Config) -> Iterator[tuple[str, str]]:
    for knob, resource in (
        ("learner.node_resource", config.learner.node_resource),
        ("rollout.node_resource", config.rollout.node_resource),
    ):
        if resource:
            yield knob, resource


def _fragmented(gangs: Sequence[Gang], nodes: Sequence[Node]) -> str:
    """The cluster has enough of everything, and no node has enough of it for some gang."""
    totals = [node.total for node in nodes]
    used = [kind for kind in KINDS if any(gang.needs.get(kind) for gang in gangs)]
    # The kind that does not fit by itself; else it is how they come together on the nodes.
    alone = [kind for kind in used if None in assign(_only(gangs, kind), totals)]
    kinds = alone[:1] or used
    wanted = {kind: sum(gang.needs.get(kind, 0.0) for gang in gangs) for kind in kinds}
    there = {kind: sum(total.get(kind, 0.0) for total in totals) for kind in kinds}
    marks = {mark for gang in gangs for mark in gang.bundle if mark not in KINDS}
    shown = ", ".join(
        _amounts(node.total, kinds)
        + "".join(f" ({mark})" for mark in sorted(marks & node.total.keys()))
        for node in nodes
    )
    first: dict[Side, Gang] = {}
    for gang in gangs:
        first.setdefault(gang.side, gang)
    each = ", ".join(
        f"each {_gang_name(gang)} needs {_amounts(gang.needs, kinds)} on one node"
        for gang in first.values()
    )
    return (
        f"the cluster is fragmented: it has {_amounts(there, kinds)} and the run reserves "
        f"{_amounts(wanted, kinds)}, but {each}, and the nodes have {shown}"
    )


def _only(gangs: Sequence[Gang], kind: str) -> list[Gang]:
    """The same gangs, reserving nothing of other kinds."""
    return [
        replace(
            gang,
            bundle={
                name: share
                for name, share in gang.bundle.items()
                if name == kind or name not in KINDS
            },
        )
        for gang in gangs
    ]


def _amounts(resources: Mapping[str, float], kinds: Sequence[str]) -> str:
    return " and ".join(f"{resources.get(kind, 0.0):g} {kind}s" for kind in kinds)


def _gang_name(gang: Gang) -> str:
    """One of the gangs of a side, in a sentence."""
    if gang.per_bundle > 1:
        many = gang.count > 1
        return "tensor-parallel group with its engines" if many else "pair of learner and engine"
    if gang.side is Side.LEARNER:
        many = len(gang.names) > 1
        return "tensor-parallel group of the learner" if many else "learner rank"
    return gang.side.value


def _sides(gangs: Sequence[Gang], kind: str) -> str:
    """What each side reserves of `kind`: learner 16, 8 engines 16."""
    parts = []
    for side, members in groupby(gangs, key=lambda gang: gang.side):
        each = list(members)
        share = sum(gang.needs.get(kind, 0.0) for gang in each)
        many = side is Side.ENGINE and len(each) > 1
        parts.append(f"{len(each)} engines {share:g}" if many else f"{side.value} {share:g}")
    return ", ".join(parts)
