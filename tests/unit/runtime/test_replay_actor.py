"""The replay actor without Ray: its answers to workers, and the batches that it keeps on disk."""

from __future__ import annotations

import asyncio
import errno
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from paths import QUICKSTART
from replay_world import make_group

from dapo_async import config as knobs
from dapo_async.replay import StopReason, TokenOutcome, quarantine
from dapo_async.replay.group_io import pack_group, read_groups, unpack_group
from dapo_async.reward import VERIFIER_FAILED
from dapo_async.reward.verdict import TOO_FEW_VERDICTS
from dapo_async.runtime.actors import replay as replay_actor
from dapo_async.runtime.actors import replay_files
from dapo_async.runtime.actors.offers import Exchange, from_arguments, to_arguments
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import Group, GroupFacts, TrainBatch


class Actor(replay_actor.ReplayActor):
    """Called as `ReplayClient` calls it."""

    async def ask(self, worker: str, num_free: int) -> list[int]:
        """The ids of the groups that `worker` is admitted, which has none in hand."""
        exchange = Exchange(worker, num_free, 0)
        return [each.group_id for each in await self.exchange(exchange)]

    async def offer(self, worker: str, *groups: Group, num_free: int = 0) -> list[int]:
        packed = [pack_group(group) for group in groups]
        facts, sizes = [GroupFacts.of(group) for group in groups], [len(data) for data in packed]
        exchange = Exchange(worker, num_free, 0, facts, sizes)
        admissions = await self.exchange(exchange, *to_arguments(packed))
        return [each.group_id for each in admissions]


@pytest.fixture
def make_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Actor]:
    """An actor for one group per minibatch, without Ray; takes wait for 0.5 s."""
    monkeypatch.setattr("ray.put", lambda share: share)
    (tmp_path / "rollouts").mkdir()
    config = knobs.load(QUICKSTART)

    def make(
        max_staleness: int,
        num_minibatches: int = 1,
        data_parallel: int = 1,
        process: int = 0,
        placement: Literal["separate", "shared"] = "separate",
    ) -> Actor:
        small = replace(
            config.replay,
            groups_per_step=num_minibatches,
            group_size=2,
            max_staleness=max_staleness,
            dynamic_sampling=False,
        )
        return Actor(
            replace(
                config,
                model=replace(config.model, placement=placement),
                replay=small,
                learner=replace(
                    config.learner, num_minibatches=num_minibatches, data_parallel=data_parallel
                ),
                deadlines=replace(config.deadlines, work_s=0.5),
            ),
            incarnation="first",
            run_dir=RunDir(tmp_path),
            process=process,
        )

    return make


def test_each_rank_is_sent_its_rollouts_only_with_the_rewards_of_all_siblings(
    make_actor: Callable[..., Actor],
) -> None:
    async def scene() -> tuple[Group, TrainBatch]:
        actor = make_actor(0, data_parallel=2)
        await actor.serve(0)
        (group_id,) = await actor.ask("rollout-0", 1)
        group = make_group(group_id, incarnation="first")
        first, second = group.rollouts
        longer = replace(first.completion, token_ids=np.arange(3, dtype=np.int32))
        group = replace(group, rollouts=(replace(first, completion=longer), second))
        await actor.offer("rollout-0", group)
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        return group, batch

    group, batch = asyncio.run(scene())
    assert len(batch.references) == 2
    trained = set()
    for share, packed in batch.references:
        (of_group,), (part,) = share.groups, map(unpack_group, packed)
        assert share.passes == (of_group.siblings,)
        assert of_group.rewards == tuple(rollout.reward for rollout in group.rollouts)
        (sibling,), (rollout,) = of_group.siblings, part.rollouts
        wanted = group.rollouts[sibling].completion
        assert rollout.completion.token_ids.tolist() == wanted.token_ids.tolist()
        trained.add(sibling)
    assert trained == {0, 1}


