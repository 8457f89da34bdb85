"""The SGLang engine on the real server against a forward pass of Hugging Face's model.

Logprobs, versions, weight updates while it generates, aborts.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from paths import QUICKSTART
from sglang_world import (
    CONFIGS,
    INCARNATION,
    MAX_LEN,
    NUM_SLOTS,
    PROBE,
    VOCABULARY,
    World,
    broadcasting,
    forward_logprobs,
    from_disk,
    make_engine,
    request,
    start_world,
)
from worker_world import PROMPT as ADMITTED
from worker_world import FakeReplay, score

from dapo_async.cli.main import main
from dapo_async.config import AlgorithmConfig, Config, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.model import load_decoder, score_tokens
from dapo_async.replay import TokenCounts, num_tokens
from dapo_async.rollout import (
    Aborted,
    EngineWork,
    KVUse,
    SlotUse,
    TimeUse,
    UpdateReport,
    WeightUpdate,
)
from dapo_async.rollout.sglang import SERVER_KEY
from dapo_async.rollout.sglang import engine as sglang_engine
from dapo_async.rollout.sglang.client import BroadcastLost
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.rollout.slot_control import SlotControl
from dapo_async.rollout.slot_meter import SLOT_STATES, TIME_STATES
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.tracking.bottleneck import Layout, bottleneck
from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout

pytestmark = pytest.mark.sglang
# The same server as in the test of all families.
on_one_family = pytest.mark.parametrize("world", ["qwen3"], indirect=True)

TOLERANCE = 1e-4  # nats, float32: kernels round differently
PROMPT = (7, 11, 13, 17, 19, 23)
LONG = 300  # tokens: long enough for an update during a response


async def some_tokens(engine: SGLangEngine, *, least: int = 20) -> None:
    """Waits until every response at the server has at least so many tokens."""
    async with asyncio.timeout(30):
        while True:
            groups = engine._running.values()
            responses = [response for group in groups for response in group.responses.values()]
            if responses and all(len(response.token_ids) >= least for response in responses):
                return
            await asyncio.sleep(0.01)


def assert_close(logprobs: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(logprobs, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("world", CONFIGS, indirect=True)
def test_behaviour_logprobs_are_those_of_the_model_at_the_temperature(world: World) -> None:
    async def generate() -> tuple[tuple[Completion, ...], tuple[Completion, ...]]:
        async with world.engine() as engine:
            return await asyncio.gather(
                engine.generate(request(1, PROMPT, siblings=4, temperature=0.7)),
                engine.generate(request(2, PROMPT, max_tokens=12, temperature=0.0)),
            )

    sampled, (greedy,) = asyncio.run(generate())
    decoder = load_decoder(world.folder)
    assert len({completion.token_ids.tobytes() for completion in sampled}) == 4
    for completion in sampled:
        assert len(completion.token_ids) == 40
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.prefill_version == 0
        assert completion.weight_versions.tolist() == [0] * 40
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids, 0.7)
        assert_close(completion.behaviour_logprobs, expected)
    with torch.no_grad():
        chosen = forward_logprobs(world.base, PROMPT, greedy.token_ids)
        assert_close(greedy.behaviour_logprobs, chosen)
        tokens = np.asarray([*PROMPT, *greedy.token_ids], dtype=np.int32)
        learner = score_tokens(decoder, tokens)[len(PROMPT) - 1 :]
        assert_close(greedy.behaviour_logprobs, learner)


@on_one_family
def test_response_ends_with_its_stop_token(world: World) -> None:
    async def generate() -> tuple[Completion, ...]:
        async with world.engine() as engine:
            stops = tuple(range(VOCABULARY // 2))
            return await engine.generate(request(1, PROMPT, siblings=8, stop_token_ids=stops))

    for completion in asyncio.run(generate()):
        assert completion.finish_reason is FinishReason.STOP
        assert completion.token_ids[-1] < VOCABULARY // 2
        assert all(token >= VOCABULARY // 2 for token in completion.token_ids[:-1])
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids)
        assert_close(completion.behaviour_logprobs, expected)


@on_one_family
@pytest.mark.parametrize("transport", ["disk", "broadcast"])
@pytest.mark.parametrize("mode", ["recompute", "keep_kv", "drain"])
def test_weights_change_during_a_response_as_the_mode_says(
    world: World, mode: WeightUpdate, transport: str
) -> None:
    async def generate() -> tuple[str, UpdateReport, tuple[Completion, ...], Completion]:
        async with world.engine(mode) as engine:
            client = engine._client
            asked = request(1, PROMPT, siblings=4, max_tokens=LONG)
            running = asyncio.create_task(engine.generate(asked))
            await some_tokens(engine)
            if transport == "disk":
                load = from_disk(client, world.other_folder)
                incarnation, report = await engine.update(load, version=5, probe_ids=PROBE)
            else:
                async with broadcasting(client, world.other_folder) as load:
                    incarnation, report = await engine.update(load, version=5, probe_ids=PROBE)
            before = await running
            (after,) = await engine.generate(request(2, PROMPT))
            return incarnation, report, before, after

    incarnation, report, before, after = asyncio.run(generate())
    assert (incarnation, report.version) == (INCARNATION, 5)
    assert_close(report.probe_before, forward_logprobs(world.base, PROBE[:1], PROBE[1:]))
    assert_close(report.probe_after, forward_logprobs(world.other, PROBE[:1], PROBE[1:]))
    # The same prompt again: nothing that the old weights left in the cache is used.
    assert set(after.weight_versions.tolist()) == {5}
    expected = forward_logprobs(world.other, PROMPT, after.token_ids)
    assert_close(after.behaviour_logprobs, expected)
    assert (report.recomputed_tokens > 0) == (mode == "recompute")
    for completion in before:
        old = completion.weight_versions == 0
        assert len(completion.token_ids) == LONG
        assert completion.prefill_version == 0
        assert sorted(completion.weight_versions.tolist()) == completion.weight_versions.tolist()
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids)
        assert_close(completion.behaviour_logprobs[old], expected[old])
        if mode == "drain":
            assert old.all()
            continue
        assert set(completion.weight_versions.tolist()) == {0, 5}
        expected = forward_logprobs(world.other, PROMPT, completion.token_ids)
        gap = np.abs(completion.behaviour_logprobs - expected)[~old]
        if mode == "recompute":
            assert gap.max() <= TOLERANCE
        else:
            assert gap.max() > 0.1  # the KV is of weights that have nothing in common with these


@on_one_family
@pytest.mark.parametrize("mode", ["recompute", "keep_kv", "drain"])
def test_server_reads_from_disk_after_a_broadcast_that_broke_off(
    world: World, mode: WeightUpdate
) -> None:
    async def generate() -> tuple[UpdateReport, Completion, Completion, bool]:
        async with world.engine(mode) as engine:
            client = engine._client
            running = asyncio.create_task(engine.generate(request(1, PROMPT, max_tokens=LONG)))
            await some_tokens(engine)
            async with broadcasting(client, world.other_folder, breaks_off=True) as load:
                with pytest.raises(BroadcastLost, match="Failed to receive weights"):
                    await engine.update(load, version=5, probe_ids=PROBE)
            on_disk = from_disk(client, world.other_folder)
            _, report = await engine.update(on_disk, version=5, probe_ids=PROBE)
            (before,), (after,) = await running, await engine.generate(request(2, PROMPT))
            return report, before, after, engine.time_use().sync > 0

    report, before, after, has_synced = asyncio.run(generate())
    assert has_synced
    assert_close(report.probe_before, forward_logprobs(world.base, PROBE[:1], PROBE[1:]))
    assert_close(report.probe_after, forward_logprobs(world.other, PROBE[:1], PROBE[1:]))
    assert len(before.token_ids) == LONG
    assert set(before.weight_versions.tolist()) == ({0} if mode == "drain" else {0, 5})
    assert set(after.weight_versions.tolist()) == {5}
    assert_close(after.behaviour_logprobs, forward_logprobs(world.other, PROMPT, after.token_ids))


@on_one_family
def test_learner_metrics_equal_those_of_an_independent_forward_pass(world: World) -> None:
    """`kv_gap` and `mismatch` of a learner step against Hugging Face's model, in float64."""

    async def generate() -> list[tuple[Completion, ...]]:
        async with world.engine("keep_kv") as engine:
            asked = request(1, PROMPT, siblings=4, max_tokens=LONG)
            running = asyncio.create_task(engine.generate(asked))
            await some_tokens(engine)
            load = from_disk(engine._client, world.other_folder)
            await engine.update(load, version=5, probe_ids=PROBE)
            return [await running, await engine.generate(request(2, PROMPT, siblings=4))]

    answers = asyncio.run(generate())
    prompt = Prompt(0, "", np.array(PROMPT, np.int32), "")
    groups = []
    for group_id, completions in enumerate(answers):
        rollouts = tuple(
            Rollout(completion, "", 0.0, float(sibling % 2), None)
            for sibling, completion in enumerate(completions)
        )
        groups.append(Group(group_id, prompt, rollouts, "test", 1.0))
    rank = LearnerRank(
        load_decoder(world.other_folder),
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(),
        version=5,
    )
    metrics = rank.step(groups).flat()

    gaps: dict[str, list[float]] = {"mismatch": [], "kv_gap": []}
    for completion in (completion for completions in answers for completion in completions):
        expected = forward_logprobs(world.other, PROMPT, completion.token_ids).astype(np.float64)
        gap = (expected - completion.behaviour_logprobs)[completion.weight_versions == 5]
        gaps["mismatch" if completion.prefill_version == 5 else "kv_gap"] += gap.tolist()
    fresh, stale = np.array(gaps["mismatch"]), np.array(gaps["kv_gap"])
    assert len(fresh) == 4 * 40
    assert len(stale) > 100
    assert metrics["kv_gap"] == pytest.approx(np.abs(stale).mean(), abs=TOLERANCE)
    assert metrics["kv_gap_max"] == pytest.approx(np.abs(stale).max(), abs=TOLERANCE)
    assert metrics["kv_gap"] > 0.01
    # Different float32 kernels: rounding remains, which is small but not zero.
    assert 0 < metrics["mismatch"] <= metrics["mismatch_max"] <= TOLERANCE
    assert np.abs(fresh).max() <= TOLERANCE
    assert 0 < metrics["mismatch_k3"] < TOLERANCE**2


