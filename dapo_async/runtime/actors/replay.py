"""The replay actor: drives the replay buffer, owns the prompt cursor and the payloads of all groups that are not yet trained."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
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
    freeze,
    has_tokens,
)
from dapo_async.replay.group_io import read_groups, write_groups
from dapo_async.runtime.actors.reports import ProcessInfo, ReplayReport
from dapo_async.tracking.run_dir import RunDir, write_rollouts
from dapo_async.types import Admission, AdmitReply, Completion, Group, TrainBatch
from dapo_async.utils.state_clock import StateClock

STATE_FILE, GROUPS_FILE = "replay.json", "groups.safetensors"
SAMPLE_GROUPS = 2  # per step in rollouts/, unless train.record asks for all
KEPT_ACCEPTANCES = 4  # steps whose reports may still be on their way
POLL_S = 2.0  # a worker's wait is answered at least this often: a longer silence tells it that this actor hangs


def write_state(folder: Path, state: BufferState) -> None:
    """The replay room's part of a checkpoint: the machine's state as JSON, the finished groups beside it."""
    write_groups(folder / GROUPS_FILE, [group.payload for group in state.buffered.values()])
    (folder / STATE_FILE).write_text(json.dumps(state.to_json()) + "\n")


def read_state(folder: Path) -> BufferState:
    """What `write_state` wrote."""
    groups = {group.group_id: group for group in read_groups(folder / GROUPS_FILE)}
    return BufferState.from_json(json.loads((folder / STATE_FILE).read_text()), groups)


class ReplayActor:
    """Waits are condition waits on the one buffer; every change wakes them."""

    def __init__(
        self, config: Config, *, incarnation: str, run_dir: RunDir, resume: Path | None = None
    ) -> None:
        """`resume`: the `state/` folder of the checkpoint to go on from."""
        self._config, self._run_dir = config, run_dir
        self._clock = StateClock("replay")
        self._prompts = load_set(
            config, config.data.train, load_tokenizer(Path(config.model.path)), training=True
        )
        self._stream = PromptStream(self._prompts.prompts, seed=config.seed)
        filters: list[Filter] = [
            has_tokens,
            *([dynamic_sampling] if config.replay.dynamic_sampling else []),
        ]
        if config.replay.filter is not None:
            filters.append(custom_filter(config.replay.filter))
        self._buffer = ReplayBuffer(
            groups_per_step=config.replay.groups_per_step,
            max_staleness=config.replay.max_staleness,
            num_steps=config.train.num_steps,
            filters=filters,
            patience=config.replay.max_rejected_in_a_row,
            incarnation=incarnation,
            lineage=read_state(resume) if resume else None,
        )
        self._frozen: BufferState | None = None
        self._in_training: tuple[int, Sequence[Group]] = (
            -1,
            (),
        )  # the step that the newest batch is for
        self._changed = asyncio.Condition()
        self._partial_completions: dict[
            int, tuple[Completion | None, ...]
        ] = {}  # of groups that were handed back, until they are admitted again
        self._suspended: set[str] = set()  # workers that are admitted nothing
        # Worker → its groups that were evicted and are to be aborted: its next answer names them.
        self._evicted: defaultdict[str, list[int]] = defaultdict(list)
        self._acceptance: dict[int, StepAcceptance] = {}
        self._first_admission_s: float | None = None
        self._clock.enter("wait")

    async def ready(self) -> ProcessInfo:
        return ProcessInfo.own("replay", self._prompts.summary)

    async def alive(self) -> None:
        """Never returns: the driver watches it, for it ends with the actor's life."""
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
                            worker in self._suspended
                            or worker in self._evicted
                            or self._may_admit()
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
                # In lockstep a wave is admitted whole: how full the engine is at this moment must not matter.
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
            partial_completions if self._buffer.goes_on(group_id) else (),
        )

    async def suspend(self, worker: str, on: bool) -> None:
        """On: `worker` is admitted nothing from now on, requests under way included: its engine is lost, so it does not follow what is served."""
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
        """Groups that their worker gave up: their credits return."""
        async with self._changed:
            for group_id in group_ids:
                self._buffer.fail(group_id, why=why)
            self._changed.notify_all()

    async def hand_back(
        self, group_id: int, partial_completions: tuple[Completion | None, ...]
    ) -> None:
        """A group whose engine was lost: whoever asks next generates it, from where `partial_completions` end."""
        async with self._changed:
            oldest_version = min(
                (partial.oldest_version for partial in partial_completions if partial is not None),
                default=None,
            )
            if (
                self._buffer.hand_back(group_id, oldest_version=oldest_version)
                and oldest_version is not None
            ):
                self._partial_completions[group_id] = partial_completions
            self._changed.notify_all()

    async def take(self, learner_version: int) -> TrainBatch | StopReason:
        """The batch of the learner's next step, or the verdict that ends the run. Raises TimeoutError that says who waits for whom."""
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
                    # Groups still on their way may yet fill a batch; only when nothing moves is the verdict the answer.
                    if self._buffer.verdict is not None and self._buffer.num_generating == 0:
                        return self._buffer.verdict
                    await self._changed.wait()
        except TimeoutError as error:
            raise TimeoutError(
                f"take waited {deadline_s:g} s: {self._buffer.explain_wait(learner_version)}"
            ) from error

    async def _hand_over(self, batch: TrainBatch) -> TrainBatch:
        """Writes the step's samples and puts each group where the learner's ranks can fetch it; this actor owns the objects."""
        step = batch.learner_version
        assert self._buffer.acceptance is not None
        self._acceptance[step] = self._buffer.acceptance
        self._acceptance.pop(step - KEPT_ACCEPTANCES, None)
        groups: Sequence[Group] = batch.references
        # The samples are those that asynchrony touched most: generated under the most weight versions, then under the oldest.
        telling = sorted(
            groups,
            key=lambda group: (
                -len(group.weight_versions),
                group.oldest_version,
                group.group_id,
            ),
        )
        record = self._config.train.record
        shown = telling if record else telling[:SAMPLE_GROUPS]
        write_rollouts(self._run_dir.rollouts, step=step, groups=shown)
        if record:
            await asyncio.to_thread(write_groups, self._run_dir.recorded_step(step), groups)
        self._in_training = (step, groups)
        return replace(batch, references=tuple(ray.put(group) for group in groups))

    async def trained(self, group_ids: Sequence[int], *, skipped: bool, non_finite: bool) -> None:
        """Books the batch that was taken last; one whose loss or gradient was not finite is kept on disk, to be looked at."""
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
        """`worker` is gone: what it was generating failed, its credits return."""
        async with self._changed:
            self._buffer.lose_worker(worker)
            self._evicted.pop(worker, None)
            self._changed.notify_all()

    async def close(self) -> None:
        """The run ends: what is in flight ends unused, offers are refused."""
        async with self._changed:
            if not self._buffer.closed:
                self._buffer.close()
            self._buffer.check()
            self._changed.notify_all()

    async def capture_state(self, version: int) -> None:
        """Holds on to the state of this moment, between two steps of the learner, for `save`."""
        async with self._changed:
            self._frozen = freeze(self._buffer, version)

    async def save(self, state: Path) -> None:
        """Writes the captured state into the folder `state`, beside everything else."""
        frozen, self._frozen = self._frozen, None
        assert frozen is not None, "save before capture_state"
        await asyncio.to_thread(write_state, state, frozen)

    async def report(self) -> ReplayReport:
        buffer = self._buffer
        buffer.check()
        return ReplayReport(
            spans=tuple(self._clock.take_spans()),
            counts=buffer.counts,
            acceptance=dict(self._acceptance),
            verdict=buffer.verdict,
            first_admission_s=self._first_admission_s,
            buffered=buffer.num_buffered,
            generating=buffer.num_generating,
            credits_held=buffer.credits_held,
            served_version=buffer.served_version,
            failures=dict(buffer.failures),
        )
