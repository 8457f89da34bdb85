"""What actors report to the driver once per step: plain numbers and spans of their state clocks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import ray

from dapo_async.model.peak import Peak
from dapo_async.replay import Counts, StepAcceptance, TokenCounts
from dapo_async.rollout import EngineWork, KVUse, SlotUse, TimeUse
from dapo_async.tracking.group_log import FlowPoint
from dapo_async.utils.state_clock import Span


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """The process of an actor, for a user who wants to look at it."""

    name: str
    pid: int
    node: str  # IP address
    node_id: str  # Ray's
    detail: str = ""

    @classmethod
    def own(cls, name: str, detail: str) -> Self:
        """The process of the calling actor."""
        return cls(
            name,
            os.getpid(),
            ray.util.get_node_ip_address(),
            ray.get_runtime_context().get_node_id(),
            detail,
        )


@dataclass(frozen=True, slots=True)
class ReplayReport:
    spans: tuple[Span, ...]
    counts: Counts
    # By learner version of the take; the newest few, since a report may come after the next take.
    acceptance: Mapping[int, StepAcceptance]
    first_admission_s: float | None  # seconds since the epoch
    buffered: int
    generating: int
    credits_held: int
    served_version: int | None
    failures: Mapping[str, int]
    tokens: TokenCounts = field(default_factory=TokenCounts)
    offered: int = 0  # groups that the filters judged, in this incarnation
    accepted: int = 0  # groups of them that the filters accepted
    quarantined: tuple[str, ...] = ()  # a line per prompt
    unwritten: Mapping[str, int] = field(default_factory=dict)  # files the disk refused, by kind
    disk_fault: str | None = None  # the newest reason
    flow: tuple[FlowPoint, ...] = ()  # of arrows in the timeline, each once


@dataclass(frozen=True, slots=True)
class WorkerReport:
    spans: tuple[Span, ...]
    slot_use: SlotUse
    version: int
    tokens: TokenCounts = field(default_factory=TokenCounts)
    time_use: TimeUse = field(default_factory=TimeUse)
    work: EngineWork = field(default_factory=EngineWork)
    kv_use: KVUse = field(default_factory=KVUse)
    peak: Peak | None = None  # of one of its devices; None: as the learner's
    start: int = 0  # how many processes the worker has had before


@dataclass(frozen=True, slots=True)
class LearnerReport:
    spans: tuple[Span, ...]
    peak: Peak | None = None  # of its device; None: as the first rank's