@on_one_family
def test_a_sleep_during_a_response_is_not_seen_in_its_tokens(world: World) -> None:
    """Without the memory saver, which needs CUDA, the server keeps its memory. Everything else is
    as on a GPU: it pauses, empties its cache, takes no requests, and reads all tokens again."""

    async def generate() -> tuple[Completion, Completion, float]:
        async with world.engine() as engine:
            early = asyncio.create_task(engine.generate(request(1, PROMPT, max_tokens=LONG)))
            await some_tokens(engine)
            await engine.sleep()
            received = engine.tokens.counts.generated
            late = asyncio.create_task(engine.generate(request(2, PROMPT)))
            await asyncio.sleep(1.5)  # the load watch asks the sleeping server, too
            assert not late.done()
            assert engine.tokens.counts.generated == received
            await engine.wake()
            (first,), (second,) = await asyncio.gather(early, late)
            return first, second, engine.time_use().asleep

    first, second, asleep_s = asyncio.run(generate())
    assert asleep_s > 1.4
    assert len(first.token_ids) == LONG
    for completion in (first, second):
        assert set(completion.weight_versions.tolist()) == {0}
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids)
        assert_close(completion.behaviour_logprobs, expected)


@on_one_family
def test_aborted_group_leaves_and_the_others_go_on(world: World) -> None:
    async def generate() -> tuple[
        list[tuple[Completion, ...] | BaseException], tuple[Completion, ...], SlotUse
    ]:
        async with world.engine() as engine:
            requests = [request(key, PROMPT, siblings=8, max_tokens=LONG) for key in (1, 12, 3)]
            groups = [asyncio.create_task(engine.generate(each)) for each in requests]
            await some_tokens(engine, least=8)
            await engine.abort([1, 3, 99])  # 3 still waits for slots; 99 does not exist
            outcomes = await asyncio.gather(*groups, return_exceptions=True)
            last = await engine.generate(request(4, PROMPT, siblings=NUM_SLOTS))
            return outcomes, last, engine.slot_use()

    outcomes, last, use = asyncio.run(generate())
    assert [type(outcome) for outcome in outcomes] == [Aborted, tuple, Aborted]
    kept = outcomes[1]
    assert isinstance(kept, tuple)
    assert [len(completion.token_ids) for completion in kept] == [LONG] * 8
    assert len(last) == NUM_SLOTS
    assert use.occupied > 0
    slot_seconds = use.occupied + use.queued + use.no_credit + use.tail + use.sync
    assert slot_seconds == pytest.approx(NUM_SLOTS * use.elapsed_s)


