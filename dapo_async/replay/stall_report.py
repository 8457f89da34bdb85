"""One line on who waits for whom: facts arrive from the buffer, a sentence leaves for the message of a passed deadline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_async.replay.state import Generating
from dapo_async.replay.step_stats import StepAcceptance
from dapo_async.replay.stop_rule import StopReason

if TYPE_CHECKING:
    from dapo_async.replay.buffer import ReplayBuffer

_NAMED = 3  # stragglers named one by one; the rest is a number


@dataclass(frozen=True, slots=True)
class WaitFacts:
    """The buffer at the moment of the question; counts are groups."""

    learner_version: int
    served_version: int | None
    groups_per_step: int
    finished: int
    generating: Mapping[int, Generating]
    in_training: int
    unpublished: int  # trained, their weights not yet served by every engine
    admissible: int
    credits_free: int
    overload: int | None  # the deadline that a take now would lose
    acceptance: StepAcceptance  # since the last take
    evicted: int  # since the last take
    failures: Mapping[str, int]  # of the whole run, by what the worker said
    verdict: StopReason | None
    closed: bool


def facts_of(buffer: ReplayBuffer, learner_version: int, *, overload: int | None) -> WaitFacts:
    """`overload`: the first deadline that would be lost by taking what is finished."""
    return WaitFacts(
        learner_version=learner_version,
        served_version=buffer.served_version,
        groups_per_step=buffer.groups_per_step,
        finished=buffer.num_buffered,
        generating=buffer._generating,
        in_training=len(buffer._taken),
        unpublished=len(buffer._awaiting),
        admissible=buffer.admissible(),
        credits_free=buffer._credits.free,
        overload=overload,
        acceptance=buffer._log.step,
        evicted=len(buffer._evicted_since_take),
        failures=buffer.failures,
        verdict=buffer.verdict,
        closed=buffer.closed,
    )


def explain(facts: WaitFacts) -> str:
    """What the take lacks, then everyone who could bring it, with counts and names."""
    return f"take at version {facts.learner_version} waits: " + "; ".join(
        [_lack(facts), *_suppliers(facts), *_losses(facts)]
    )


def _lack(facts: WaitFacts) -> str:
    have = f"{facts.finished} of {facts.groups_per_step} groups finished"
    if facts.closed:
        return f"{have}, but replay is closed"
    if facts.verdict is not None:
        return f"{have}, but {facts.verdict.reason}"
    if facts.finished >= facts.groups_per_step and facts.overload is not None:
        return f"{have}, but taking them would lose deadline {facts.overload} of a group that still generates"
    return have


def _suppliers(facts: WaitFacts) -> list[str]:
    parts = []
    if facts.generating:
        slowest = sorted(facts.generating.items(), key=lambda item: (item[1].deadline, item[0]))[
            :_NAMED
        ]
        names = ", ".join(
            f"group {group_id} on {group.worker}, deadline {group.deadline}"
            for group_id, group in slowest
        )
        workers = len({group.worker for group in facts.generating.values()})
        parts.append(f"{len(facts.generating)} generating on {workers} worker(s) (first: {names})")
    else:
        parts.append("none generating")
    if facts.in_training:
        parts.append(f"{facts.in_training} in the learner's step")
    if facts.unpublished:
        parts.append(
            f"{facts.unpublished} credits held by trained groups whose weights are not on every engine (served version {facts.served_version})"
        )
    if facts.admissible:
        parts.append(f"room for {facts.admissible} more but no worker asks")
    elif facts.served_version is None:
        parts.append("no engine has attested a version yet, so none may start")
    else:
        parts.append(f"none may start ({facts.credits_free} credits free)")
    return parts


def _losses(facts: WaitFacts) -> list[str]:
    step = facts.acceptance
    reasons = "".join(
        f", {reason.value} {count}" for reason, count in sorted(step.rejected.items())
    )
    refused = f", {step.refused} refused" if step.refused else ""
    evicted = f", {facts.evicted} evicted" if facts.evicted else ""
    parts = [
        f"since the last take {step.offered} offered, {step.accepted} accepted{reasons}{refused}{evicted}"
    ]
    if facts.failures:
        parts.append(
            "failed in this run: "
            + ", ".join(
                f"{count} x {why}"
                for why, count in sorted(facts.failures.items(), key=lambda item: -item[1])[:_NAMED]
            )
        )
    return parts