def test_a_worker_learns_of_its_evicted_groups_without_asking_for_new_ones(
    make_actor: Callable[..., Actor],
) -> None:
    actor = make_actor(1)

    async def scene() -> None:
        await actor.serve(0)
        first, second = await actor.ask("rollout-0", 2)
        waits = [asyncio.create_task(actor.evictions(f"rollout-{number}")) for number in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):  # both have deadline 1, and only one can be taken at 1
            await actor.take(1)
        assert await waits[0] == (second,)
        assert not waits[1].done()
        assert await actor.offer("rollout-0", make_group(first, incarnation="first")) == []
        assert actor._buffer.num_buffered == 1

    asyncio.run(scene())


def test_credits_go_to_the_worker_that_waits_longest_and_wake_no_other(
    make_actor: Callable[..., Actor],
) -> None:
    actor = make_actor(0)

    async def scene() -> None:
        waits = [asyncio.create_task(actor.ask(f"rollout-{number}", 1)) for number in range(3)]
        await asyncio.sleep(0)
        await actor.suspend("rollout-0", True)
        await actor.serve(0)
        assert await waits[1] == [0]
        again = asyncio.create_task(actor.ask("rollout-2", 1))
        assert await waits[2] == []  # the worker's next exchange asks in its place
        await actor.fail([0], "lost")
        assert await again == [1]
        await actor.suspend("rollout-0", False)
        assert not waits[0].done()
        await actor.fail([1], "lost")
        assert await waits[0] == [2]
        assert actor._waiting == {}

    asyncio.run(scene())


def test_a_worker_gets_no_more_groups_than_fit_beside_admissions_on_their_way(
    make_actor: Callable[..., Actor],
) -> None:
    actor = make_actor(5)

    async def scene() -> None:
        await actor.serve(0)
        assert await actor.ask("rollout-0", 2) == [0, 1]
        # Sent before the answer has arrived: the worker believes that it has nothing in hand.
        wait = asyncio.create_task(actor.ask("rollout-0", 3))
        assert await wait == [2]
        late = asyncio.create_task(actor.ask("rollout-0", 3))
        await asyncio.sleep(0.01)
        assert not late.done()
        groups = [make_group(number, incarnation="first") for number in (0, 1)]
        assert await actor.offer("rollout-0", *groups, num_free=3) == [3, 4]
        assert await late == []

    asyncio.run(scene())


def test_exchange_without_credits_is_answered_in_time_and_keeps_nothing(
    make_actor: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_actor, "ANSWER_EVERY_S", 0.05)
    actor = make_actor(0)

    async def scene() -> None:
        assert await actor.ask("rollout-0", 1) == []
        assert actor._waiting == {}
        assert await actor.evictions("rollout-0") == ()

    asyncio.run(scene())


async def fill(actor: Actor, count: int) -> list[int]:
    """Serves version 0; `count` groups are admitted and offered."""
    await actor.serve(0)
    group_ids = await actor.ask("rollout-0", count)
    groups = [make_group(number, incarnation="first") for number in group_ids]
    await actor.offer("rollout-0", *groups)
    return group_ids


def test_batch_of_the_next_step_is_taken_ahead_and_a_checkpoint_gives_it_back(
    make_actor: Callable[..., Actor],
) -> None:
    actor = make_actor(2)

    async def scene() -> None:
        await actor.serve(0)
        first, second = await actor.ask("rollout-0", 2)
        await actor.offer("rollout-0", make_group(first, incarnation="first"))
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.offer("rollout-0", make_group(second, incarnation="first"))
        assert actor._buffer.num_buffered == 0  # group 1 is on its way to the learner
        await actor.trained(batch.learner_version, batch.group_ids, non_finite=False)
        state = actor._buffer.snapshot(1)
        assert (state.next_step, list(state.buffered)) == (1, [1])
        assert state.acceptance["accepted"] == 1  # counts again for the step that is repeated
        late = make_group((await actor.ask("rollout-0", 1))[0], incarnation="first")
        await actor.offer("rollout-0", late)
        ahead = await actor.take(1)
        assert isinstance(ahead, TrainBatch)
        assert (ahead.learner_version, ahead.group_ids) == (1, (1,))
        ((_, packed),) = ahead.references
        assert unpack_group(packed[0]).group_id == 1
        # The run ends here: batch 1 is not trained, and the one after it was taken ahead.
        assert actor._buffer.num_buffered == 0
        state = actor._buffer.snapshot(1)
        assert (state.next_step, sorted(state.buffered)) == (1, [1, late.group_id])
        assert state.acceptance["accepted"] == 2
        with pytest.raises(AssertionError, match="a step before version 2 is not booked"):
            actor._buffer.snapshot(2)

    asyncio.run(scene())


