"""The replay buffer: workers ask for admissions and offer scored groups; the learner takes batches.

    admit ──▶ generating ──offer──▶ buffered ──take──▶ taken ──trained | skipped──▶ awaiting
                  │                    │                                                │
                  ├─ rejected, failed  └─ evicted                                    release
                  └─ evicted                                                            ▼
                                                                                   credit free

A rejected, failed or evicted group gives its credit back at once. The replay actor calls all
methods. `serve(v)` says that all serving engines have the weights of version v. It must come before
the `release` of the batch that made v: a group that is admitted with a returned credit must not
count as started under older weights. credits.py proves from this order that a healthy run evicts
nothing and never blocks.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from dapo_async.replay.credits import (
    Credits,
    DeadlineCounts,
    Outstanding,
    doomed,
    first_overload,
)
from dapo_async.replay.filters import Filter, first_reason
from dapo_async.replay.ledger import Counts, GroupOutcome, Ledger
from dapo_async.replay.stall_report import WaitFacts, explain
from dapo_async.replay.state import (
    Buffered,
    BufferState,
    Generating,
    OfferOutcome,
    OfferResult,
    Refusal,
    Taken,
)
from dapo_async.replay.step_stats import AcceptanceLog, StepAcceptance
from dapo_async.replay.stop_rule import RejectStreak, StopReason
from dapo_async.replay.token_flow import TokenBook, TokenOutcome
from dapo_async.types import Group, GroupFacts, RejectReason, TrainBatch

# Tokens of a refused offer that this incarnation generated, and how they end.
_REFUSED_TOKENS = {Refusal.CLOSED: TokenOutcome.UNUSED, Refusal.ENDED: TokenOutcome.EVICTED}


class ReplayBuffer:
    """Keeps the staleness bound and conservation; the module docstring has the diagram.

    Methods assert that they are called in a valid order and raise nothing else.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness: int,
        num_steps: int,
        filters: Sequence[Filter],
        max_rejected_in_a_row: int,
        incarnation: str,
        num_minibatches: int = 1,
        whole_steps: bool = False,
    ) -> None:
        """A step takes its groups in `num_minibatches` equal takes, each as soon as it can be kept.

        `whole_steps`: the first of them waits for the groups of all, so that the order in which
        groups finish changes nothing. `max_rejected_in_a_row`: consecutive rejects after which
        admission stops for good.
        """
        assert groups_per_step > 0, groups_per_step
        assert max_staleness >= 0, max_staleness
        assert groups_per_step % num_minibatches == 0, (groups_per_step, num_minibatches)
        self.groups_per_step = groups_per_step
        self.groups_per_take = groups_per_step // num_minibatches
        self._whole_steps = whole_steps
        self._taken_now = 0  # groups of the step that is open: its takes are not all made
        self.cut_version = -1  # of the newest step that was cut
        self.max_staleness = max_staleness
        self.num_steps = num_steps
        self.incarnation = incarnation
        self.next_step = 0
        # Oldest version that a serving engine has. None before the first publish: no admissions.
        self.served_version: int | None = None
        self.learner_version = 0  # of the latest take
        self.closed = False
        self.acceptance: StepAcceptance | None = None  # of the step that was taken last
        self.failures: Counter[str] = Counter()  # failed groups by the worker's reason
        self.tokens = TokenBook()  # tokens that end in the buffer or in the learner
        self.num_offered = self.num_accepted = 0  # groups that the filters judged, and accepted

        self._filters = tuple(filters)
        self._credits = Credits((max_staleness + 1) * groups_per_step)
        self._ledger = Ledger()
        self._streak = RejectStreak(max_rejected_in_a_row)
        self._log = AcceptanceLog(count_waves=max_staleness == 0)
        # By version of a take: its step's offers, until the step is booked.
        self._closed_logs: dict[int, dict[str, Any]] = {}
        self._generating: dict[int, Generating] = {}
        self._generating_on: Counter[str] = Counter()  # groups by worker
        self._buffered: dict[int, Buffered] = {}
        self._deadlines = DeadlineCounts()  # of _generating and _buffered
        # Deadline and id of the buffered groups; groups that have left are dropped by `_pick`.
        self._by_deadline: list[tuple[int, int]] = []
        # Groups to be admitted again, of a lost engine or of the incarnation before → deadline of
        # their partial completions, or -1 without.
        self._reissue: dict[int, int] = {}
        self._taken: dict[int, Taken] = {}
        # Trained or skipped groups → version that all engines must serve before the credit returns.
        self._awaiting: dict[int, int] = {}
        self._evicted_since_take: list[int] = []
        # A deadline came nearer since the last check: only then can there be an overload.
        self._suspect = False

    @classmethod
    def from_snapshot(
        cls,
        state: BufferState,
        *,
        groups_per_step: int,
        max_staleness: int,
        num_steps: int,
        filters: Sequence[Filter],
        max_rejected_in_a_row: int,
        incarnation: str,
        num_minibatches: int = 1,
        whole_steps: bool = False,
    ) -> Self:
        """The buffer of a resumed run.

        Credits of trained groups are free: every engine starts with the learner's newest weights.
        """
        assert state.next_step <= num_steps, (state.next_step, num_steps)
        buffer = cls(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            num_steps=num_steps,
            filters=filters,
            max_rejected_in_a_row=max_rejected_in_a_row,
            incarnation=incarnation,
            num_minibatches=num_minibatches,
            whole_steps=whole_steps,
        )
        buffer.next_step, buffer.learner_version = state.next_step, state.version
        buffer.failures.update(state.failures)
        for group_id, group in state.buffered.items():
            buffer._keep(group_id, group)
            buffer.tokens.resume(group.num_response_tokens)
        buffer._reissue = dict.fromkeys(state.reissue, -1)
        outstanding = [*state.buffered, *state.reissue]
        for group_id in outstanding:
            buffer._credits.spend(group_id)
        buffer._ledger.restore(state.admitted, state.ended, outstanding)
        buffer._streak.restore(state.streak)
        buffer._log.restore(state.acceptance)
        buffer._suspect = True  # the next take checks every deadline
        return buffer

    def snapshot(self, version: int) -> BufferState:
        """What a resume needs when the learner is at `version`; later changes do not reach it.

        A batch that was taken and is not trained counts as finished groups. When a run ends, there
        may be two: one that the driver asked for and did not train, and one taken ahead after it.
        A step that was cut short must be ended first (`cut_step`).
        """
        taken = Counter(each.version for each in self._taken.values())
        assert not taken or min(taken) >= version, f"a step before version {version} is not booked"
        closed = taken.keys() & self._closed_logs.keys()
        whole = Counter(dict.fromkeys(closed, self.groups_per_step))
        open_step = Counter({self.next_step: self._taken_now})
        assert taken == whole + open_step, f"a step is trained in part and not cut: {taken}"
        next_step = self.next_step - len(closed)
        assert next_step == version, f"the learner is at {version}, the buffer at step {next_step}"
        returned = {group_id: each.group for group_id, each in self._taken.items()}
        return BufferState(
            version=version,
            next_step=next_step,
            **self._ledger.state(),
            failures=dict(self.failures),
            streak=self._streak.state(),
            acceptance=self._log.reopened(self._closed_logs[each] for each in closed),
            reissue=tuple(sorted([*self._reissue, *self._generating])),
            buffered={**returned, **self._buffered},
        )

    def watch_ends(self, on_end: Callable[[int, GroupOutcome | RejectReason], None]) -> None:
        """`on_end` is called with each group that ends from now on, and its outcome."""
        self._ledger.on_end = on_end

    # State that callers read.

    @property
    def steps_left(self) -> int:
        return self.num_steps - self.next_step

    @property
    def num_generating(self) -> int:
        return len(self._generating)

    def num_generating_on(self, worker: str) -> int:
        return self._generating_on[worker]

    @property
    def buffered(self) -> Mapping[int, Buffered]:
        """Finished groups that wait for a take, by id."""
        return self._buffered

    def generating_on(self, worker: str) -> set[int]:
        """The groups that `worker` generates."""
        return {each for each, started in self._generating.items() if started.worker == worker}

    def is_generating(self, group_id: int) -> bool:
        return group_id in self._generating

    def awaits(self, group_id: int) -> bool:
        """Whether the credit of this trained group waits for `release`."""
        return group_id in self._awaiting

    @property
    def to_reissue(self) -> Collection[int]:
        """Groups that are to be admitted again."""
        return self._reissue.keys()

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
    def stop_reason(self) -> StopReason | None:
        """Set for good after `max_rejected_in_a_row` rejects; admission has stopped then."""
        return self._streak.stop_reason

    @property
    def counts(self) -> Counts:
        return self._ledger.counts

    def check(self) -> None:
        """Asserts conservation and that no credit leaked, in constant time; valid at any moment."""
        counts = self.counts
        counts.check()
        outstanding = len(self._generating) + len(self._buffered)
        in_flight = outstanding + len(self._taken) + len(self._reissue)
        assert counts.in_flight == in_flight, (
            f"{counts.in_flight} admissions are open, the buffer has {in_flight} groups"
        )
        deadlines = self._deadlines
        assert deadlines.outstanding.total() == outstanding, (deadlines.outstanding, outstanding)
        assert deadlines.finished.total() == len(self._buffered), deadlines.finished
        held = in_flight + len(self._awaiting)
        assert self._credits.held == held, f"{self._credits.held} credits are held by {held} groups"

    # Calls on behalf of the workers.

    def admissible(self) -> int:
        """How many groups may start now.

        These are the groups to be admitted again, and one new group per free credit, but never more
        new groups than the remaining steps can take. None before the weights of a cut step are
        served: that step has left places empty, and the deadline of a new group counts on them.
        """
        if self.closed or self.stop_reason is not None or self.served_version is None:
            return 0
        if self.served_version <= self.cut_version:
            return 0
        wanted = (
            self.steps_left * self.groups_per_step
            - self._taken_now
            - self.num_generating
            - self.num_buffered
            - self.num_to_reissue
        )
        return self.num_to_reissue + max(0, min(self._credits.free, wanted))

    def admit(self, worker: str) -> int:
        """Spends a credit for `worker` and returns the group id.

        The deadline counts from the served version until the offer attests a later one. A group
        that is admitted again continues its partial completions (`continues`) under their deadline,
        if that deadline can still be kept.
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
        continues = (
            kept > self.learner_version
            and self._overload(
                self._deadlines.outstanding + Counter([kept]), self.learner_version + 1
            )
            is None
        )
        if continues and kept < deadline:
            deadline, self._suspect = kept, True
        self._generating[group_id] = Generating(worker, deadline, continues)
        self._generating_on[worker] += 1
        self._deadlines.start(deadline)
        self._log.admit()
        return group_id

    def offer(self, group: Group | GroupFacts, payload: Any) -> OfferResult:
        """Ends the generation of `group`: accepted, rejected, evicted or refused.

        `payload` is opaque; the train batch refers to it.
        """
        refusal = self._refusal(group)
        if refusal is not None:
            self._log.refuse()
            if refusal in _REFUSED_TOKENS:
                self.tokens.end(_REFUSED_TOKENS[refusal], group.num_response_tokens)
            return OfferResult(OfferOutcome.REFUSED, refusal)
        group_id, oldest_version = group.group_id, group.oldest_version
        deadline = oldest_version + self.max_staleness
        if deadline < self.learner_version:
            self._evict(group_id)
            self.tokens.end(TokenOutcome.EVICTED, group.num_response_tokens)
            return OfferResult(OfferOutcome.EVICTED)
        reason = first_reason(group, self._filters)
        started = self._stop(group_id)
        assert started is not None
        self._suspect |= deadline < started.deadline
        self.num_offered += 1
        if reason is not None:
            self._end(group_id, reason)
            self.tokens.end(reason, group.num_response_tokens)
            self._log.reject(reason, group)
            self._streak.reject(reason)
            return OfferResult(OfferOutcome.REJECTED, reason)
        kept = Buffered(
            started.worker,
            deadline,
            oldest_version,
            payload,
            group.num_response_tokens,
        )
        self._keep(group_id, kept)
        self.num_accepted += 1
        self.tokens.accept(group.num_response_tokens)
        self._log.accept(group)
        self._streak.accept()
        return OfferResult(OfferOutcome.ACCEPTED)

    def fail(self, group_id: int, *, why: str) -> bool:
        """Gives up a generating group; False when it had ended already (a late report)."""
        if self._stop(group_id) is None:
            return False
        self._end(group_id, GroupOutcome.FAILED)
        self.failures[why] += 1
        return True

    def hand_back(self, group_id: int, *, oldest_version: int | None = None) -> bool:
        """A generating group of a lost engine keeps its credit and is to be admitted again.

        `oldest_version`: of its partial completions; None without. Returns False when the group had
        ended already.
        """
        if self._stop(group_id) is None:
            return False
        self._reissue[group_id] = (
            -1 if oldest_version is None else oldest_version + self.max_staleness
        )
        return True

    def drop_partial_completions(self, group_id: int) -> None:
        """The partial completions of a group that is to be admitted again are gone."""
        assert group_id in self._reissue, group_id
        self._reissue[group_id] = -1

    def continues(self, group_id: int) -> bool:
        """Whether the group, just admitted again, continues its partial completions."""
        return self._generating[group_id].continues

    def lose_worker(self, worker: str) -> tuple[int, ...]:
        """Hands back the groups that `worker` generates and returns their ids; its offers stay."""
        lost = tuple(
            group_id for group_id, started in self._generating.items() if started.worker == worker
        )
        for group_id in lost:
            self.hand_back(group_id)
        return lost

    # Calls on behalf of the learner and the publisher.

    def serve(self, version: int) -> None:
        """Every serving engine attested `version` or a newer one."""
        assert self.served_version is None or version >= self.served_version, (
            f"served version went from {self.served_version} to {version}"
        )
        self.served_version = version

    def evict_doomed(self, learner_version: int) -> dict[int, str]:
        """Evicts the fewest groups so that all others can be taken in time.

        Returns group id → worker, for aborts. Call it before every `take`, which evicts too but
        does not return the groups while it waits. A healthy run evicts nothing: evictions need an
        engine that attests versions older than the one it served.
        """
        assert learner_version >= self.learner_version, (
            f"learner version went from {self.learner_version} to {learner_version}"
        )
        if learner_version == self.learner_version and not self._suspect:
            return {}
        self.learner_version, self._suspect = learner_version, False
        if self._overload(self._deadlines.outstanding, learner_version, self._taken_now) is None:
            return {}
        lost = doomed(
            self._outstanding(),
            next_version=learner_version,
            groups_per_step=self.groups_per_step,
            taken=self._taken_now,
        )
        return {group_id: self._evict(group_id) for group_id in lost}

    def can_take(self, learner_version: int) -> bool:
        """Whether `take` returns a batch and evicts nothing."""
        return (
            self._has_enough
            and self._overload(self._deadlines.outstanding, learner_version, self._taken_now)
            is None
            and self._overload_after_take(learner_version) is None
        )

    def take(self, learner_version: int) -> TrainBatch | None:
        """The finished groups with the earliest deadlines, in the order of their ids.

        They are one minibatch of the step at `learner_version`. None means wait: for more groups,
        or for a straggler whose deadline would be lost. `TrainBatch.evicted` has all evictions
        since the take before.
        """
        assert not self.closed, "take after close"
        assert self.steps_left > 0, f"all {self.num_steps} steps are taken"
        self.evict_doomed(learner_version)
        if not self._has_enough:
            return None
        if self._overload_after_take(learner_version) is not None:
            return None
        group_ids = tuple(sorted(self._pick()))
        groups = [self._leave(group_id) for group_id in group_ids]
        oldest_versions = tuple(group.oldest_version for group in groups)
        assert min(oldest_versions) >= learner_version - self.max_staleness, (
            f"staleness bound broken at {learner_version}: {oldest_versions}"
        )
        for group_id, group in zip(group_ids, groups, strict=True):
            self._taken[group_id] = Taken(learner_version, group)
        self._taken_now += len(groups)
        closes_step = self._taken_now == self.groups_per_step
        if closes_step:
            self._close_step(learner_version)
        evicted, self._evicted_since_take = tuple(self._evicted_since_take), []
        return TrainBatch(
            learner_version=learner_version,
            group_ids=group_ids,
            oldest_versions=oldest_versions,
            references=tuple(group.payload for group in groups),
            evicted=evicted,
            closes_step=closes_step,
        )

    def cut_step(self, version: int) -> tuple[int, ...]:
        """The learner has ended the step at `version` before its last minibatch.

        Groups of it that were taken and are not trained are finished groups again; returns them.
        """
        self.cut_version = version
        if self.next_step == version:
            self._close_step(version)
        returned = [each for each, taken in self._taken.items() if taken.version == version]
        for group_id in returned:
            self._keep(group_id, self._taken.pop(group_id).group)
        self._closed_logs.pop(version, None)
        self._suspect = True
        return tuple(returned)

    def _close_step(self, version: int) -> None:
        self.next_step += 1
        self._taken_now = 0
        self._closed_logs[version] = self._log.state()
        self.acceptance = self._log.close_step()

    def trained(self, group_ids: Iterable[int]) -> None:
        """The step of these groups is done; their credits wait for `release`."""
        self._finish_step(group_ids, GroupOutcome.TRAINED)

    def skipped(self, group_ids: Iterable[int]) -> None:
        """The step of these groups was not finite; their credits wait for `release`."""
        self._finish_step(group_ids, GroupOutcome.SKIPPED)

    def release(self, group_ids: Iterable[int]) -> None:
        """Returns the credits: every serving engine has the weights that these groups trained.

        Call it after `serve`; it is valid after `close` too.
        """
        for group_id in group_ids:
            version = self._awaiting.pop(group_id, None)
            assert version is not None, f"group {group_id} waits for no weights"
            assert self.served_version is not None
            assert self.served_version >= version, (
                f"group {group_id} waits for version {version}, but {self.served_version} is served"
            )
            self._credits.give_back(group_id)

    def close(self) -> Counts:
        """The run ends: groups in flight end unused, later offers are refused."""
        finished = [*self._buffered.values(), *(taken.group for taken in self._taken.values())]
        self.tokens.end(TokenOutcome.UNUSED, sum(each.num_response_tokens for each in finished))
        for groups in (self._generating, self._buffered, self._taken, self._reissue):
            for group_id in groups:
                self._end(group_id, GroupOutcome.UNUSED)
            groups.clear()
        self._deadlines.clear()
        self._by_deadline.clear()
        self._generating_on.clear()
        self.closed = True
        return self.counts

    def explain_wait(self, learner_version: int) -> str:
        """One line for a passed deadline: what a take at `learner_version` waits for."""
        facts = WaitFacts(
            learner_version=learner_version,
            served_version=self.served_version,
            wanted=self._wanted,
            finished=self.num_buffered,
            generating=self._generating,
            in_training=len(self._taken),
            unpublished=len(self._awaiting),
            admissible=self.admissible(),
            credits_free=self._credits.free,
            overload=self._overload_after_take(learner_version),
            acceptance=self._log.step,
            evicted=len(self._evicted_since_take),
            failures=self.failures,
            stop_reason=self.stop_reason,
            closed=self.closed,
        )
        return explain(facts)

    # Internal steps.

    def _refusal(self, group: Group | GroupFacts) -> Refusal | None:
        """Why `group` belongs to no open admission; None when it does."""
        if self.closed:
            return Refusal.CLOSED
        if group.incarnation != self.incarnation:
            return Refusal.FOREIGN_INCARNATION
        if group.group_id in self._generating:
            return None
        return Refusal.ENDED if self._ledger.knows(group.group_id) else Refusal.UNKNOWN

    def _outstanding(self) -> Iterable[Outstanding]:
        for group_id, started in self._generating.items():
            yield Outstanding(started.deadline, group_id, generating=True)
        for group_id, group in self._buffered.items():
            yield Outstanding(group.deadline, group_id, generating=False)

    def _pick(self) -> list[int]:
        """The finished groups with the earliest deadlines, as many as a take has."""
        picked: list[int] = []
        while len(picked) < self.groups_per_take:
            _, group_id = heapq.heappop(self._by_deadline)
            if group_id in self._buffered:
                picked.append(group_id)
        return picked

    def _overload_after_take(self, learner_version: int) -> int | None:
        """The first deadline that a take at `learner_version` would lose."""
        rest = self._deadlines.after_take(self.groups_per_take)
        taken = self._taken_now + self.groups_per_take
        if taken == self.groups_per_step:
            return self._overload(rest, learner_version + 1)
        return self._overload(rest, learner_version, taken)

    def _overload(
        self, deadlines: Mapping[int, int], next_version: int, taken: int = 0
    ) -> int | None:
        return first_overload(
            deadlines,
            next_version=next_version,
            groups_per_step=self.groups_per_step,
            taken=taken,
        )

    @property
    def _wanted(self) -> int:
        """How many finished groups the next take needs."""
        whole = self._whole_steps and self._taken_now == 0
        return self.groups_per_step if whole else self.groups_per_take

    @property
    def _has_enough(self) -> bool:
        return self.num_buffered >= self._wanted

    def _stop(self, group_id: int) -> Generating | None:
        """The group generates no longer; None when it did not."""
        started = self._generating.pop(group_id, None)
        if started is not None:
            self._deadlines.stop(started.deadline)
            self._generating_on[started.worker] -= 1
        return started

    def _keep(self, group_id: int, group: Buffered) -> None:
        self._buffered[group_id] = group
        self._deadlines.keep(group.deadline)
        heapq.heappush(self._by_deadline, (group.deadline, group_id))

    def _leave(self, group_id: int) -> Buffered:
        group = self._buffered.pop(group_id)
        self._deadlines.give(group.deadline)
        return group

    def _evict(self, group_id: int) -> str:
        """Ends the group; returns its worker."""
        started = self._stop(group_id)
        if started is not None:
            worker = started.worker  # it books the tokens
        else:
            finished = self._leave(group_id)
            worker = finished.worker
            self.tokens.end(TokenOutcome.EVICTED, finished.num_response_tokens)
        self._end(group_id, GroupOutcome.EVICTED)
        self._evicted_since_take.append(group_id)
        return worker

    def _finish_step(self, group_ids: Iterable[int], outcome: GroupOutcome) -> None:
        for group_id in group_ids:
            assert group_id in self._taken, (
                f"group {group_id} is not in a step and can't end as {outcome.value}"
            )
            taken = self._taken.pop(group_id)
            version = taken.version
            self.tokens.end(TokenOutcome(outcome.value), taken.group.num_response_tokens)
            # A skipped step changed no weights: its groups wait for no newer version.
            self._awaiting[group_id] = version + 1 if outcome is GroupOutcome.TRAINED else version
            self._ledger.end(group_id, outcome)
        open_versions = {taken.version for taken in self._taken.values()}
        for version in self._closed_logs.keys() - open_versions:
            del self._closed_logs[version]

    def _end(self, group_id: int, outcome: GroupOutcome | RejectReason) -> None:
        """The group trained nothing: its credit returns at once."""
        self._ledger.end(group_id, outcome)
        self._credits.give_back(group_id)