@on_one_family
def test_another_server_ends_the_responses_of_a_worker_that_leaves(world: World) -> None:
    prompt = ADMITTED.token_ids

    async def generate() -> tuple[tuple[Completion | None, ...], tuple[Completion, ...]]:
        replay = FakeReplay(credits=1)
        asked = request(0, prompt.tolist(), siblings=3, max_tokens=LONG)
        sampling = asked.sampling
        async with world.engine() as engine:
            worker = RolloutWorker(
                "rollout-0", engine, replay=replay, score=score, sampling=sampling, group_size=3
            )
            run = asyncio.create_task(worker.run())
            await some_tokens(engine)
            await asyncio.wait_for(worker.drain(), 30)
            in_flight = engine.tokens.counts.in_flight
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
        ((group_id, received),) = replay.handed_back
        assert (group_id, replay.offered) == (0, [])
        assert num_tokens(received) == in_flight, "no token is dropped"
        async with world.engine() as engine:
            return received, await engine.generate(replace(asked, partial_completions=received))

    received, completions = asyncio.run(generate())
    for partial, completion in zip(received, completions, strict=True):
        assert partial is not None
        length = len(partial.token_ids)
        assert 20 <= length < LONG
        assert completion.token_ids[:length].tolist() == partial.token_ids.tolist()
        assert len(completion.token_ids) == LONG
        expected = forward_logprobs(world.base, prompt, completion.token_ids)
        assert_close(completion.behaviour_logprobs, expected)