def test_a_minibatch_is_handed_over_before_the_rest_of_its_step_is_finished(
    make_actor: Callable[..., Actor], tmp_path: Path
) -> None:
    async def scene() -> None:
        actor = make_actor(1, num_minibatches=2)
        await actor.serve(0)
        first, second, third = await actor.ask("rollout-0", 3)
        await actor.offer("rollout-0", make_group(second, incarnation="first"))
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        assert (batch.group_ids, batch.closes_step) == ((second,), False)
        await actor.offer("rollout-0", make_group(first, incarnation="first"))  # is taken ahead
        await actor.trained(0, batch.group_ids, non_finite=False)
        with pytest.raises(AssertionError, match="trained in part"):
            actor._buffer.snapshot(0)
        rest = await actor.take(0)
        assert isinstance(rest, TrainBatch)
        assert (rest.group_ids, rest.closes_step) == ((first,), True)
        with pytest.raises(AssertionError, match="trained in part"):
            actor._buffer.snapshot(0)
        await actor.trained(0, rest.group_ids, non_finite=False)
        assert not actor._of_step
        await actor._files.written()
        (samples,) = (tmp_path / "rollouts").glob("*")
        assert len(samples.read_text().splitlines()) == 4  # both groups of the step
        assert actor._state.acceptance[0].accepted == 2
        await actor.offer("rollout-0", make_group(third, incarnation="first"))
        state = actor._buffer.snapshot(1)
        assert (state.next_step, [*state.buffered]) == (1, [third])  # taken ahead, and given back

    asyncio.run(scene())


def test_a_step_that_is_cut_gives_back_what_the_learner_has_not_trained(
    make_actor: Callable[..., Actor], tmp_path: Path
) -> None:
    async def scene() -> None:
        actor = make_actor(1, num_minibatches=3)
        await actor.serve(0)
        ids = await actor.ask("rollout-0", 4)
        await actor.offer("rollout-0", make_group(ids[0], incarnation="first"))
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.trained(0, batch.group_ids, non_finite=False)
        for group_id in ids[1:3]:
            await actor.offer("rollout-0", make_group(group_id, incarnation="first"))
        # The driver stops here: it trains neither this minibatch nor the one that is taken ahead.
        await actor.take(0)
        await actor.cut(0)
        state = actor._buffer.snapshot(1)
        assert (state.next_step, [*state.buffered], state.reissue) == (1, [*ids[1:3]], (ids[3],))
        await actor._files.written()
        (written,) = (tmp_path / "rollouts").glob("*")
        assert f"{ids[0]}" in written.read_text()
        await actor.serve(1, batch.group_ids)
        actor._buffer.check()

    asyncio.run(scene())


def test_a_take_whose_step_is_cut_ends(make_actor: Callable[..., Actor]) -> None:
    async def scene() -> None:
        actor = make_actor(1, num_minibatches=2)
        await actor.serve(0)
        first, second = await actor.ask("rollout-0", 2)
        await actor.offer("rollout-0", make_group(first, incarnation="first"))
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.trained(0, batch.group_ids, non_finite=False)
        waiting = asyncio.create_task(actor.take(0))  # Ray does not cancel it with its caller
        await asyncio.sleep(0)
        await actor.cut(0)
        with pytest.raises(AssertionError, match="step 0 was cut"):
            await waiting
        await actor.offer("rollout-0", make_group(second, incarnation="first"))
        assert [*actor._buffer.snapshot(1).buffered] == [second]

    asyncio.run(scene())


