"""The state with which a replay actor starts: of a new run, of a checkpoint, or of the journal.

In: the options of the buffer, and where the state lies. Out: a `ReplayStart`. Only the replay actor
calls it.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dapo_async.replay import StepAcceptance, TokenOutcome
from dapo_async.replay.group_io import unpack_group
from dapo_async.replay.journal import Journal
from dapo_async.replay.journaled import JournaledBuffer
from dapo_async.replay.quarantine import VerifierFailures
from dapo_async.replay.worker_book import WorkerBook
from dapo_async.runtime.actors.replay_files import Payload, read_state
from dapo_async.types import GroupFacts, TrainBatch

KEPT_ACCEPTANCES = 4  # steps whose reports may still be on their way


@dataclass(slots=True)
class ReplayStart:
    """Everything of a replay actor that outlives its process."""

    buffer: JournaledBuffer
    book: WorkerBook
    # Batches that were taken and are not booked, the next one to be trained first. Their references
    # are payloads.
    untrained: deque[TrainBatch] = field(default_factory=deque)
    # By group id: the step of groups that the learner has trained since its newest checkpoint.
    kept: dict[int, int] = field(default_factory=dict)
    # By group id: tokens of partial completions, which are gone.
    partial_tokens: Counter[int] = field(default_factory=Counter)
    # By worker: groups that were evicted while it generated them.
    evicted: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    acceptance: dict[int, StepAcceptance] = field(default_factory=dict)  # by step
    first_admission_s: float | None = None
    verifier: VerifierFailures = field(default_factory=VerifierFailures)


def new_start(options: Mapping[str, Any], checkpoint: Path | None) -> ReplayStart:
    """`checkpoint`: the `state/` folder to continue from; None: a new run."""
    if checkpoint is None:
        buffer = JournaledBuffer(**options)
    else:
        buffer = JournaledBuffer.from_snapshot(read_state(checkpoint), **options)
    return ReplayStart(buffer, WorkerBook(buffer.note))


def payload_in(journal: Journal, group_id: int) -> Payload:
    """An accepted group as the journal has it."""
    data = journal.places[group_id].read()
    return Payload(GroupFacts.of(unpack_group(data)), data)


def image_extras(start: ReplayStart) -> dict[str, Any]:
    """What the image of a journal needs beside the buffer, as JSON values."""
    return {
        "book": start.book.image(),
        "untrained": [_batch_values(batch) for batch in start.untrained],
        "kept": [[*each] for each in start.kept.items()],
        "partial_tokens": [[*each] for each in start.partial_tokens.items()],
        "first_admission_s": start.first_admission_s,
        "verifier": start.verifier.image(),
    }


def recovered_start(options: Mapping[str, Any], journal: Journal) -> ReplayStart:
    """The state at the death of the process before. Raises RuntimeError without a journal."""
    found = journal.read()
    if found is None:
        raise RuntimeError(
            f"there is no journal in {journal.folder}: the disk has refused it, or it was removed"
        )
    image, records = found
    payload = partial(payload_in, journal)
    start = new_start(options, None)
    buffer = start.buffer
    buffer.load(image, payload)
    start.book.load(image["book"])
    start.kept = dict(image["kept"])
    start.partial_tokens = Counter(dict(image["partial_tokens"]))
    start.first_admission_s = image["first_admission_s"]
    start.verifier = VerifierFailures.of_image(image["verifier"])
    start.untrained = deque(_batch(values, payload) for values in image["untrained"])
    repeated = buffer.repeat(records, payload=payload, facts_of=lambda each: each.facts)
    for fields, result in repeated:
        _follow(start, fields, result)
    for group_id, tokens in start.partial_tokens.items():
        if group_id in buffer.to_reissue:
            buffer.drop_partial_completions(group_id)
        buffer.tokens.end(TokenOutcome.REPEATED, tokens)
    start.partial_tokens.clear()
    return start


def _follow(start: ReplayStart, fields: Mapping[str, Any], result: Any) -> None:
    """The state beside the buffer after one change."""
    match fields["k"]:
        case "admit":
            start.partial_tokens.pop(result, None)
        case "take":
            start.untrained.append(result)
            if result.closes_step:
                keep_acceptance(start, result.learner_version)
        case "trained" | "skipped":
            book_batch(start, fields["ids"])
        case "cut":
            drop_batches(start, result)
            if fields["v"] not in start.acceptance:
                keep_acceptance(start, fields["v"])
        case "evict":
            for group_id, worker in result.items():
                start.evicted[worker].append(group_id)
        case "note" if fields["note"] == "partial":
            start.partial_tokens[fields["id"]] += fields["n"]
        case "note" if fields["note"] == "ended":
            _end_tokens(start, fields)
        case "note" if fields["note"] == "unjudged":
            start.verifier.failed(fields["row"])
        case "note" if fields["note"] == "judged":
            start.verifier.judged(fields["row"])
        case "note" if fields["note"] == "first":
            start.first_admission_s = fields["s"]
        case "note":
            start.book.repeat(fields["note"], fields)


def _end_tokens(start: ReplayStart, fields: Mapping[str, Any]) -> None:
    """Tokens of partial completions that the actor has ended."""
    start.buffer.tokens.end(TokenOutcome(fields["o"]), fields["n"])
    start.partial_tokens.pop(fields["id"], None)


def keep_acceptance(start: ReplayStart, step: int) -> None:
    """Keeps what the step that was just closed was offered, for the reports."""
    if start.buffer.acceptance is None:  # it was closed before the image of a recovery
        return
    start.acceptance[step] = start.buffer.acceptance
    start.acceptance.pop(step - KEPT_ACCEPTANCES, None)


def book_batch(start: ReplayStart, group_ids: Iterable[int]) -> TrainBatch | None:
    """A batch was trained or skipped; returns it. None: it was booked before."""
    ids = tuple(group_ids)
    for batch in start.untrained:
        if batch.group_ids == ids:
            start.untrained.remove(batch)
            start.kept.update(dict.fromkeys(ids, batch.learner_version))
            return batch
    return None


def drop_batches(start: ReplayStart, group_ids: Iterable[int]) -> None:
    """The groups of these batches are finished groups again."""
    returned = set(group_ids)
    start.untrained = deque(
        batch for batch in start.untrained if not returned.issuperset(batch.group_ids)
    )


def _batch_values(batch: TrainBatch) -> dict[str, Any]:
    return {
        "learner_version": batch.learner_version,
        "group_ids": [*batch.group_ids],
        "oldest_versions": [*batch.oldest_versions],
        "evicted": [*batch.evicted],
        "closes_step": batch.closes_step,
    }


def _batch(values: Mapping[str, Any], payload: Any) -> TrainBatch:
    return TrainBatch(
        learner_version=values["learner_version"],
        group_ids=tuple(values["group_ids"]),
        oldest_versions=tuple(values["oldest_versions"]),
        references=tuple(payload(group_id) for group_id in values["group_ids"]),
        evicted=tuple(values["evicted"]),
        closes_step=values["closes_step"],
    )