def test_slots_whose_requests_wait_for_memory_are_not_occupied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 slots on a server with room for the keys and values of 16 sequences."""
    monkeypatch.setattr(sglang_engine, "LOAD_EVERY_S", 0.1)
    num_tokens = 150
    world = start_world(
        "qwen3", tmp_path, f"--max-total-tokens={16 * (len(PROMPT) + num_tokens)}", num_slots=64
    )

    async def generate(adapts: bool) -> StarvedUse:
        client = world.client()
        control = SlotControl(start=64, least=8, most=64) if adapts else None
        engine = make_engine(client, num_slots=64, control=control)
        await engine.update(from_disk(client, world.folder), version=0, probe_ids=PROBE)
        before = engine.slot_use()
        siblings = 64 if adapts else 128
        await engine.generate(request(1, PROMPT, siblings=siblings, max_tokens=num_tokens))
        after, time, slots = engine.slot_use(), engine.time_use(), engine.num_slots
        await engine.close()
        spent = {
            item.name: getattr(after, item.name) - getattr(before, item.name)
            for item in fields(SlotUse)
        }
        use = SlotUse(**{**spent, "slots": slots})
        return StarvedUse(use, time, engine.tokens.counts, engine.work(), engine.kv_use())

    try:
        starved, adapted = asyncio.run(generate(False)), asyncio.run(generate(True))
    finally:
        asyncio.run(world.server.close())
    use, tokens, work, kv = starved.slots, starved.tokens, starved.work, starved.kv
    slot_seconds = sum(getattr(use, state) for state in SLOT_STATES)
    assert slot_seconds == pytest.approx(64 * use.elapsed_s)
    assert 0.1 < use.occupied / slot_seconds < 0.6
    assert use.queued / (use.queued + use.occupied) > 0.4
    for time in (starved.time, adapted.time):
        states = [getattr(time, state) for state in TIME_STATES]
        assert sum(states) == pytest.approx(time.elapsed_s)
    assert starved.time.running > 0.8 * use.elapsed_s, "a sequence runs all the time"
    assert tokens.generated == 128 * num_tokens
    assert tokens.prefilled < 128 * len(PROMPT) / 2, "siblings share the prompt's cache"
    assert kv.input_tokens == 128 * len(PROMPT)
    assert kv.cached_tokens == kv.input_tokens - tokens.prefilled
    assert 0.3 < kv.full_s / use.elapsed_s <= 1
    assert work.decoded == 128 * (num_tokens - 1)
    # Each step decodes a token of every running sequence; about 16 run.
    assert 1 / 40 < work.steps / work.decoded < 1 / 6
    found = bottleneck([verdict_row(use)], Layout.of(Config()))
    assert found is not None
    running = round(64 * use.occupied / slot_seconds)
    assert f"engines run {running} of 64 slots because the KV cache is full" in found.line
    # The same server with slots that adapt: soon few requests queue.
    assert adapted.slots.slots < 48
    assert adapted.tokens.generated == 64 * num_tokens
    assert adapted.slots.queued / adapted.slots.occupied < use.queued / use.occupied


@dataclass(frozen=True, slots=True)
class StarvedUse:
    """What an engine measured on a server that has too little memory."""

    slots: SlotUse
    time: TimeUse
    tokens: TokenCounts
    work: EngineWork
    kv: KVUse


def verdict_row(use: SlotUse) -> dict[str, float]:
    """A row of metrics.jsonl, as far as the bottleneck needs it; the learner waits too."""
    total = sum(getattr(use, state) for state in SLOT_STATES)
    parts = {f"slots.{state}": getattr(use, state) / total for state in SLOT_STATES}
    busy = {"idle.learner": 0.5, "slots.idle": 1.0 - parts["slots.occupied"]}
    return {"version": 1.0, "step_s": use.elapsed_s, **parts, **busy}


@on_one_family
def test_bench_measures_the_rows_of_a_running_server(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_KEY, world.server.api_key)
    out = tmp_path / "out.json"
    options = ["--repeats=1", "--warm-up=0", "--running=2", "--contexts=24", f"--json={out}"]
    knobs = [
        f"model.path={world.folder}",
        "rollout.engine=sglang",
        f"rollout.servers={world.server.url}",
        "rollout.num_slots=16",
        "rollout.max_response_tokens=64",
    ]
    assert main(["bench", str(QUICKSTART), "rollout", *options, *knobs]) == 0
    capacity, *others = json.loads(out.read_text())["rows"]
    assert capacity["figures"]["kv_capacity_tokens"]["values"][0] >= NUM_SLOTS * MAX_LEN
    assert [row["what"]["kind"] for row in others] == ["prefill", "decode", "generate", "generate"]
    assert all(row["figures"] for row in others)


@on_one_family
def test_a_group_id_can_be_used_again_at_once(world: World) -> None:
    async def generate() -> list[tuple[Completion, ...]]:
        asked = request(1, PROMPT, siblings=NUM_SLOTS, max_tokens=8)
        async with world.engine() as engine:
            return [await engine.generate(asked) for _ in range(20)]

    for completions in asyncio.run(generate()):
        assert [len(completion.token_ids) for completion in completions] == [8] * NUM_SLOTS


@on_one_family
def test_request_that_never_fits_is_the_callers_error(world: World) -> None:
    async def generate() -> tuple[Completion, ...]:
        async with world.engine() as engine:
            with pytest.raises(ValueError, match="refuses the request"):
                await engine.generate(request(1, PROMPT, siblings=2, max_tokens=10_000))
            return await engine.generate(request(2, PROMPT))

    assert len(asyncio.run(generate())) == 1