def test_nothing_is_taken_ahead_in_lockstep_or_if_a_deadline_would_be_lost(
    make_actor: Callable[..., Actor],
) -> None:
    async def scene() -> None:
        actor = make_actor(1)
        await actor.serve(0)
        first, second = await actor.ask("rollout-0", 2)
        await actor.offer("rollout-0", make_group(first, incarnation="first"))
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.trained(batch.learner_version, batch.group_ids, non_finite=False)
        await actor.serve(1, batch.group_ids)
        (third,) = await actor.ask("rollout-1", 1)
        newer = make_group(third, incarnation="first", version=1)
        await actor.offer("rollout-1", newer)  # a take of it at 1 would lose the second's deadline
        assert (actor._next_batch, actor._buffer.num_buffered) == (None, 1)
        await actor.offer("rollout-0", make_group(second, incarnation="first"))
        assert actor._next_batch is not None
        taken = await actor.take(1)
        assert isinstance(taken, TrainBatch)
        assert taken.group_ids == (second,)

    asyncio.run(scene())


def test_accepted_groups_of_a_call_do_not_keep_the_bytes_of_the_others(
    make_actor: Callable[..., Actor],
) -> None:
    actor = make_actor(2)

    async def scene() -> None:
        await fill(actor, 3)
        for group in actor._buffer._buffered.values():
            assert group.payload.data.base is None

    asyncio.run(scene())


@pytest.mark.parametrize("sizes", [[], [5], [100_000], [40_000, 120_000, 8], [400_000, 4]])
def test_packed_groups_arrive_as_they_were_sent(sizes: list[int]) -> None:
    packed = [
        np.random.default_rng(number).integers(0, 256, size, np.uint8)
        for number, size in enumerate(sizes)
    ]
    arguments = to_arguments(packed)
    assert len(arguments) == 1 or all(len(each) < 100_000 for each in arguments)
    for sent, arrived in zip(packed, from_arguments(arguments, sizes), strict=True):
        assert np.array_equal(sent, arrived)


@pytest.mark.parametrize("non_finite", [True, False])
def test_batch_of_a_step_that_was_not_finite_is_kept_on_disk(
    tmp_path: Path, make_actor: Callable[..., Actor], non_finite: bool
) -> None:
    actor = make_actor(0)

    async def step() -> TrainBatch:
        await fill(actor, 1)
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.trained(batch.learner_version, batch.group_ids, non_finite=non_finite)
        return batch

    batch = asyncio.run(step())
    kept = tmp_path / "non_finite" / "step_000000.safetensors"
    assert kept.exists() == non_finite
    if non_finite:
        (group,), ((_, packed),) = read_groups(kept), batch.references
        assert group.group_id == batch.group_ids[0]
        assert (
            group.rollouts[0].completion.token_ids.tolist()
            == unpack_group(packed[0]).rollouts[0].completion.token_ids.tolist()
        )


def test_a_paced_actor_starts_no_more_groups_than_its_limit(
    make_actor: Callable[..., Actor],
) -> None:
    actor = make_actor(3)  # four credits

    async def scene() -> None:
        await actor.serve(0)
        actor._pacer.limit = 1  # as after many steps with a surplus
        (first,) = await actor.ask("rollout-0", 4)
        waits = asyncio.create_task(actor.ask("rollout-0", 4))
        await actor.offer("rollout-0", make_group(first, incarnation="first"))
        await asyncio.sleep(0.05)
        assert not waits.done(), "a group started while another is finished and not taken"
        batch = await actor.take(0)
        assert not isinstance(batch, StopReason)
        assert len(await asyncio.wait_for(waits, 60.0)) == 1
        assert await asyncio.wait_for(actor.ask("rollout-1", 0), 60.0) == []

    asyncio.run(scene())


