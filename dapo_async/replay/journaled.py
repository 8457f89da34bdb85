"""The replay buffer with a journal: after the death of its process another one goes on.

Each change is a record in the journal. `load` brings a new buffer into the state of the newest
image, and `repeat` makes the changes after it. The buffer is deterministic, so that it ends in the
state that it had.
Callers add notes, records of their own, which come back in order.

When the disk refuses the journal, it is removed and the run goes on without. The next image begins
a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from dapo_async.replay.buffer import ReplayBuffer
from dapo_async.replay.buffer_image import image_of, load_image
from dapo_async.replay.journal import DATA, Journal, Record
from dapo_async.replay.ledger import Counts
from dapo_async.replay.state import OfferOutcome, OfferResult
from dapo_async.types import Group, GroupFacts, RejectReason, TrainBatch

NOTE = "note"


class JournaledBuffer(ReplayBuffer):
    """`journal` is set by `keep_journal`; without it this is a plain replay buffer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.journal: Journal | None = None
        self._fault: OSError | None = None  # why there is no journal, until it is told
        self._data_of: Callable[[Any], Any] = lambda payload: payload
        self._extras: Callable[[], Mapping[str, Any]] = dict
        self._is_inside = False  # a recorded call is running: its own calls are parts of it

    def keep_journal(
        self,
        journal: Journal,
        *,
        data_of: Callable[[Any], Any],
        extras: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Begins the journal. `data_of(payload)`: the packed group; `extras`: of the image."""
        self.journal, self._data_of, self._extras = journal, data_of, extras
        self.begin_segment()

    def begin_segment(self) -> None:
        """Writes an image, with which a recovery begins."""
        if self.journal is None:
            return
        finished = {**self._buffered, **{each: of.group for each, of in self._taken.items()}}
        places = self.journal.places
        groups = (
            (group_id, self._data_of(group.payload))
            for group_id, group in finished.items()
            if group_id not in places
        )
        with self._refusals():
            image = {"buffer": image_of(self), **self._extras()}
            self.journal.begin(image, groups, refers_to=finished)

    def begin_segment_if_long(self) -> None:
        """Call it when everything that belongs to the changes so far is done."""
        if self.journal is not None and self.journal.is_open and self.journal.is_long:
            self.begin_segment()

    def take_journal_fault(self) -> OSError | None:
        """Why the disk has refused the journal since the last call."""
        fault, self._fault = self._fault, None
        return fault

    def note(self, kind: str, **fields: Any) -> None:
        """A record of the caller."""
        self._record(NOTE, note=kind, **fields)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Goes on without a journal if the disk refuses it."""
        assert self.journal is not None
        try:
            yield
        except OSError as error:
            self._fault = error
            self.journal.remove()

    def _record(self, kind: str, data: Any = None, group_id: int = -1, **fields: Any) -> None:
        if self.journal is None or not self.journal.is_open:
            return
        with self._refusals():
            if data is None:
                self.journal.append({"k": kind, **fields})
            else:
                self.journal.append({"k": kind, "id": group_id, **fields}, group_id, data)

    @contextmanager
    def _recorded(self, kind: str, **fields: Any) -> Iterator[None]:
        """The body is one change, unless it is a part of another one."""
        if self._is_inside:
            yield
            return
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False
        self._record(kind, **fields)

    # The changes.

    def admit(self, worker: str) -> int:
        with self._recorded("admit", w=worker):
            return super().admit(worker)

    def offer(self, group: Group | GroupFacts, payload: Any) -> OfferResult:
        """Records the verdict of the filters, too: a user's filter need not be repeatable."""
        result = super().offer(group, payload)
        if result.outcome is OfferOutcome.ACCEPTED:
            self._record("offer", self._data_of(payload), group.group_id)
        else:
            facts = group if isinstance(group, GroupFacts) else GroupFacts.of(group)
            reason = result.reason.value if isinstance(result.reason, RejectReason) else None
            self._record("refuse", facts=asdict(facts), reason=reason)
        return result

    def fail(self, group_id: int, *, why: str) -> bool:
        with self._recorded("fail", id=group_id, why=why):
            return super().fail(group_id, why=why)

    def hand_back(self, group_id: int, *, oldest_version: int | None = None) -> bool:
        with self._recorded("back", id=group_id, oldest=oldest_version):
            return super().hand_back(group_id, oldest_version=oldest_version)

    def lose_worker(self, worker: str) -> tuple[int, ...]:
        with self._recorded("lose", w=worker):
            return super().lose_worker(worker)

    def serve(self, version: int) -> None:
        with self._recorded("serve", v=version):
            super().serve(version)

    def evict_doomed(self, learner_version: int) -> dict[int, str]:
        if learner_version == self.learner_version and not self._suspect:
            return super().evict_doomed(learner_version)  # changes nothing
        with self._recorded("evict", v=learner_version):
            return super().evict_doomed(learner_version)

    def take(self, learner_version: int) -> TrainBatch | None:
        self.evict_doomed(learner_version)
        batch = super().take(learner_version)
        if batch is not None:
            self._record("take", v=learner_version)
        return batch

    def cut_step(self, version: int) -> tuple[int, ...]:
        with self._recorded("cut", v=version):
            return super().cut_step(version)

    def trained(self, group_ids: Iterable[int]) -> None:
        ids = [*group_ids]
        with self._recorded("trained", ids=ids):
            super().trained(ids)

    def skipped(self, group_ids: Iterable[int]) -> None:
        ids = [*group_ids]
        with self._recorded("skipped", ids=ids):
            super().skipped(ids)

    def drop_partial_completions(self, group_id: int) -> None:
        with self._recorded("drop", id=group_id):
            super().drop_partial_completions(group_id)

    def release(self, group_ids: Iterable[int]) -> None:
        ids = [*group_ids]
        with self._recorded("release", ids=ids):
            super().release(ids)

    def close(self) -> Counts:
        with self._recorded("close"):
            return super().close()

    # Recovery.

    def load(self, image: Mapping[str, Any], payload: Callable[[int], Any]) -> None:
        """Brings a new buffer into the state of an image. `payload(group_id)` gives a group."""
        load_image(self, image["buffer"], payload)

    def repeat(
        self,
        records: Iterable[Record],
        *,
        payload: Callable[[int], Any],
        facts_of: Callable[[Any], GroupFacts],
    ) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Makes the changes of `records`; yields the fields of each, and its result.

        `payload(group_id)` gives a group from the journal, and `facts_of(payload)` its facts.
        """
        for record in records:
            yield record.fields, self._repeat(record.fields, payload, facts_of)
        self.check()

    def _repeat(
        self,
        fields: Mapping[str, Any],
        payload: Callable[[int], Any],
        facts_of: Callable[[Any], GroupFacts],
    ) -> Any:
        match fields["k"]:
            case "admit":
                return self.admit(fields["w"])
            case "offer":
                data = payload(fields["id"])
                return self._offer_again(facts_of(data), data, None)
            case "refuse":
                values: dict[str, Any] = {
                    name: tuple(value) if isinstance(value, list) else value
                    for name, value in fields["facts"].items()
                }
                return self._offer_again(GroupFacts(**values), None, fields["reason"])
            case "fail":
                return self.fail(fields["id"], why=fields["why"])
            case "back":
                return self.hand_back(fields["id"], oldest_version=fields["oldest"])
            case "lose":
                return self.lose_worker(fields["w"])
            case "serve":
                return self.serve(fields["v"])
            case "evict":
                return self.evict_doomed(fields["v"])
            case "take":
                return self.take(fields["v"])
            case "cut":
                return self.cut_step(fields["v"])
            case "trained":
                return self.trained(fields["ids"])
            case "skipped":
                return self.skipped(fields["ids"])
            case "release":
                return self.release(fields["ids"])
            case "drop":
                return self.drop_partial_completions(fields["id"])
            case "close":
                return self.close()
        assert fields["k"] in (NOTE, DATA), fields
        return None

    def _offer_again(self, facts: GroupFacts, payload: Any, reason: str | None) -> OfferResult:
        """With the verdict of the filters as it was."""
        filters = self._filters
        self._filters = (lambda _: RejectReason(reason) if reason else None,)
        try:
            return self.offer(facts, payload)
        finally:
            self._filters = filters
