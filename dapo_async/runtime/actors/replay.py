"""The replay actor: drives the replay buffer and owns the groups that are not trained yet.

Rollout workers call admit, offer, fail and hand_back; the driver calls the rest. The actor also
owns the position in the prompt stream.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray

from dapo_async.config import Config
from dapo_async.data import PromptStream, load_set, load_tokenizer
from dapo_async.replay import (
    BufferState,
    Filter,
    ReplayBuffer,
    StepAcceptance,
    StopReason,
    custom_filter,
    dynamic_sampling,
    has_tokens,
)
from dapo_async.replay.group_io import read_groups, write_groups
from dapo_async.runtime.actors.reports import ProcessInfo, ReplayReport
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.samples import choose_samples, write_rollouts
from dapo_async.types import Admission, AdmitReply, Completion, Group, TrainBatch
from dapo_async.utils.state_clock import StateClock

STATE_FILE, GROUPS_FILE = "replay.json", "groups.safetensors"
SAMPLE_GROUPS = 2  # per step in rollouts/, unless train.record asks for all
KEPT_ACCEPTANCES = 4  # steps whose reports may still be on their way
POLL_S = 2.0  # a worker's wait is answered at least this often: a longer silence means a hang


def write_state(folder: Path, state: BufferState) -> None:
    """The replay part of a checkpoint: the buffer's state as JSON, finished groups beside it."""
    write_groups(folder / GROUPS_FILE, [group.payload for group in state.buffered.values()])
    (folder / STATE_FILE).write_text(json.dumps(state.to_json()) + "\n")


def read_state(folder: Path) -> BufferState:
    """What `write_state` wrote."""
    groups = {group.group_id: group for group in read_groups(folder / GROUPS_FILE)}
    return BufferState.from_json(json.loads((folder / STATE_FILE).read_text()), groups)


def _filters(config: Config) -> list[Filter]:
    filters: list[Filter] = [has_tokens]
    if config.replay.dynamic_sampling:
        filters.append(dynamic_sampling)
    if config.replay.filter is not None:
        filters.append(custom_filter(config.replay.filter))
    return filters


