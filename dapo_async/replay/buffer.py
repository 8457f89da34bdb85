"""The replay buffer: admissions and scored groups arrive from rollout workers, train batches leave to the learner. The replay actor drives it.

    admit ──▶ generating ──offer──▶ buffered ──take──▶ taken ──trained | skipped──▶ awaiting ──release──▶ credit free
                  │                    │
                  ├─ rejected, failed  └─ evicted          these give the credit back at once
                  └─ evicted

A resumed run starts from a `BufferState` (lineage.py): finished groups are buffered again, generating ones wait for `admit` with their group id.
`serve(v)` tells which weights every serving engine has. It comes before the `release` of the batch that made v: a group that is admitted with the
returned credit must not count as started under older weights (credits.py proves from this that a healthy run evicts nothing and never blocks).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dapo_async.replay.credits import Credits, Outstanding, doomed, first_overload
from dapo_async.replay.filters import Filter, first_reason
from dapo_async.replay.ledger import Counts, GroupOutcome, Ledger
from dapo_async.replay.lineage import BufferState, thaw
from dapo_async.replay.offers import OfferOutcome, OfferResult, refuse
from dapo_async.replay.stall_report import explain, facts_of
from dapo_async.replay.state import Buffered, Generating, Taken
from dapo_async.replay.step_stats import AcceptanceLog, StepAcceptance
from dapo_async.replay.stop_rule import Patience, StopReason
from dapo_async.types import Group, RejectReason, TrainBatch


class ReplayBuffer:
    """Law 1 and law 2 in one machine; see the module's diagram. Methods assert their caller's order and raise nothing else."""

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness: int,
        num_steps: int,
        filters: Sequence[Filter],
        patience: int,
        incarnation: str,
        lineage: BufferState | None = None,
    ) -> None:
        assert groups_per_step > 0, groups_per_step
        assert max_staleness >= 0, max_staleness
        self.groups_per_step, self.max_staleness, self.num_steps, self.incarnation = (
            groups_per_step,
            max_staleness,
            num_steps,
            incarnation,
        )
        self.next_step = 0
        self.served_version: int | None = (
            None  # oldest version among the serving engines; None before the first publish: nobody may start
        )
        self.learner_version = 0  # the latest that asked for a batch
        self.closed = False
        self.acceptance: StepAcceptance | None = None  # of the step taken last
        self._filters = tuple(filters)
        self._credits = Credits((max_staleness + 1) * groups_per_step)
        self._ledger = Ledger()
        self._patience = Patience(patience)
        self._log = AcceptanceLog(count_waves=max_staleness == 0)
        self.failures: Counter[str] = Counter()  # failed groups by what their worker said
        self._generating: dict[int, Generating] = {}
        self._buffered: dict[int, Buffered] = {}
        # Admissions that nobody generates any more, of a lost engine or of the incarnation before; and the deadline of what is there of them, or -1.
        self._reissue: dict[int, int] = {}
        self._taken: dict[int, Taken] = {}
        self._awaiting: dict[
            int, int
        ] = {}  # group id → version that every engine has to serve before the credit returns
        self._evicted_since_take: list[int] = []
        self._suspect = False  # a deadline came nearer: the only way to an overload, see credits.py
        if lineage is not None:
            thaw(self, lineage)

    # What is known.

    @property
    def steps_left(self) -> int:
        return self.num_steps - self.next_step

    @property
    def num_generating(self) -> int:
        return len(self._generating)

    @property
    def num_to_reissue(self) -> int:
        return len(self._reissue)

    @property
    def num_buffered(self) -> int:
        return len(self._buffered)

    @property
    def credits_held(self) -> int:
        return self._credits.held

    @property
    def verdict(self) -> StopReason | None:
        """Set for good after `patience` consecutive rejects: solved or stuck. Admission has stopped."""
        return self._patience.verdict

    @property
    def counts(self) -> Counts:
        return self._ledger.counts

    def check(self) -> None:
        """Asserts conservation and that no credit leaked: constant time, called at every instant one likes."""
        (counts := self.counts).check()
        in_flight = sum(
            len(room) for room in (self._generating, self._buffered, self._taken, self._reissue)
        )
        assert counts.in_flight == in_flight, (
            f"{counts.in_flight} admissions are open, {in_flight} groups are in the room"
        )
        held = in_flight + len(self._awaiting)
        assert self._credits.held == held, f"{self._credits.held} credits are held by {held} groups"

    # From the workers.

    def admissible(self) -> int:
        """Groups that may start now: those to be issued again, and free credits, but never more new groups than the remaining steps will take."""
        if self.closed or self.verdict is not None or self.served_version is None:
            return 0
        wanted = (
            self.steps_left * self.groups_per_step
            - self.num_generating
            - self.num_buffered
            - self.num_to_reissue
        )
        return self.num_to_reissue + max(0, min(self._credits.free, wanted))

    def admit(self, worker: str) -> int:
        """Spends a credit for `worker`; returns the group id. The deadline counts from the served version until the offer attests better.

        One that is issued again goes on with what is there of it (`goes_on`), under its deadline, if that can still be kept.
        """
        assert self.admissible() > 0, f"{worker} was admitted without a free credit"
        assert self.served_version is not None
        deadline, kept = self.served_version + self.max_staleness, -1
        if self._reissue:
            group_id = next(iter(self._reissue))
            kept = self._reissue.pop(group_id)
        else:
            group_id = self._ledger.admit()
            self._credits.spend(group_id)
        goes_on = (
            kept > self.learner_version
            and self._overload_after(frozenset(), self.learner_version, [kept]) is None
        )
        self._suspect |= goes_on and kept < deadline
        self._generating[group_id] = Generating(
            worker, min(deadline, kept) if goes_on else deadline, goes_on
        )
        self._log.admit()
        return group_id

    def offer(self, group: Group, payload: Any) -> OfferResult:
        """Ends the generation of `group`: kept with `payload` (opaque; what the batch refers to), rejected, evicted or refused."""
        group_id, oldest_version = group.group_id, group.oldest_version
        refusal = refuse(
            group,
            self.incarnation,
            waited_for=group_id in self._generating,
            known=self._ledger.knows(group_id),
            closed=self.closed,
        )
        if refusal is not None:
            self._log.refuse()
            return OfferResult(OfferOutcome.REFUSED, refusal)
        deadline = oldest_version + self.max_staleness
        if deadline < self.learner_version:
            self._evict(group_id)
            return OfferResult(OfferOutcome.EVICTED)
        reason = first_reason(group, self._filters)
        started = self._generating.pop(group_id)
        self._suspect |= deadline < started.deadline
        if reason is not None:
            self._end(group_id, reason)
            self._log.reject(reason, group)
            self._patience.reject(reason)
            return OfferResult(OfferOutcome.REJECTED, reason)
        self._buffered[group_id] = Buffered(
            started.worker, deadline, oldest_version, group.num_tokens, payload
        )
        self._log.accept(group)
        self._patience.accept()
        return OfferResult(OfferOutcome.ACCEPTED)

    def fail(self, group_id: int, *, why: str) -> bool:
        """Gives up a generating group; False when it had ended already (a late report)."""
        if self._generating.pop(group_id, None) is None:
            return False
        self._end(group_id, GroupOutcome.FAILED)
        self.failures[why] += 1
        return True

    def hand_back(self, group_id: int, *, oldest_version: int | None = None) -> bool:
        """A generating group of a lost engine keeps its credit, waits for `admit`; False when it had ended. `oldest_version` of what is there."""
        if self._generating.pop(group_id, None) is None:
            return False
        self._reissue[group_id] = (
            -1 if oldest_version is None else oldest_version + self.max_staleness
        )
        return True

    def goes_on(self, group_id: int) -> bool:
        """Whether the group, just admitted once more, goes on with what is there of it, or begins anew."""
        return self._generating[group_id].goes_on

    def lose_worker(self, worker: str) -> tuple[int, ...]:
        """Fails what `worker` was generating; what it had offered stays. Returns the failed group ids."""
        lost = tuple(
            group_id for group_id, started in self._generating.items() if started.worker == worker
        )
        for group_id in lost:
            self.fail(group_id, why=f"lost {worker}")
        return lost

    # From the learner and the publisher.

    def serve(self, version: int) -> None:
        """Every serving engine attested `version` or newer."""
        assert self.served_version is None or version >= self.served_version, (
            f"served version went from {self.served_version} to {version}"
        )
        self.served_version = version

    def evict_doomed(self, learner_version: int) -> dict[int, str]:
        """Evicts the fewest groups without which all other deadlines can be kept; returns group id → worker, for aborts.

        Call it before every `take`, which does the same but returns nothing while it waits. Empty in a healthy run: it takes an engine that
        attests older versions than it had claimed to serve.
        """
        assert learner_version >= self.learner_version, (
            f"learner version went from {self.learner_version} to {learner_version}"
        )
        if learner_version == self.learner_version and not self._suspect:
            return {}
        self.learner_version, self._suspect = learner_version, False
        lost = doomed(
            self._outstanding(), next_version=learner_version, groups_per_step=self.groups_per_step
        )
        return {group_id: self._evict(group_id) for group_id in lost}

    def take(self, learner_version: int) -> TrainBatch | None:
        """The finished groups with the earliest deadlines; None: wait, for more groups or for a straggler whose deadline would be lost.

        The batch is ordered by group id. `TrainBatch.evicted` are all evictions since the take before.
        """
        assert not self.closed, "take after close"
        assert self.steps_left > 0, f"all {self.num_steps} steps are taken"
        self.evict_doomed(learner_version)
        picked = self._pick()
        if (
            len(picked) < self.groups_per_step
            or self._overload_after(picked, learner_version) is not None
        ):
            return None
        group_ids = tuple(sorted(picked))
        groups = [self._buffered.pop(group_id) for group_id in group_ids]
        oldest_versions = tuple(group.oldest_version for group in groups)
        assert min(oldest_versions) >= learner_version - self.max_staleness, (
            f"staleness law broken at {learner_version}: {oldest_versions}"
        )
        self._taken.update(
            {
                group_id: Taken(learner_version, group)
                for group_id, group in zip(group_ids, groups, strict=True)
            }
        )
        self.next_step += 1
        self.acceptance = self._log.close_step()
        evicted, self._evicted_since_take = tuple(self._evicted_since_take), []
        return TrainBatch(
            learner_version=learner_version,
            group_ids=group_ids,
            oldest_versions=oldest_versions,
            num_tokens=tuple(group.num_tokens for group in groups),
            references=tuple(group.payload for group in groups),
            evicted=evicted,
        )

    def trained(self, group_ids: Iterable[int]) -> None:
        """The step of these groups is done; their credits wait for `release`."""
        self._finish_step(group_ids, GroupOutcome.TRAINED)

    def skipped(self, group_ids: Iterable[int]) -> None:
        """The step of these groups was non-finite. If it made a version all the same, their credits wait until that is served."""
        self._finish_step(group_ids, GroupOutcome.SKIPPED)

    def release(self, group_ids: Iterable[int]) -> None:
        """Every serving engine has the weights that these groups trained: their credits return. After `serve`, also after `close`."""
        for group_id in group_ids:
            version = self._awaiting.pop(group_id, None)
            assert version is not None, f"group {group_id} waits for no weights"
            served = self.served_version is not None and self.served_version >= version
            assert served, (
                f"group {group_id} waits for version {version}, but {self.served_version} is served"
            )
            self._credits.give_back(group_id)

    def close(self) -> Counts:
        """The run ends: all that is in flight ends unused, later offers are refused."""
        for room in (self._generating, self._buffered, self._taken, self._reissue):
            for group_id in room:
                self._end(group_id, GroupOutcome.UNUSED)
            room.clear()
        self.closed = True
        return self.counts

    def explain_wait(self, learner_version: int) -> str:
        """One line for a passed deadline: who waits for whom."""
        return explain(
            facts_of(
                self, learner_version, overload=self._overload_after(self._pick(), learner_version)
            )
        )

    # Inside.

    def _outstanding(self) -> Iterable[Outstanding]:
        for group_id, started in self._generating.items():
            yield Outstanding(started.deadline, group_id, generating=True)
        for group_id, group in self._buffered.items():
            yield Outstanding(group.deadline, group_id, generating=False)

    def _pick(self) -> frozenset[int]:
        finished = (group for group in self._outstanding() if not group.generating)
        return frozenset(
            group.group_id for group in heapq.nsmallest(self.groups_per_step, finished)
        )

    def _overload_after(
        self, picked: frozenset[int], learner_version: int, added: Sequence[int] = ()
    ) -> int | None:
        """The first deadline that would be lost if `picked` were taken at `learner_version`, with `added` deadlines beside those of the room."""
        rest = (
            *(group.deadline for group in self._outstanding() if group.group_id not in picked),
            *added,
        )
        return first_overload(
            rest, next_version=learner_version + 1, groups_per_step=self.groups_per_step
        )

    def _evict(self, group_id: int) -> str:
        worker = (self._generating.pop(group_id, None) or self._buffered.pop(group_id)).worker
        self._end(group_id, GroupOutcome.EVICTED)
        self._evicted_since_take.append(group_id)
        return worker

    def _finish_step(self, group_ids: Iterable[int], ending: GroupOutcome) -> None:
        for group_id in group_ids:
            assert group_id in self._taken, (
                f"group {group_id} is not in a step and can't end as {ending.value}"
            )
            version = self._taken.pop(group_id).version
            self._awaiting[group_id] = version + 1 if ending is GroupOutcome.TRAINED else version
            self._ledger.end(group_id, ending)

    def _end(self, group_id: int, ending: GroupOutcome | RejectReason) -> None:
        """An ending that trained nothing: the credit returns at once."""
        self._ledger.end(group_id, ending)
        self._credits.give_back(group_id)