@pytest.mark.parametrize(("step_s", "served"), [(1e3, True), (5.0, False)])
def test_a_paced_actor_waits_shortly_for_weights_on_their_way(
    make_actor: Callable[..., Actor], step_s: float, served: bool
) -> None:
    actor = make_actor(3)

    async def scene() -> None:
        await actor.serve(0)
        actor._pacer._step_s.append(step_s)
        learner = asyncio.create_task(actor.take(1))
        await asyncio.sleep(0)
        waits = asyncio.create_task(actor.ask("rollout-0", 1))
        await asyncio.sleep(0.01)
        assert not waits.done(), "a group started with weights that are about to be replaced"
        if served:
            await actor.serve(1)
        assert len(await asyncio.wait_for(waits, 60.0)) == 1
        learner.cancel()

    asyncio.run(scene())


def test_on_shared_devices_groups_are_not_paced_and_a_step_is_taken_whole(
    make_actor: Callable[..., Actor],
) -> None:
    """Engines can't generate the rest of a step while the learner trains on its first part."""
    actor = make_actor(1, num_minibatches=2, placement="shared")  # four credits

    async def scene() -> None:
        await actor.serve(0)
        actor._pacer.limit = 1
        first, second, *_ = admitted = await actor.ask("rollout-0", 4)
        assert len(admitted) == 4
        await actor.offer("rollout-0", make_group(first, incarnation="first"))
        taking = asyncio.create_task(actor.take(0))
        await asyncio.sleep(0.05)
        assert not taking.done(), "half of a step was taken"
        await actor.offer("rollout-0", make_group(second, incarnation="first"))
        batch = await asyncio.wait_for(taking, 60.0)
        assert not isinstance(batch, StopReason)
        assert (batch.group_ids, batch.closes_step) == ((first,), False)
        rest = await asyncio.wait_for(actor.take(0), 60.0)
        assert not isinstance(rest, StopReason)
        assert (rest.group_ids, rest.closes_step) == ((second,), True)

    asyncio.run(scene())


def test_a_passed_deadline_says_when_the_pacer_holds_groups_back(
    make_actor: Callable[..., Actor],
) -> None:
    actor = make_actor(3)

    async def scene() -> None:
        await actor.serve(0)
        await actor.ask("rollout-0", 1)
        with pytest.raises(TimeoutError, match="more could start") as eager:
            await actor.take(0)
        assert "paced" not in str(eager.value)
        actor._pacer.limit = 1
        with pytest.raises(TimeoutError, match="admission is paced: at most 1 groups are out"):
            await actor.take(0)

    asyncio.run(scene())


def test_a_prompt_that_the_verifier_cannot_judge_is_left_out_also_after_a_resume(
    tmp_path: Path, make_actor: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "FAILURES", 1)

    async def scene() -> tuple[Actor, int]:
        actor = make_actor(1)
        await actor.serve(0)
        first, second = await actor.ask("rollout-0", 2)
        await actor.fail([second], "quarantine of rollout-0")  # not the verifier's fault
        assert (await actor.report()).quarantined == ()
        await actor.fail([first], VERIFIER_FAILED, "my:judge raised KeyError: 3")
        report = await actor.report()
        assert report.failures == {"quarantine of rollout-0": 1, VERIFIER_FAILED: 1}
        (line,) = report.quarantined
        assert line.endswith("the last time: my:judge raised KeyError: 3")
        return actor, actor._stream[first].row

    _, row = asyncio.run(scene())
    (kept,) = RunDir(tmp_path).quarantined()
    assert (kept["row"], kept["why"]) == (row, "my:judge raised KeyError: 3")

    async def resumed() -> None:
        actor = make_actor(1)  # it reads the file, and its first prompt is this one
        await actor.serve(0)
        assert await actor.ask("rollout-0", 1) == [1]
        report = await actor.report()
        assert report.failures == {"prompt in quarantine": 1}
        assert (report.counts.admitted, report.counts.failed) == (2, 1)

    asyncio.run(resumed())


def test_a_verifier_that_fails_on_everything_ends_the_take_with_its_last_words(
    make_actor: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "MOST_IN_A_ROW", 2)

    async def scene() -> None:
        actor = make_actor(1)
        await actor.serve(0)
        take = asyncio.create_task(actor.take(0))
        for group_id in await actor.ask("rollout-0", 2):
            await actor.fail([group_id], VERIFIER_FAILED, "my:judge gave no verdict within 60 s")
        with pytest.raises(RuntimeError, match="failed on 2 groups in a row; the last time: my:"):
            await take

    asyncio.run(scene())


