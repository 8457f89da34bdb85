"""Tokens add up exactly, on every path that a group can take through engine, worker and replay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_engine_world import group, tiny_decoder, tiny_engine
from worker_world import FakeEngine, FakeReplay, play, score, settled

from dapo_async.model.cost import causal_pairs
from dapo_async.replay import TokenBook, TokenCounts, TokenOutcome, num_tokens
from dapo_async.reward import VerifierFailed
from dapo_async.rollout import Aborted, EngineFault
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.rollout.worker import GENERATING, RolloutWorker, WorkerState
from dapo_async.types import Admission, Completion, FinishReason, Group, RejectReason
from dapo_async.utils.state_clock import StateClock


def completion(length: int, finish: FinishReason = FinishReason.STOP) -> Completion:
    zeros = np.zeros(length, np.int32)
    return Completion(zeros, zeros.astype(np.float32), zeros, 0, finish)


class Scene:
    """Plays engine and replay around a real worker, and counts where each token is."""

    def __init__(self, worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        self.worker, self.engine, self.replay = worker, engine, replay
        self.drawn: dict[int, list[int]] = {}  # by group on the engine: tokens of each sibling
        self.gate = asyncio.Event()
        self.gate.set()
        self.scoring = 0  # tokens that wait for their verdict
        self.verdict_fails = False
        worker._score = self._score

    async def _score(self, admission: Admission, completions: Sequence[Completion]) -> Group:
        count = num_tokens(tuple(completions))
        self.scoring += count
        await self.gate.wait()
        self.scoring -= count
        if self.verdict_fails:
            raise VerifierFailed("verifier died")
        group = await score(admission, completions)
        if admission.group_id % 3:
            return group
        return replace(group, rollouts=group.rollouts[1:], num_failed=1)  # one has no verdict

    def draw(self, rng: random.Random) -> None:
        """The engine draws tokens for all its groups."""
        for group_id in self.engine.group_ids:
            tokens = self.drawn.setdefault(group_id, [0, 0, 0])
            for sibling in range(3):
                count = rng.randrange(4)
                tokens[sibling] += count
                self.engine.tokens.generate(count)

    def taken_off(self, group_id: int) -> list[int]:
        return self.drawn.pop(group_id, [0, 0, 0])

    def finish(self, group_id: int) -> None:
        answer = tuple(map(completion, self.taken_off(group_id)))
        self.engine._running.pop(group_id).set_result(answer)

    def lose(self, group_id: int, *, kept: Sequence[bool]) -> None:
        """The engine is lost; of some siblings it passes the tokens on."""
        counts = self.taken_off(group_id)
        dropped = sum(count for count, keep in zip(counts, kept, strict=True) if not keep)
        self.engine.tokens.end(TokenOutcome.REPEATED, dropped)
        partial = tuple(
            completion(count, FinishReason.ABORT) if keep else None
            for count, keep in zip(counts, kept, strict=True)
        )
        self.engine.fail(group_id, EngineFault("lost", partial))

    def check(self, handed_on: int) -> None:
        """`handed_on`: tokens that the replay actor has got."""
        held = sum(map(sum, self.drawn.values())) + self.scoring
        assert self.engine.tokens.counts.in_flight == held + handed_on


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_worker_books_every_token_of_a_random_run_exactly_once(seed: int) -> None:
    rng = random.Random(seed)

    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        world = Scene(worker, engine, replay)
        abort = engine.abort

        async def counted_abort(group_ids: Any) -> None:
            for group_id in group_ids:
                count = sum(world.taken_off(group_id))
                if group_id in engine._running:
                    engine.fail(group_id, Aborted("taken off", count))
            await abort([])

        engine.abort = counted_abort  # type: ignore[method-assign]
        handed_on = [0]
        exchange, hand_back, fake = replay.exchange, replay.hand_back, cast(Any, replay)

        async def counted_exchange(name: str, offers: Any, **rest: Any) -> Any:
            handed_on[0] += sum(each.facts.num_response_tokens for each in offers)
            return await exchange(name, offers, **rest)

        async def counted_hand_back(group_id: int, partial: Any) -> None:
            handed_on[0] += num_tokens(partial)
            await hand_back(group_id, partial)

        fake.exchange, fake.hand_back = counted_exchange, counted_hand_back
        for _ in range(40):
            world.draw(rng)
            running = [each for each in engine.group_ids if each in engine._running]
            event = rng.random()
            if event < 0.4 and running:
                world.finish(rng.choice(running))
            elif event < 0.55 and replay.next_group_id:
                wanted = sorted(worker._wanted)
                if wanted:
                    await replay.evict(rng.choice(wanted))
            elif event < 0.65 and worker.state in GENERATING:
                await worker.quarantine()
                await settled()
                worker.confirm()
            elif event < 0.75:
                world.verdict_fails = not world.verdict_fails
            elif event < 0.85:
                (world.gate.clear if world.gate.is_set() else world.gate.set)()
            elif running and worker.state is WorkerState.SERVING:
                if rng.random() < 0.5:
                    worker.hold()  # its newest weights are not proved
                for group_id in running:
                    world.lose(group_id, kept=[rng.random() < 0.5 for _ in range(3)])
                await settled()
                worker.restarted()
                worker.hold()
                worker.confirm()
            await settled()
            if world.gate.is_set():
                world.check(handed_on[0])
        world.gate.set()
        await settled()
        for group_id in list(engine._running):
            world.finish(group_id)
            await settled()
        counts = engine.tokens.counts
        assert all(count >= 0 for count in counts.ended.values())

    play(scene, credits=1000)


def test_native_engine_books_drawn_prefilled_and_recomputed_tokens() -> None:
    async def main() -> tuple[TokenCounts, int]:
        engine = ThreadedEngine(tiny_engine(num_slots=4, max_len=120), StateClock("engine"))
        done = await engine.generate(group(0, [1, 2, 3], siblings=2, max_tokens=20))
        heldout = await engine.generate(group(-1, [1, 2], max_tokens=5))
        before = engine.tokens.counts
        assert (before.prefilled, before.recomputed) == (5, 0), "siblings share one prefill"
        generated = num_tokens(done) + num_tokens(heldout)
        assert before.generated == generated
        assert before.ended == {TokenOutcome.EVALUATION: num_tokens(heldout)}
        assert before.in_flight == num_tokens(done)
        running = asyncio.create_task(engine.generate(group(1, [4, 5], siblings=2, max_tokens=100)))
        while engine.tokens.counts.generated < generated + 6:
            await asyncio.sleep(0.001)
        weights = tiny_decoder(seed=2).state_dict()
        probe = np.arange(1, 6, dtype=np.int32)
        report = await engine.update_weights(weights, version=1, probe_ids=probe)
        await engine.abort([1])
        with pytest.raises(Aborted) as aborted:
            await running
        counts = engine.tokens.counts
        assert counts.recomputed == report.recomputed_tokens > 0
        assert counts.generated == generated + aborted.value.num_tokens
        await engine.close()
        return counts, num_tokens(done)

    counts, unbooked = asyncio.run(main())
    assert counts.prefilled == 7
    assert counts.in_flight > unbooked, "the caller books how an aborted group ends"


def test_native_engine_counts_decode_steps_and_attended_tokens_exactly() -> None:
    async def main() -> None:
        engine = ThreadedEngine(tiny_engine(num_slots=4, max_len=120), StateClock("engine"))
        requests = [group(key, [1] * (2 + key), siblings=3, max_tokens=30) for key in range(3)]
        answers = await asyncio.gather(*(engine.generate(each) for each in requests))
        work = engine.work()
        responses = [
            (2 + key, len(each.token_ids)) for key, done in enumerate(answers) for each in done
        ]
        # The first token follows from the prefill; each later one attends to all before it.
        assert work.decoded == sum(length - 1 for _, length in responses)
        assert work.decode_pairs == sum(
            causal_pairs(prompt + length - 1, before=prompt) for prompt, length in responses
        )
        assert work.prefill_pairs == sum(causal_pairs(2 + key) for key in range(3))
        assert work.decoded / 4 <= work.steps <= work.decoded
        running = asyncio.create_task(engine.generate(group(9, [1, 2], siblings=2, max_tokens=100)))
        while engine.work().decoded < work.decoded + 6:
            await asyncio.sleep(0.001)
        await engine.abort([9])
        with pytest.raises(Aborted):
            await running
        assert engine._core._table.total_length == 0
        await engine.close()

    asyncio.run(main())


def test_counts_of_actors_add_up_and_give_one_number_per_name() -> None:
    engine, buffer = TokenBook(), TokenBook()
    engine.generate(100)
    engine.prefill(7)
    engine.end(TokenOutcome.REPEATED, 10)
    buffer.resume(20)
    buffer.end(RejectReason.ALL_WRONG, 30)
    buffer.end(RejectReason.ALL_CORRECT, 5)
    buffer.end(TokenOutcome.TRAINED, 40)
    whole = (engine.counts + buffer.counts).flat()
    assert whole["in_flight"] == 35
    assert (whole["rejected"], whole["trained"], whole["prefilled"]) == (35, 40, 7)
    waste = ("skipped", "evicted", "failed", "repeated", "unused", "evaluation", "rejected")
    ended = whole["trained"] + sum(whole[name] for name in waste)
    assert whole["generated"] + whole["resumed"] == ended + whole["in_flight"]