class ReplayActor:
    """All waits share one condition; every change of the buffer wakes them."""

    def __init__(
        self, config: Config, *, incarnation: str, run_dir: RunDir, resume: Path | None = None
    ) -> None:
        """`resume`: the `state/` folder of the checkpoint to continue from."""
        self._config, self._run_dir = config, run_dir
        self._clock = StateClock("replay")
        self._prompts = load_set(
            config, config.data.train, load_tokenizer(Path(config.model.path)), training=True
        )
        self._stream = PromptStream(self._prompts.prompts, seed=config.seed)
        new_buffer = (
            partial(ReplayBuffer.from_snapshot, read_state(resume)) if resume else ReplayBuffer
        )
        self._buffer = new_buffer(
            groups_per_step=config.replay.groups_per_step,
            max_staleness=config.replay.max_staleness,
            num_steps=config.train.num_steps,
            filters=_filters(config),
            max_rejected_in_a_row=config.replay.max_rejected_in_a_row,
            incarnation=incarnation,
        )
        self._captured: BufferState | None = None
        self._in_training: tuple[int, Sequence[Group]] = (
            -1,
            (),
        )  # step and groups of the last take
        self._changed = asyncio.Condition()
        # By group id: of groups that were handed back, until they are admitted again.
        self._partial_completions: dict[int, tuple[Completion | None, ...]] = {}
        self._suspended: set[str] = set()  # workers that are admitted nothing
        # Worker → its evicted groups, which the next answer to that worker names.
        self._evicted: defaultdict[str, list[int]] = defaultdict(list)
        self._acceptance: dict[int, StepAcceptance] = {}
        self._first_admission_s: float | None = None
        self._clock.enter("wait")

    async def ready(self) -> ProcessInfo:
        return ProcessInfo.own("replay", self._prompts.summary)

    async def alive(self) -> None:
        """Never returns. The driver awaits it to notice the death of this actor."""
        await asyncio.Event().wait()

    async def admit(self, worker: str, num_groups: int) -> AdmitReply:
        """Answers when there is a credit or an evicted group of `worker`, and after `POLL_S`.

        A suspended worker is admitted nothing.
        """
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(
                        lambda: (
                            worker in self._evicted
                            or (worker not in self._suspended and self._may_admit())
                        )
                    ),
                    POLL_S,
                )
            except TimeoutError:
                return AdmitReply(())
            evicted = tuple(self._evicted.pop(worker, ()))
            if worker in self._suspended or not self._may_admit():
                return AdmitReply((), evicted)
            with self._clock.during("admit"):
                if self._first_admission_s is None:
                    self._first_admission_s = self._clock.now_s()
                # Lockstep admits a whole wave, whatever number of slots happens to be free.
                count = (
                    self._buffer.admissible()
                    if self._config.replay.lockstep
                    else min(num_groups, self._buffer.admissible())
                )
                group_ids = [self._buffer.admit(worker) for _ in range(count)]
                admissions = tuple(self._admission(group_id) for group_id in group_ids)
                return AdmitReply(admissions, evicted)

    def _admission(self, group_id: int) -> Admission:
        partial_completions = self._partial_completions.pop(group_id, ())
        return Admission(
            group_id,
            self._stream[group_id],
            self._config.replay.group_size,
            partial_completions if self._buffer.continues(group_id) else (),
        )

    async def suspend(self, worker: str, on: bool) -> None:
        """On: `worker` is admitted nothing from now on, requests under way included.

        Its engine is lost, so its weights do not follow the served version.
        """
        async with self._changed:
            (self._suspended.add if on else self._suspended.discard)(worker)
            self._changed.notify_all()

    def _may_admit(self) -> bool:
        return self._buffer.admissible() > 0 and not (
            self._config.replay.lockstep and self._buffer.num_generating
        )

    async def offer(self, worker: str, group: Group) -> tuple[int, ...]:
        """Returns the groups of `worker` that were evicted since its last call."""
        async with self._changed:
            with self._clock.during("offer"):
                self._buffer.offer(group, group)
            self._changed.notify_all()
            return tuple(self._evicted.pop(worker, ()))

    async def fail(self, group_ids: Sequence[int], why: str) -> None:
        """The worker gave these groups up: their credits return."""
        async with self._changed:
            for group_id in group_ids:
                self._buffer.fail(group_id, why=why)
            self._changed.notify_all()

    async def hand_back(
        self, group_id: int, partial_completions: tuple[Completion | None, ...]
    ) -> None:
        """The engine of this group was lost: the next worker that asks continues it."""
        async with self._changed:
            oldest_version = min(
                (each.oldest_version for each in partial_completions if each is not None),
                default=None,
            )
            if (
                self._buffer.hand_back(group_id, oldest_version=oldest_version)
                and oldest_version is not None
            ):
                self._partial_completions[group_id] = partial_completions
            self._changed.notify_all()

    async def take(self, learner_version: int) -> TrainBatch | StopReason:
        """The batch of the learner's next step, or the reason that ends the run.

        Raises TimeoutError after `deadlines.work_s`; its message says what the take waits for.
        """
        deadline_s = self._config.deadlines.work_s
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                while True:
                    with self._clock.during("take", f"version {learner_version}"):
                        for group_id, worker in self._buffer.evict_doomed(learner_version).items():
                            self._evicted[worker].append(group_id)
                            self._changed.notify_all()
                        batch = self._buffer.take(learner_version)
                        if batch is not None:
                            return await self._hand_over(batch)
                    # Groups that are still generating may fill a last batch.
                    stop_reason = self._buffer.stop_reason
                    if stop_reason is not None and self._buffer.num_generating == 0:
                        return stop_reason
                    await self._changed.wait()
        except TimeoutError as error:
            raise TimeoutError(
                f"take waited {deadline_s:g} s: {self._buffer.explain_wait(learner_version)}"
            ) from error

    async def _hand_over(self, batch: TrainBatch) -> TrainBatch:
        """Writes the step's samples and puts each group into Ray's store for the learner's ranks.

        This actor owns the objects.
        """
        step = batch.learner_version
        assert self._buffer.acceptance is not None
        self._acceptance[step] = self._buffer.acceptance
        self._acceptance.pop(step - KEPT_ACCEPTANCES, None)
        groups: Sequence[Group] = batch.references
        record = self._config.train.record
        count = len(groups) if record else SAMPLE_GROUPS
        write_rollouts(self._run_dir.rollouts, step=step, groups=choose_samples(groups, count))
        if record:
            await asyncio.to_thread(write_groups, self._run_dir.recorded_step(step), groups)
        self._in_training = (step, groups)
        return replace(batch, references=tuple(ray.put(group) for group in groups))

    async def trained(self, group_ids: Sequence[int], *, skipped: bool, non_finite: bool) -> None:
        """Books the batch that was taken last.

        A batch whose loss or gradient was not finite is kept on disk for inspection.
        """
        step, groups = self._in_training
        if non_finite:
            await asyncio.to_thread(write_groups, self._run_dir.non_finite_step(step), groups)
        async with self._changed:
            (self._buffer.skipped if skipped else self._buffer.trained)(group_ids)
            self._changed.notify_all()

    async def serve(self, version: int, release: Sequence[int] = ()) -> None:
        """Every engine serves `version`: the credits of the groups that trained it return."""
        async with self._changed:
            self._buffer.serve(version)
            self._buffer.release(release)
            self._changed.notify_all()

    async def lose_worker(self, worker: str) -> None:
        """`worker` is gone: the groups that it generated failed, their credits return."""
        async with self._changed:
            self._buffer.lose_worker(worker)
            self._evicted.pop(worker, None)
            self._changed.notify_all()

    async def close(self) -> None:
        """The run ends: groups in flight end unused, offers are refused."""
        async with self._changed:
            if not self._buffer.closed:
                self._buffer.close()
            self._buffer.check()
            self._changed.notify_all()

    async def capture_state(self, version: int) -> None:
        """Keeps the state of this moment, between two steps of the learner, for `save`."""
        async with self._changed:
            self._captured = self._buffer.snapshot(version)

    async def save(self, state: Path) -> None:
        """Writes the captured state into the folder `state`, beside everything else."""
        captured, self._captured = self._captured, None
        assert captured is not None, "save before capture_state"
        await asyncio.to_thread(write_state, state, captured)

    async def report(self) -> ReplayReport:
        buffer = self._buffer
        buffer.check()
        return ReplayReport(
            spans=tuple(self._clock.take_spans()),
            counts=buffer.counts,
            acceptance=dict(self._acceptance),
            first_admission_s=self._first_admission_s,
            buffered=buffer.num_buffered,
            generating=buffer.num_generating,
            credits_held=buffer.credits_held,
            served_version=buffer.served_version,
            failures=dict(buffer.failures),
        )
