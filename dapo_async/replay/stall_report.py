"""One line on what a take waits for, for the message of a passed deadline. Called by the buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dapo_async.replay.state import Generating
from dapo_async.replay.step_stats import StepAcceptance
from dapo_async.replay.stop_rule import StopReason

NUM_NAMED = 3  # stragglers and failures that the line names one by one


@dataclass(frozen=True, slots=True)
class WaitFacts:
    """The buffer at the moment of the question; counts are groups."""

    learner_version: int
    served_version: int | None
    wanted: int  # finished groups that the take needs
    finished: int
    generating: Mapping[int, Generating]  # by group id
    in_training: int
    unpublished: int  # trained, their weights not yet served by every engine
    admissible: int
    credits_free: int
    overload: int | None  # the deadline that a take now would lose
    acceptance: StepAcceptance  # since the last take
    evicted: int  # since the last take
    failures: Mapping[str, int]  # of the whole run, by the worker's reason
    stop_reason: StopReason | None
    closed: bool


def explain(facts: WaitFacts) -> str:
    """What the take lacks, where the missing groups are, and what was lost, with counts."""
    parts = [_lack(facts), *_sources(facts), *_losses(facts)]
    return f"take at version {facts.learner_version} waits: " + "; ".join(parts)


def _lack(facts: WaitFacts) -> str:
    have = f"{facts.finished} of {facts.wanted} groups finished"
    if facts.closed:
        return f"{have}, but replay is closed"
    if facts.stop_reason is not None:
        return f"{have}, but {facts.stop_reason.reason}"
    if facts.finished >= facts.wanted and facts.overload is not None:
        return (
            f"{have}, but taking them would lose deadline {facts.overload} of a group that is "
            "still generating"
        )
    return have


def _sources(facts: WaitFacts) -> list[str]:
    """The places from which the missing groups or their credits can come."""
    parts = [_generating(facts.generating)]
    if facts.in_training:
        parts.append(f"{facts.in_training} in the learner's step")
    if facts.unpublished:
        parts.append(
            f"{facts.unpublished} credits held by trained groups whose weights are not on every "
            f"engine (served version {facts.served_version})"
        )
    if facts.admissible:
        parts.append(f"{facts.admissible} more could start, but no worker asks")
    elif facts.served_version is None:
        parts.append("no engine has attested a version yet, so none may start")
    else:
        parts.append(f"none may start ({facts.credits_free} credits free)")
    return parts


def _generating(groups: Mapping[int, Generating]) -> str:
    if not groups:
        return "none generating"
    by_deadline = sorted(groups.items(), key=lambda item: (item[1].deadline, item[0]))
    first = ", ".join(
        f"group {group_id} on {group.worker}, deadline {group.deadline}"
        for group_id, group in by_deadline[:NUM_NAMED]
    )
    num_workers = len({group.worker for group in groups.values()})
    return f"{len(groups)} generating on {num_workers} worker(s) (first: {first})"


def _losses(facts: WaitFacts) -> list[str]:
    step = facts.acceptance
    counts = [f"{step.offered} offered", f"{step.accepted} accepted"]
    counts += [f"{reason.value} {count}" for reason, count in sorted(step.rejected.items())]
    if step.refused:
        counts.append(f"{step.refused} refused")
    if facts.evicted:
        counts.append(f"{facts.evicted} evicted")
    parts = ["since the last take " + ", ".join(counts)]
    if facts.failures:
        most = sorted(facts.failures.items(), key=lambda item: -item[1])[:NUM_NAMED]
        parts.append("failed in this run: " + ", ".join(f"{count} x {why}" for why, count in most))
    return parts