def test_samples_that_the_disk_refuses_are_counted_and_the_step_is_trained(
    tmp_path: Path, make_actor: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(replay_files, "write_rollouts", refused)
    actor = make_actor(0)

    async def step() -> None:
        await fill(actor, 1)
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.trained(batch.learner_version, batch.group_ids, non_finite=False)
        await actor.close()
        report = await actor.report()
        assert (report.unwritten, report.disk_fault) == (
            {"rollouts/": 1},
            "no space left on device",
        )
        assert report.counts.trained == 1

    asyncio.run(step())
    assert not RunDir(tmp_path).files.exists()


def test_every_end_of_a_group_is_in_its_log_as_the_ledger_counts_them(
    make_actor: Callable[..., Actor], tmp_path: Path
) -> None:
    actor = make_actor(1)

    async def scene() -> None:
        await actor.serve(0)
        trained, given_up = await actor.ask("rollout-0", 2)
        await actor.offer("rollout-0", make_group(trained, incarnation="first"))
        await actor.fail([given_up], "the verifier failed")
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        await actor.trained(0, batch.group_ids, non_finite=False)
        await actor.serve(1, batch.group_ids)
        await actor.ask("rollout-1", 1)
        await actor.lose_worker("rollout-1", 0)
        (handed_back,) = await actor.ask("rollout-0", 1)
        await actor.hand_back("rollout-0", handed_back, ())
        await actor.close()
        report = await actor.report()
        assert (report.counts.trained, report.counts.failed, report.counts.unused) == (1, 1, 1)
        assert [point.phase for point in report.flow if point.group_id == trained] == [
            *"stttf"  # admitted, offered, taken, trained, released: this worker kept no times
        ]

    asyncio.run(scene())
    counts: Counter[str] = Counter()
    for line in (tmp_path / "groups.jsonl").read_text().splitlines():
        event = json.loads(line)
        counts[event["event"]] += len(event.get("group_ids", ()))
    assert counts == {
        "start": 0,
        "admitted": 4,
        "offered": 1,
        "taken": 1,
        "trained": 1,
        "released": 1,
        "given_up": 1,
        "failed": 1,
        "handed_back": 2,
        "unused": 1,
    }


class Reborn:
    """A replay actor that dies now and then. `dies` starts the next process."""

    def __init__(self, make: Callable[..., Actor], **options: int) -> None:
        self._make, self._options = make, options
        self.actor = make(**options)

    def dies(self) -> Actor:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        before = self.actor
        self.actor = self._make(**self._options, process=1)
        assert self.actor._buffer.counts == before._buffer.counts
        assert self.actor._buffer.credits_held == before._buffer.credits_held
        return self.actor


def offered(worker: str, *groups: Group, number: int, again: bool = False) -> Any:
    packed = [pack_group(group) for group in groups]
    facts, sizes = [GroupFacts.of(group) for group in groups], [len(data) for data in packed]
    exchange = Exchange(worker, 0, 0, facts, sizes, number=number, again=again)
    return exchange, *to_arguments(packed)


def test_buffered_groups_and_credits_survive_the_process(make_actor: Callable[..., Actor]) -> None:
    async def scene() -> None:
        run = Reborn(make_actor, max_staleness=1)
        actor = run.actor
        await actor.serve(0)
        first, second = await actor.ask("rollout-0", 2)
        await actor.offer("rollout-0", make_group(first, incarnation="first"))
        actor = run.dies()
        assert actor._buffer.num_buffered == actor._buffer.num_generating == 1
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        assert batch.group_ids == (first,)
        ((_, (data,)),) = batch.references
        assert unpack_group(data).group_id == first
        await actor.offer("rollout-0", make_group(second, incarnation="first"))
        await actor.trained(0, batch.group_ids, non_finite=False)
        await actor.serve(1, batch.group_ids)
        assert (await run.dies().report()).counts.trained == 1
        assert await run.actor.ask("rollout-0", 2) == [2]

    asyncio.run(scene())


def test_calls_whose_answers_were_lost_have_the_effect_of_one(
    make_actor: Callable[..., Actor],
) -> None:
    async def scene() -> None:
        run = Reborn(make_actor, max_staleness=2)
        actor = run.actor
        await actor.serve(0)
        asks = Exchange("rollout-0", 2, 0, number=1)
        granted = [each.group_id for each in await actor.exchange(asks)]
        actor = run.dies()
        assert granted == [0, 1]
        await actor.resume("rollout-0", 0, [0])  # the answer with group 1 never came
        again = await actor.exchange(replace(asks, num_free=1, num_open=1, again=True))
        assert [each.group_id for each in again] == [1]
        group = make_group(0, incarnation="first", num_tokens=3)
        await actor.exchange(*offered("rollout-0", group, number=2))
        actor = run.dies()
        await actor.exchange(*offered("rollout-0", group, number=2, again=True))
        assert actor._buffer.tokens.counts.ended == {}
        assert actor._book.balance["rollout-0"] == 6  # two siblings of three tokens
        batch = await actor.take(0)
        assert isinstance(batch, TrainBatch)
        actor = run.dies()
        assert (await actor.take(0)).group_ids == batch.group_ids  # type: ignore[union-attr]
        await actor.trained(0, batch.group_ids, non_finite=False)
        actor = run.dies()
        await actor.trained(0, batch.group_ids, non_finite=False)
        await actor.serve(1, batch.group_ids)
        actor = run.dies()
        await actor.serve(1, batch.group_ids)
        completion = group.rollouts[0].completion
        await actor.hand_back("rollout-0", 1, (completion, None), 3)
        actor = run.dies()
        await actor.hand_back("rollout-0", 1, (completion, None), 3)
        assert actor._book.balance["rollout-0"] == 9
        # The partial completion was lost with the process: its tokens are generated again.
        assert actor._buffer.tokens.counts.ended[TokenOutcome.REPEATED] == 3
        (admission,) = await actor.exchange(Exchange("rollout-1", 1, 0, number=1))
        assert (admission.group_id, admission.partial_completions) == (1, ())
        actor._buffer.check()

    asyncio.run(scene())


def test_learner_that_has_a_batch_of_the_dead_process_gets_the_one_after_it(
    make_actor: Callable[..., Actor],
) -> None:
    async def scene() -> None:
        run = Reborn(make_actor, max_staleness=2, num_minibatches=2)
        actor = run.actor
        await actor.serve(0)
        ids = await actor.ask("rollout-0", 4)
        for group_id in ids:
            await actor.offer("rollout-0", make_group(group_id, incarnation="first"))
        batch = await actor.take(0)  # the next one is taken ahead
        assert isinstance(batch, TrainBatch)
        actor = run.dies()
        ((_, (data,)),) = (await actor.again(replace(batch, references=()))).references
        assert unpack_group(data).group_id == batch.group_ids[0]
        await actor.trained(0, batch.group_ids, non_finite=False)
        rest = await actor.take(0)
        assert isinstance(rest, TrainBatch)
        assert (rest.group_ids, rest.closes_step) == ((ids[1],), True)
        actor = run.dies()
        await actor.trained(0, rest.group_ids, non_finite=False)
        await actor._files.written()
        after = await actor.take(1)
        assert isinstance(after, TrainBatch)
        assert after.group_ids == (ids[2],)
        # A learner that starts again at version 0 needs what it has trained.
        for trained in (batch, rest):
            assert (await actor.again(replace(trained, references=()))).group_ids

    asyncio.run(scene())


def test_journal_keeps_the_groups_of_its_image_for_as_long_as_the_image(
    make_actor: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_async.runtime.actors.replay.MOST_STEPS", 3)

    async def scene() -> None:
        run = Reborn(make_actor, max_staleness=0)
        await run.actor.serve(0)
        for step in range(8):
            (group_id, *_) = await run.actor.ask("rollout-0", 1)
            group = make_group(group_id, version=step, incarnation="first")
            await run.actor.offer("rollout-0", group)
            if step == 0:
                await run.actor.capture_state(0)  # the image has a finished group
            batch = await run.actor.take(step)
            assert isinstance(batch, TrainBatch)
            await run.actor.trained(step, batch.group_ids, non_finite=False)
            await run.actor.serve(step + 1, batch.group_ids)
        assert (await run.dies().report()).counts.trained == 8
        assert (await run.dies().report()).counts.trained == 8

    asyncio.run(scene())


def test_recorded_step_is_whole_though_the_process_dies_between_its_minibatches(
    make_actor: Callable[..., Actor], tmp_path: Path
) -> None:
    async def scene() -> None:
        run = Reborn(make_actor, max_staleness=2, num_minibatches=2)
        await run.actor.serve(0)
        first, second, *_ = await run.actor.ask("rollout-0", 2)
        await run.actor.offer("rollout-0", make_group(first, incarnation="first"))
        batch = await run.actor.take(0)
        assert isinstance(batch, TrainBatch)
        await run.actor.trained(0, batch.group_ids, non_finite=False)
        actor = run.dies()  # the learner has nothing, and step 0 is open
        await actor.offer("rollout-0", make_group(second, incarnation="first"))
        rest = await actor.take(0)
        assert isinstance(rest, TrainBatch)
        assert rest.closes_step
        await actor.trained(0, rest.group_ids, non_finite=False)
        await actor._files.written()
        (sample,) = (tmp_path / "rollouts").glob("*0000*")
        rows = [json.loads(line) for line in sample.read_text().splitlines()]
        assert {row["group_id"] for row in rows} == {first, second}

    asyncio.run(scene())


def test_journal_keeps_what_a_restarted_learner_needs_and_ends_with_the_run(
    make_actor: Callable[..., Actor], tmp_path: Path
) -> None:
    async def scene() -> None:
        actor = make_actor(max_staleness=2)
        await actor.serve(0)
        for step in range(3):
            (group_id, *_) = await actor.ask("rollout-0", 1)
            await actor.offer("rollout-0", make_group(group_id, incarnation="first"))
            batch = await actor.take(step)
            assert isinstance(batch, TrainBatch)
            await actor.trained(step, batch.group_ids, non_finite=False)
            await actor.serve(step + 1, batch.group_ids)
            await actor.capture_state(step + 1)
        journal = actor._buffer.journal
        assert journal is not None
        assert sorted(journal.places) == [0, 1, 2]
        await actor.checkpointed(2)
        assert sorted(journal.places) == [2]
        await actor.close()
        assert not (tmp_path / "journal").exists()
        with pytest.raises(RuntimeError, match="there is no journal in"):
            make_actor(max_staleness=2, process=1)

    asyncio.run(scene())


def test_failures_of_the_verifier_are_counted_over_the_death_of_the_process(
    make_actor: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        run = Reborn(make_actor, max_staleness=2)
        actor = run.actor
        await actor.serve(0)
        groups = await actor.ask("rollout-0", 3)
        rows = [actor._stream[group_id].row for group_id in groups]
        monkeypatch.setattr(quarantine, "FAILURES", 2)
        await actor.fail([groups[0]], VERIFIER_FAILED, "it hangs")
        await actor.fail([groups[1]], TOO_FEW_VERDICTS, "it hangs")
        failures = run.dies()._state.verifier
        assert (dict(failures.by_row), failures.in_a_row) == ({rows[0]: 1}, 1)
        run.actor._buffer.begin_segment()  # the image has them, too
        actor = run.dies()
        assert actor._state.verifier.by_row == {rows[0]: 1}
        actor._verifier_failed(actor._stream[groups[0]], "it hangs")
        (row,) = actor._quarantine.rows
        assert row == rows[0]
        await actor.offer("rollout-0", make_group(groups[2], incarnation="first"))
        assert run.dies()._state.verifier.in_a_row == 0

    asyncio.run(scene())
