"""The replay actor: drives the replay buffer and owns the groups that are not trained yet.

Rollout workers call exchange, evictions, fail and hand_back; the driver calls the rest. The actor
also owns the position in the prompt stream. Its methods change the buffer between two awaits, so
that they need no lock, and wake exactly the calls that can go on.

When its process dies, another one recovers from the journal (`replay_recovery.py`) and the callers
repeat their calls. So a call that is made twice has the effect of one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import ray

from dapo_async.config import Config
from dapo_async.data import PromptStream, load_set, load_tokenizer
from dapo_async.learner.batch_plan import pair_cost, share_minibatch
from dapo_async.model import ModelConfig
from dapo_async.replay import (
    BufferState,
    Filter,
    GroupOutcome,
    OfferOutcome,
    Pacer,
    Refusal,
    StopReason,
    TokenOutcome,
    custom_filter,
    dynamic_sampling,
    has_tokens,
    num_tokens,
)
from dapo_async.replay.grants import share_grants
from dapo_async.replay.group_io import take_rollouts
from dapo_async.replay.journal import Journal
from dapo_async.replay.quarantine import Quarantine
from dapo_async.reward import VERIFIER_FAILED
from dapo_async.runtime.actors.offers import Bytes, Exchange, from_arguments
from dapo_async.runtime.actors.once import answers_once
from dapo_async.runtime.actors.replay_files import Payload, ReplayFiles, write_state
from dapo_async.runtime.actors.replay_recovery import (
    book_batch,
    drop_batches,
    image_extras,
    keep_acceptance,
    new_start,
    payload_in,
    recovered_start,
)
from dapo_async.runtime.actors.reports import ProcessInfo, ReplayReport
from dapo_async.runtime.handles.redo_log import MOST_STEPS
from dapo_async.tracking.group_log import GroupLog
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import (
    Admission,
    Completion,
    Prompt,
    RejectReason,
    TrainBatch,
)
from dapo_async.utils.files import disk_fault
from dapo_async.utils.state_clock import StateClock
from dapo_async.utils.thread_stack import process_dump

# Offers that no incarnation of this run has generated: their tokens are not counted.
UNBOOKED = (Refusal.FOREIGN_INCARNATION, Refusal.UNKNOWN)
# A worker's wait is answered at least this often; twice as long without an answer means a hang.
ANSWER_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """An exchange that waits for credits."""

    num_groups: int  # groups that the worker may have open, these included
    granted: asyncio.Future[tuple[Admission, ...]]


def _filters(config: Config) -> list[Filter]:
    filters: list[Filter] = [has_tokens]
    if config.replay.dynamic_sampling:
        filters.append(dynamic_sampling)
    if config.replay.filter is not None:
        filters.append(custom_filter(config.replay.filter))
    return filters


@answers_once
class ReplayActor:
    """Workers wait for credits in the order of their calls; each change serves the first ones."""

    def __init__(
        self,
        config: Config,
        *,
        incarnation: str,
        run_dir: RunDir,
        resume: Path | None = None,
        process: int = 0,
    ) -> None:
        """`resume`: the `state/` folder of the checkpoint to continue from.

        `process`: replay actors of this incarnation that were before this one. If there were any,
        it goes on from their journal, and raises RuntimeError if there is none.
        """
        self._process = process
        self._config, self._run_dir = config, run_dir
        self._clock = StateClock("replay")
        self._prompts = load_set(
            config, config.data.train, load_tokenizer(Path(config.model.path)), training=True
        )
        self._stream = PromptStream(self._prompts.prompts, seed=config.seed)
        self._files = ReplayFiles(run_dir, record=config.train.record)
        options: dict[str, Any] = {
            "groups_per_step": config.replay.groups_per_step,
            "max_staleness": config.replay.max_staleness,
            "num_steps": config.train.num_steps,
            "filters": _filters(config),
            "max_rejected_in_a_row": config.replay.max_rejected_in_a_row,
            "incarnation": incarnation,
            "num_minibatches": config.learner.num_minibatches,
            "whole_steps": config.replay.admission == "lockstep" or config.model.is_shared,
        }
        journal = Journal(run_dir.journal)
        if process:
            self._state = state = recovered_start(options, journal)
        else:
            journal.remove()
            self._state = state = new_start(options, resume)
        self._buffer, self._book = state.buffer, state.book
        # Batches of the process before, of which the learner may have got the first one.
        self._left = deque(state.untrained)
        # By group id: of groups that were handed back, until they are admitted again.
        self._partial_completions: dict[int, tuple[Completion | None, ...]] = {}
        # Groups that the learner has got or gets next and that are not booked, by id.
        self._in_training: dict[int, Payload] = {
            group_id: payload
            for batch in state.untrained
            for group_id, payload in zip(batch.group_ids, batch.references, strict=True)
        }
        # The step that is open, or the newest one, and its groups that are booked, in their order.
        self._step = (
            state.untrained[0].learner_version if state.untrained else self._buffer.next_step
        )
        self._of_step: dict[int, Payload] = {
            group_id: payload_in(journal, group_id)
            for group_id, step in state.kept.items()
            if step == self._step
        }
        self._cut = self._buffer.cut_version  # the newest step that has ended early
        self._buffer.keep_journal(
            journal, data_of=attrgetter("data"), extras=partial(image_extras, state)
        )
        self._quarantine = Quarantine(
            len(self._prompts.prompts), run_dir.quarantined(), state.verifier
        )
        self._log = GroupLog(
            run_dir.groups,
            now_s=self._clock.now_s,
            incarnation=incarnation,
            version=self._buffer.learner_version,
            follow_every=config.replay.groups_per_step,
        )
        self._buffer.watch_ends(self._log_end)
        self._pair_cost = pair_cost(ModelConfig.from_folder(Path(config.model.path)))
        self._microbatch_tokens = config.learner.fixed_microbatch_tokens
        credits = (config.replay.max_staleness + 1) * config.replay.groups_per_step
        self._pacer = Pacer(groups_per_take=self._buffer.groups_per_take, credits=credits)
        # Engines that share devices do not generate while the learner trains: nothing to pace.
        self._paced = config.replay.admission == "paced" and not config.model.is_shared
        self._lockstep = config.replay.admission == "lockstep"
        self._next_start: asyncio.TimerHandle | None = None  # when the pacer lets a group start
        self._captured: BufferState | None = None
        self._news = asyncio.Event()  # the buffer has changed: a waiting take looks again
        # The batch of the next step, on its way into Ray's store; None: not complete yet.
        self._next_batch: asyncio.Task[TrainBatch] | None = None
        self._next_step = -1  # its step
        self._ahead: int | None = None  # the version whose batch may be taken before its take
        self._waiting: dict[str, Waiting] = {}  # by worker, the longest wait first
        self._eviction_waits: dict[str, asyncio.Future[None]] = {}  # by worker
        self._clock.enter("wait")

    async def ready(self) -> ProcessInfo:
        return ProcessInfo.own("replay", self._prompts.summary)

    async def plan_with(self, microbatch_tokens: int) -> None:
        """Plans minibatches in microbatches of so many tokens, as the learner has chosen."""
        self._microbatch_tokens = microbatch_tokens

    async def alive(self) -> None:
        """Never returns. The driver awaits it to notice the death of this actor."""
        await asyncio.Event().wait()

    async def ping(self) -> None:
        """Shows that the process lives and its event loop runs."""

    async def exchange(self, exchange: Exchange, *arguments: bytes) -> tuple[Admission, ...]:
        """Takes over the scored groups of the exchange, then waits for admissions.

        Without `num_free` the answer comes at once. The wait ends with the first credits, with the
        worker's next exchange, which asks in place of this one, and after `ANSWER_EVERY_S`. A
        suspended worker is admitted nothing.

        Admissions on their way to the worker count as open, so that it never gets too many.
        """
        worker, number = exchange.worker, exchange.number
        is_lost = self._book.is_lost(worker, exchange.start)
        if exchange.facts and not self._book.was_made(worker, number):
            with self._clock.during("offer"):
                tokens = self._offer(exchange, from_arguments(arguments, exchange.sizes))
                self._book.call(worker, number, tokens=0 if is_lost else tokens)
        if is_lost:  # a call that was under way when the process died
            self._changed()
            return ()
        before = self._waiting.get(worker)
        if before is not None:
            before.granted.set_result(())
        if not exchange.num_free:
            self._waiting.pop(worker, None)
            self._changed()
            return ()
        future = asyncio.get_running_loop().create_future()
        wait = Waiting(exchange.num_free + exchange.num_open, future)
        self._waiting[worker] = wait  # in the place of the wait before
        self._changed()
        await asyncio.wait([wait.granted], timeout=ANSWER_EVERY_S)
        if wait.granted.done():
            return wait.granted.result()
        del self._waiting[worker]
        return ()

    async def resume(self, worker: str, start: int, open_groups: Sequence[int]) -> None:
        """`worker`, which the process before has known, has these groups in hand.

        Other groups that it was admitted never reached it: they go to the next worker that asks.
        """
        if self._book.is_lost(worker, start):
            return
        lost = self._buffer.generating_on(worker) - {*open_groups}
        for group_id in sorted(lost):
            self._buffer.hand_back(group_id)
        self._log.add("handed_back", sorted(lost), tokens=0)
        self._changed()

    def _offer(self, exchange: Exchange, packed: Sequence[Bytes]) -> int:
        """Returns the response tokens that the buffer has booked."""
        several, booked = len(packed) > 1, 0
        records = exchange.records or [""] * len(packed)
        for offered, data, record in zip(exchange.facts, packed, records, strict=True):
            if exchange.again and not self._buffer.is_generating(offered.group_id):
                continue  # the process before has got it, or it has ended since
            whole = self._config.replay.filter is not None
            payload = Payload(offered, data)
            if self._quarantine.counts_failures:
                prompt = self._stream[offered.group_id]
                if self._quarantine.judged(prompt):
                    self._buffer.note("judged", row=prompt.row)
            self._log.offer(offered, worker=exchange.worker, record=record)
            result = self._buffer.offer(payload.group if whole else offered, payload)
            if result.outcome is OfferOutcome.REFUSED:
                self._log.add("refused", [offered.group_id], reason=result.reason)
            if result.outcome is OfferOutcome.ACCEPTED and several:
                payload.data = data.copy()  # a view would keep the bytes of all groups of the call
            if result.reason not in UNBOOKED:
                booked += offered.num_response_tokens
        return booked

    def _log_end(self, group_id: int, outcome: GroupOutcome | RejectReason) -> None:
        if isinstance(outcome, RejectReason):
            self._log.add("rejected", [group_id], reason=outcome.value)
        else:
            self._log.add(outcome.value, [group_id])

    def _changed(self) -> None:
        """After each change of the buffer: everything that has become possible happens now."""
        if self._log.is_full:
            self._files.write_log(self._log)
        self._buffer.begin_segment_if_long()
        if (fault := self._buffer.take_journal_fault()) is not None:
            self._files.refused("journal/", disk_fault(fault))
        self._grant()
        self._take_ahead()
        self._news.set()

    def _grant(self) -> None:
        """Admits groups to the workers that wait, so that they have about equally many."""
        if not self._waiting:
            return
        admissible = self._num_admissible()
        wanted = {
            worker: max(0, wait.num_groups - self._buffer.num_generating_on(worker))
            for worker, wait in self._waiting.items()
            if worker not in self._book.suspended
        }
        if self._lockstep and any(wanted.values()):
            # Lockstep admits a whole wave, whatever number of slots happens to be free.
            granted = {next(iter(wanted)): admissible} if admissible else {}
        else:
            granted = share_grants(wanted, admissible)
        for worker, count in granted.items():
            with self._clock.during("admit"):
                if self._state.first_admission_s is None:
                    self._state.first_admission_s = now_s = self._clock.now_s()
                    self._buffer.note("first", s=now_s)
                group_ids = [self._admit(worker) for _ in range(count)]
                admissions = tuple(map(self._admission, group_ids))
                for admission in admissions:
                    tokens = num_tokens(admission.partial_completions)
                    self._state.partial_tokens.pop(admission.group_id, None)
                    self._book.add_tokens(worker, -tokens)
                rows = [admission.prompt.row for admission in admissions]
                self._log.admit(group_ids, worker=worker, version=self._served_version, rows=rows)
                self._waiting.pop(worker).granted.set_result(admissions)
            admissible -= count
        if admissible == 0:
            self._grant_at_next_start()

    def _admit(self, worker: str) -> int:
        """Admits the next group. Groups of prompts in quarantine end as failed at once."""
        while True:
            group_id = self._buffer.admit(worker)
            if not self._quarantine.rows or not self._quarantine.holds(self._stream[group_id]):
                return group_id
            self._buffer.fail(group_id, why="prompt in quarantine")

    def _num_admissible(self) -> int:
        """Groups that may start now: what the credits allow, and no more than the pacer wants."""
        if self._lockstep and self._buffer.num_generating:
            return 0  # the next wave starts when this one has ended
        admissible = self._buffer.admissible()
        if not self._paced or not admissible:
            return admissible
        room = self._pacer.room(
            self._clock.now_s(), out=self._num_out, served_version=self._served_version
        )
        return min(admissible, room)

    def _grant_at_next_start(self) -> None:
        """Where only the pacer holds groups back, grants when it no longer waits for weights."""
        if not self._paced or not self._waiting or not self._buffer.admissible():
            return
        now_s = self._clock.now_s()
        start_s = self._pacer.next_start_s(now_s, served_version=self._served_version)
        if self._next_start is not None:
            self._next_start.cancel()
            self._next_start = None
        if start_s is not None:
            loop = asyncio.get_running_loop()
            self._next_start = loop.call_later(start_s - now_s, self._grant)

    def _pacing(self) -> str:
        """What a passed deadline says of the pacer: nothing while every credit may be used."""
        if not self._paced or self._num_admissible() >= self._buffer.admissible():
            return ""
        return f"; admission is paced: at most {self._pacer.limit} groups are out"

    @property
    def _served_version(self) -> int:
        served_version = self._buffer.served_version
        return -1 if served_version is None else served_version

    @property
    def _num_out(self) -> int:
        """Groups that generate or are finished, and that the learner has not got."""
        ahead = self._buffer.groups_per_take if self._next_batch is not None else 0
        return self._buffer.num_generating + self._buffer.num_buffered + ahead

    def _admission(self, group_id: int) -> Admission:
        partial_completions = self._partial_completions.pop(group_id, ())
        if not self._buffer.continues(group_id):
            self._end_tokens(TokenOutcome.REPEATED, num_tokens(partial_completions), group_id)
            partial_completions = ()
        return Admission(
            group_id, self._stream[group_id], self._config.replay.group_size, partial_completions
        )

    def _end_tokens(self, outcome: TokenOutcome, count: int, group_id: int = -1) -> None:
        """Tokens of partial completions end here."""
        self._state.partial_tokens.pop(group_id, None)
        if count:
            self._buffer.tokens.end(outcome, count)
            self._buffer.note("ended", o=outcome.value, n=count, id=group_id)

    async def evictions(self, worker: str) -> tuple[int, ...]:
        """Waits for evicted groups of `worker`; names none after `ANSWER_EVERY_S`."""
        if worker not in self._state.evicted:
            wait = asyncio.get_running_loop().create_future()
            self._eviction_waits[worker] = wait
            await asyncio.wait([wait], timeout=ANSWER_EVERY_S)
        return tuple(self._state.evicted.pop(worker, ()))

    def _evict(self, group_id: int, worker: str) -> None:
        self._state.evicted[worker].append(group_id)
        wait = self._eviction_waits.pop(worker, None)
        if wait is not None and not wait.done():
            wait.set_result(None)

    async def suspend(self, worker: str, on: bool) -> None:
        """On: `worker` is admitted nothing from now on, requests under way included.

        Its engine is lost, so its weights do not follow the served version.
        """
        self._book.suspend(worker, on)
        self._changed()

    async def fail(self, group_ids: Sequence[int], why: str, detail: str = "") -> None:
        """The worker gave these groups up: their credits return. `why` is counted."""
        self._log.add("given_up", group_ids, why=why)
        for group_id in group_ids:
            if self._buffer.fail(group_id, why=why) and why == VERIFIER_FAILED:
                self._verifier_failed(self._stream[group_id], detail)
        self._changed()

    def _verifier_failed(self, prompt: Prompt, detail: str) -> None:
        row = self._quarantine.failed(prompt, detail)
        self._buffer.note("unjudged", row=prompt.row)
        if row is not None:
            self._files.write_quarantine(row)

    async def hand_back(
        self,
        worker: str,
        group_id: int,
        partial_completions: tuple[Completion | None, ...],
        number: int = -1,
    ) -> None:
        """The engine of this group was lost: the next worker that asks continues it.

        `number`: of the call.
        """
        tokens = num_tokens(partial_completions)
        if self._book.was_made(worker, number):
            return
        self._book.call(worker, number, tokens=tokens)
        oldest_version = min(
            (each.oldest_version for each in partial_completions if each is not None),
            default=None,
        )
        self._log.add("handed_back", [group_id], tokens=tokens)
        if not self._buffer.hand_back(group_id, oldest_version=oldest_version):
            outcome = TokenOutcome.UNUSED if self._buffer.closed else TokenOutcome.EVICTED
            self._end_tokens(outcome, tokens)
        elif oldest_version is not None:
            self._partial_completions[group_id] = partial_completions
            self._state.partial_tokens[group_id] = tokens
            self._buffer.note("partial", id=group_id, n=tokens)
        self._changed()

    async def take(self, learner_version: int) -> TrainBatch | StopReason:
        """The next minibatch of the learner's step, or the reason that ends the run.

        Raises TimeoutError after `deadlines.work_s`; its message says what the take waits for.
        """
        deadline_s, self._ahead = self._config.deadlines.work_s, None
        self._pacer.asks(
            self._clock.now_s(),
            version=learner_version,
            finished=self._num_out - self._buffer.num_generating,
            engines_wait=bool(self._waiting),
        )
        try:
            async with asyncio.timeout(deadline_s):
                self._hand_over_again()
                while self._next_batch is None:
                    with self._clock.during("take", f"version {learner_version}"):
                        for group_id, worker in self._buffer.evict_doomed(learner_version).items():
                            self._evict(group_id, worker)
                        batch = self._buffer.take(learner_version)
                        if batch is not None:
                            self._put(batch)
                            break
                    # Evictions return credits.
                    self._changed()
                    # Groups that are still generating may fill a last batch.
                    if self._quarantine.fault is not None:
                        raise RuntimeError(self._quarantine.fault)
                    stop_reason = self._buffer.stop_reason
                    if stop_reason is not None and self._buffer.num_generating == 0:
                        return stop_reason
                    self._news.clear()
                    await self._news.wait()
                    self._assert_open(learner_version)
                assert self._next_batch is not None
                batch = await asyncio.shield(self._next_batch)
                self._assert_open(learner_version)
        except TimeoutError as error:
            raise TimeoutError(
                f"take waited {deadline_s:g} s: {self._buffer.explain_wait(learner_version)}"
                f"{self._pacing()}"
            ) from error
        assert batch.learner_version == learner_version, (batch.learner_version, learner_version)
        self._next_batch = None
        self._pacer.took(self._clock.now_s())
        if self._buffer.steps_left and not self._lockstep and not self._left:
            self._ahead = learner_version + batch.closes_step
        self._changed()
        return batch

    def _hand_over_again(self) -> None:
        """The next batch is one of the process before, if it has left one."""
        if self._left and self._next_batch is None:
            batch = self._left.popleft()
            self._next_step = batch.learner_version
            self._next_batch = asyncio.create_task(self._stored(batch))

    def _assert_open(self, step: int) -> None:
        """Ends a take whose caller is gone. Ray does not cancel it with its caller."""
        assert step > self._cut, f"step {step} was cut"

    def _take_ahead(self) -> None:
        """Takes the next minibatch as soon as it is complete, while the learner trains on the last.

        The take before has been made, so this one leaves the buffer as it would later. A group that
        finishes meanwhile is in a later batch: `can_take` keeps its deadline.
        """
        if self._ahead is None or not self._buffer.can_take(self._ahead):
            return
        with self._clock.during("take", f"version {self._ahead}, ahead"):
            batch = self._buffer.take(self._ahead)
        assert batch is not None
        self._ahead = None
        self._put(batch)

    def _put(self, batch: TrainBatch) -> None:
        """Books a batch that was just taken and puts it into Ray's store, beside this thread."""
        if batch.closes_step:
            keep_acceptance(self._state, batch.learner_version)
        self._next_step = batch.learner_version
        self._log.add("taken", batch.group_ids, step=batch.learner_version)
        self._state.untrained.append(batch)
        self._in_training.update(zip(batch.group_ids, batch.references, strict=True))
        self._next_batch = asyncio.create_task(self._stored(batch))

    async def _stored(self, batch: TrainBatch) -> TrainBatch:
        """The batch with one object per data-parallel rank. This actor owns the objects."""
        references = await asyncio.to_thread(self._put_shares, batch.references)
        return replace(batch, references=references, process=self._process)

    def _put_shares(self, payloads: Sequence[Payload]) -> tuple[Any, ...]:
        learner = self._config.learner
        shares = share_minibatch(
            [payload.facts for payload in payloads],
            num_ranks=learner.data_parallel,
            max_tokens=self._microbatch_tokens,
            pair_cost=self._pair_cost,
        )
        return tuple(
            ray.put(
                (
                    share,
                    [
                        take_rollouts(payloads[each.position].data, each.siblings)
                        for each in share.groups
                    ],
                )
            )
            for share in shares
        )

    async def again(self, batch: TrainBatch) -> TrainBatch:
        """`batch` with new objects: those of the process before are gone with it."""
        payloads = await asyncio.to_thread(
            lambda: tuple(self._payload(group_id) for group_id in batch.group_ids)
        )
        return await self._stored(replace(batch, references=payloads))

    def _payload(self, group_id: int) -> Payload:
        """A group of the learner, from memory or from the journal."""
        known = self._in_training.get(group_id) or self._of_step.get(group_id)
        if known is not None:
            return known
        assert self._buffer.journal is not None
        return payload_in(self._buffer.journal, group_id)

    async def trained(
        self,
        step: int,
        group_ids: Sequence[int],
        *,
        non_finite: bool,
        held: bool = False,
        guarded: bool = False,
    ) -> None:
        """Books a minibatch of `step`; one that is `non_finite` or `held` has changed no weight.

        A minibatch whose loss or gradient was not finite is kept on disk for inspection, and so is
        a `guarded` one. A minibatch that was booked before is not booked again.
        """
        await self._files.written()  # of the minibatch before
        batch = book_batch(self._state, group_ids)
        if batch is None:
            return
        if self._left and self._left[0].group_ids == batch.group_ids:
            self._left.popleft()  # the learner had got it
        (self._buffer.skipped if non_finite or held else self._buffer.trained)(group_ids)
        self._log.trained(group_ids, step=step)
        payloads = {group_id: self._in_training.pop(group_id) for group_id in group_ids}
        if step != self._step:
            self._step, self._of_step = step, {}
        self._of_step |= payloads
        if batch.closes_step:
            self._write_step()
        self._files.write_log(self._log)
        if non_finite or guarded:
            kind = "non_finite" if non_finite else "guarded"
            await self._files.keep_batch(kind, step, [*payloads.values()])
        self._forget(step - MOST_STEPS)

    def _write_step(self) -> None:
        """Writes samples of the step, which has ended, and frees its groups."""
        prompts = [self._stream[group_id].text for group_id in self._of_step]
        self._files.write_step(self._step, [*self._of_step.values()], prompts)
        self._of_step = {}

    async def checkpointed(self, version: int) -> None:
        """A checkpoint of `version` is on disk: a restarted learner needs no step before it."""
        self._forget(version - 1)

    def _forget(self, step: int) -> None:
        """The groups of this step and of those before it need not be kept in the journal."""
        kept, journal = self._state.kept, self._buffer.journal
        for group_id in [each for each, of_step in kept.items() if of_step <= step]:
            del kept[group_id]
        if journal is not None and journal.is_open:
            journal.forget({*kept, *self._in_training, *self._buffer.buffered})

    async def cut(self, step: int) -> None:
        """The learner has ended `step` before its last minibatch: the run ends, or a loss was not
        finite. The groups that it has not trained are for later steps."""
        if step <= self._cut:
            return  # the process before has done it
        self._cut, self._ahead = step, None
        if self._next_batch is not None and self._next_step == step:
            self._next_batch = None
        returned = self._buffer.cut_step(step)
        self._log.add("returned", returned, step=step)
        drop_batches(self._state, returned)
        self._left = deque(batch for batch in self._left if batch.learner_version != step)
        for group_id in returned:
            del self._in_training[group_id]
        if step not in self._state.acceptance:
            keep_acceptance(self._state, step)
        if self._step == step and self._of_step:
            self._write_step()
        self._news.set()  # ends a take of the step whose caller is gone
        if self._buffer.steps_left and not self._lockstep and self._next_batch is None:
            self._ahead = step + 1
        self._changed()

    async def serve(self, version: int, release: Sequence[int] = ()) -> None:
        """Every engine serves `version`: the credits of the groups that trained it return."""
        self._buffer.serve(version)
        self._buffer.release([each for each in release if self._buffer.awaits(each)])
        self._log.add("released", release, version=version)
        self._changed()

    async def lose_worker(self, worker: str, start: int) -> int:
        """The process of `worker` that was started after `start` others is gone.

        The groups that it generated are admitted again, to the next worker that asks. Returns the
        response tokens that all processes of the worker have brought, less those that they got.
        """
        self._book.lose(worker, start)
        self._log.add("handed_back", self._buffer.lose_worker(worker), tokens=0)
        self._state.evicted.pop(worker, None)
        waiting = self._waiting.pop(worker, None)
        if waiting is not None and not waiting.granted.done():
            waiting.granted.set_result(())
        self._changed()
        return self._book.balance[worker]

    async def close(self) -> None:
        """The run ends: groups in flight end unused, offers are refused."""
        if not self._buffer.closed:
            self._buffer.close()
            for group_id, partial_completions in self._partial_completions.items():
                self._end_tokens(TokenOutcome.UNUSED, num_tokens(partial_completions), group_id)
            self._partial_completions.clear()
        self._buffer.check()
        self._ahead = None
        self._news.set()
        self._files.write_log(self._log)
        await self._files.written()
        if self._buffer.journal is not None:  # the last checkpoint has everything
            self._buffer.journal.close()
            await asyncio.to_thread(self._buffer.journal.remove)

    async def capture_state(self, version: int) -> None:
        """Keeps the state of this moment, between two steps of the learner, for `save`."""
        self._captured = self._buffer.snapshot(version)
        self._buffer.begin_segment()

    async def save(self, state: Path) -> None:
        """Writes the captured state into the folder `state`, beside everything else."""
        captured, self._captured = self._captured, None
        assert captured is not None, "save before capture_state"
        await asyncio.to_thread(write_state, state, captured)

    async def dump(self) -> str:
        """What this process does now."""
        return process_dump(self._clock, self._buffer.counts)

    async def report(self) -> ReplayReport:
        buffer = self._buffer
        buffer.check()
        return ReplayReport(
            spans=tuple(self._clock.take_spans()),
            counts=buffer.counts,
            acceptance=dict(self._state.acceptance),
            first_admission_s=self._state.first_admission_s,
            buffered=buffer.num_buffered,
            generating=buffer.num_generating,
            credits_held=buffer.credits_held,
            served_version=buffer.served_version,
            failures=dict(buffer.failures),
            tokens=buffer.tokens.counts,
            offered=buffer.num_offered,
            accepted=buffer.num_accepted,
            quarantined=self._quarantine.lines,
            unwritten=dict(self._files.unwritten),
            disk_fault=self._files.disk_fault,
            flow=tuple(self._log.take_points()),
        )
