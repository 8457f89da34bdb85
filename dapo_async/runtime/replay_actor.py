"""The replay actor: drives the replay buffer, owns the prompt cursor and the payloads of all groups that are not yet trained."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray

from dapo_async.clock import StateClock
from dapo_async.config import Config
from dapo_async.data import PromptStream, load_tokenizer
from dapo_async.replay import OfferOutcome, ReplayBuffer, StepAcceptance, Verdict, dynamic_sampling, has_tokens
from dapo_async.runtime.inputs import load_set
from dapo_async.runtime.reports import ProcessInfo, ReplayReport
from dapo_async.tracking.run_dir import write_rollouts
from dapo_async.types import Admission, Group, TrainBatch

KEPT_ACCEPTANCES = 4  # steps whose reports may still be on their way
POLL_S = 2.0  # a worker's wait is answered at least this often: a longer silence tells it that this actor hangs


class ReplayActor:
    """Waits are condition waits on the one buffer; every change wakes them."""

    def __init__(self, config: Config, *, incarnation: str, rollouts: Path) -> None:
        self._config, self._rollouts = config, rollouts
        self._clock = StateClock("replay")
        self._prompts = load_set(config, config.data.train, load_tokenizer(Path(config.model.path)))
        self._stream = PromptStream(self._prompts.prompts, seed=config.seed)
        filters = (has_tokens, dynamic_sampling) if config.replay.dynamic_sampling else (has_tokens,)
        self._buffer = ReplayBuffer(
            groups_per_step=config.replay.groups_per_step,
            max_staleness=config.replay.max_staleness,
            num_steps=config.train.num_steps,
            filters=filters,
            patience=config.replay.patience,
            incarnation=incarnation,
        )
        self._changed = asyncio.Condition()
        self._aborts: defaultdict[str, list[int]] = defaultdict(list)
        self._acceptance: dict[int, StepAcceptance] = {}
        self._first_admission_s: float | None = None
        self._clock.enter("wait")

    async def ready(self) -> ProcessInfo:
        return ProcessInfo("replay", os.getpid(), ray.util.get_node_ip_address(), self._prompts.summary)

    async def alive(self) -> None:
        """Never returns: the driver watches it, for it ends with the actor's life."""
        await asyncio.Event().wait()

    async def admit(self, worker: str, num_groups: int) -> list[Admission]:
        """Up to `num_groups` admissions for `worker` as soon as there is a credit; none after `POLL_S` without."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._buffer.admissible() > 0), POLL_S)
            except TimeoutError:
                return []
            with self._clock.during("admit"):
                if self._first_admission_s is None:
                    self._first_admission_s = self._clock.now_s()
                count = min(num_groups, self._buffer.admissible())
                return [Admission(self._buffer.admit(worker), self._stream.next(), self._config.replay.group_size) for _ in range(count)]

    async def offer(self, group: Group) -> OfferOutcome:
        async with self._changed:
            with self._clock.during("offer"):
                outcome = self._buffer.offer(group, group).outcome
            self._changed.notify_all()
            return outcome

    async def doomed(self, worker: str) -> list[int]:
        """Groups of `worker` that were evicted while it generates them, as soon as there is one; none after `POLL_S` without."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: bool(self._aborts[worker])), POLL_S)
            except TimeoutError:
                return []
            return self._aborts.pop(worker)

    async def fail(self, indices: Sequence[int], why: str) -> None:
        """Groups that their worker gave up: their credits return."""
        async with self._changed:
            for index in indices:
                self._buffer.fail(index, why=why)
            self._changed.notify_all()

    async def take(self, learner_version: int, deadline_s: float) -> TrainBatch | Verdict:
        """The batch of the learner's next step, or the verdict that ends the run. Raises TimeoutError that says who waits for whom."""
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                while True:
                    with self._clock.during("take", f"version {learner_version}"):
                        for index, worker in self._buffer.evict_doomed(learner_version).items():
                            self._aborts[worker].append(index)
                            self._changed.notify_all()
                        batch = self._buffer.take(learner_version)
                        if batch is not None:
                            return self._hand_over(batch)
                    # Groups still on their way may yet fill a batch; only when nothing moves is the verdict the answer.
                    if self._buffer.verdict is not None and self._buffer.num_generating == 0:
                        return self._buffer.verdict
                    await self._changed.wait()
        except TimeoutError as error:
            raise TimeoutError(f"take waited {deadline_s:g} s: {self._buffer.explain_wait(learner_version)}") from error

    def _hand_over(self, batch: TrainBatch) -> TrainBatch:
        """Writes the step's samples and puts each group where the learner's ranks can fetch it; this actor owns the objects."""
        assert self._buffer.acceptance is not None
        self._acceptance[batch.learner_version] = self._buffer.acceptance
        self._acceptance.pop(batch.learner_version - KEPT_ACCEPTANCES, None)
        groups: Sequence[Group] = batch.references
        # The samples are those that asynchrony touched most: generated under the most weight versions, then under the oldest.
        telling = sorted(groups, key=lambda group: (-len(group.weight_versions), group.oldest_version, group.admission_index))
        write_rollouts(self._rollouts, step=batch.learner_version, groups=telling[: self._config.train.sample_groups])
        return replace(batch, references=tuple(ray.put(group) for group in groups))

    async def trained(self, indices: Sequence[int], *, skipped: bool) -> None:
        async with self._changed:
            (self._buffer.skipped if skipped else self._buffer.trained)(indices)
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
            self._changed.notify_all()

    async def close(self) -> None:
        """The run ends: what is in flight ends unused, offers are refused."""
        async with self._changed:
            if not self._buffer.closed:
                self._buffer.close()
            self._buffer.check()
            self._changed.notify_all()

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
