"""Efficiency, idle time, MFU and MBU do not depend on the number of slots, and add up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dapo_async.model import ModelConfig
from dapo_async.model.cost import decode_bytes, decode_flops, prefill_flops
from dapo_async.model.peak import Peak
from dapo_async.replay import TokenCounts
from dapo_async.rollout import EngineWork, KVUse, SlotUse, TimeUse
from dapo_async.rollout.slot_meter import SlotMeter
from dapo_async.runtime.throughput import (
    BestRate,
    Devices,
    EngineCount,
    EngineFlow,
    Flow,
    Sides,
    rollout_idle,
)

MODEL = ModelConfig.from_dict(
    {
        "model_type": "qwen3",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
)


def flow(time_s: float, engine: EngineFlow) -> Flow:
    return Flow.of(time_s, None, {"rollout-0": engine})


class FakeEngine:
    """Makes 10 tokens/s per running sequence, at most 120; a decode step takes 0.1 s."""

    def __init__(self, num_slots: int) -> None:
        self.now_s = 0.0
        clock: Any = SimpleNamespace(now_s=lambda: self.now_s)
        self.meter, self.tokens = SlotMeter(clock, slots=num_slots), 0

    def run(self, sequences: int, seconds: float) -> None:
        """Sequences that do not fit wait at the worker."""
        for _ in range(round(seconds / 0.1)):
            self.now_s += 0.1
            self.meter.spent(running=sequences)
            self.tokens += min(sequences, 12)

    def wait(self, seconds: float, *, credit: bool) -> None:
        self.meter.starving(not credit)
        self.now_s += seconds
        self.meter.spent(running=0)
        self.meter.starving(False)

    @property
    def flow(self) -> Flow:
        counts = TokenCounts(generated=self.tokens)
        return flow(self.now_s, EngineFlow(counts, self.meter.time()))


@pytest.mark.parametrize("num_slots", [16, 128, 512])
def test_idle_and_efficiency_do_not_change_with_the_number_of_slots(num_slots: int) -> None:
    engine, best = FakeEngine(num_slots), BestRate()
    before = engine.flow
    best.learn(before)
    engine.run(16, 10.0)
    full = engine.flow
    best.learn(full)
    assert best.efficiency(before, full) == pytest.approx(1.0)
    assert rollout_idle(full.engine_time(before)) == {"rollout": pytest.approx(0.0)}
    engine.run(3, 6.0)
    engine.wait(3.0, credit=False)
    engine.wait(1.0, credit=True)
    after = engine.flow
    assert best.efficiency(full, after) == pytest.approx(0.6 * 3 / 12)
    shares = after.engine_time(full)
    assert rollout_idle(shares) == {"rollout": pytest.approx(0.4)}
    assert shares["running"] == pytest.approx(0.6)
    assert shares["no_credit"] == pytest.approx(0.3)
    assert shares["tail"] == pytest.approx(0.1)
    assert sum(shares.values()) == pytest.approx(1.0)
    slots = engine.meter.slots()
    occupied = slots.occupied / (num_slots * slots.elapsed_s)
    assert occupied == pytest.approx((16 * 10 + 3 * 6) / (num_slots * 20)), "the slots do change"


def test_efficiency_compares_with_the_best_engine_over_long_enough_intervals() -> None:
    def both(time_s: float, *generated: int) -> Flow:
        engines = {
            f"rollout-{number}": EngineFlow(
                TokenCounts(generated=count), TimeUse(time_s, running=time_s)
            )
            for number, count in enumerate(generated)
        }
        return Flow.of(time_s, None, engines)

    best, start, after = BestRate(), both(0.0, 0, 0), both(10.0, 1000, 500)
    best.learn(start)
    assert best.efficiency(start, start) is None
    assert best.efficiency(start, after) == pytest.approx(0.75), "as long as nothing is learned"
    best.learn(after)
    assert best.efficiency(start, after) == pytest.approx(0.75)
    short = both(10.1, 1900, 1400)
    best.learn(short)
    assert best.tokens_per_s == 100.0
    assert best.efficiency(after, short) == 1.0
    best.learn(both(11.0, 2000, 1500))  # the interval since 10 s is long enough
    assert best.tokens_per_s == pytest.approx(1000.0)


def test_mfu_and_mbu_of_an_engine_follow_from_its_batch_and_context() -> None:
    """100 decode steps of 8 sequences that attend to 50 tokens each, after 8 prompts of 20."""
    work = EngineWork(100, 800, 800 * 50, 8 * 20 * 21 // 2)
    tokens = TokenCounts(generated=808, prefilled=160)
    used = TimeUse(10.0, running=3.0, evaluation=1.0, tail=6.0)
    before, after = flow(0.0, EngineFlow()), flow(10.0, EngineFlow(tokens, used, work))
    peak = Peak(1e9, 1e8)
    use = Devices(MODEL, 2, per_engine=2).engine_use(before, after, {"rollout-0": peak})
    flops = 100 * decode_flops(MODEL, 8, 50.0) + prefill_flops(MODEL, [20] * 8)
    num_bytes = 100 * decode_bytes(MODEL, 8, 50.0, num_bytes=2)
    assert use["mfu.rollout"] == pytest.approx(flops / (4.0 * 2 * 1e9))
    assert use["mbu.rollout"] == pytest.approx(num_bytes / (4.0 * 2 * 1e8))
    recomputed = EngineFlow(TokenCounts(generated=808, prefilled=160, recomputed=999), used, work)
    devices = Devices(MODEL, 2, per_engine=2)
    assert devices.engine_use(before, flow(10.0, recomputed), {"rollout-0": peak}) == use
    assert devices.engine_use(before, before, {"rollout-0": peak}) == {}


def test_engine_state_is_that_of_the_time_between_two_reports() -> None:
    def engine(scale: int, *, retractions: int = 0) -> EngineFlow:
        """`scale` times: 10 s with 16 slots, half of the KV memory, 8 siblings per prompt read."""
        kv = KVUse(10.0 * scale, 5.0 * scale, retractions, 80 * scale, 70 * scale)
        slots = SlotUse(16, 10.0 * scale, 100.0 * scale, 0.0, 60.0 * scale, 0.0, 0.0)
        time = TimeUse(elapsed_s=10.0 * scale, running=10.0 * scale)
        work = EngineWork(steps=20.0 * scale, decoded=200 * scale)
        return EngineFlow(time=time, work=work, slots=slots, kv=kv)

    before = flow(0.0, engine(1, retractions=1))
    assert flow(30.0, engine(4, retractions=3)).engine_state(before) == {
        "kv.use": 0.5,
        "slots_per_engine": 16.0,
        "kv.retractions": 3,
        "prefix.hit": 7 / 8,
        "decode.batch": 10.0,
    }
    assert before.engine_state(before) == {"kv.retractions": 1}
    assert flow(0.0, EngineFlow()).engine_state(Flow.of(0.0, None, {})) == {}


def test_mean_number_of_engines_is_weighted_by_time() -> None:
    count = EngineCount()
    for time_s, engines in ((100.0, 2), (101.0, 2), (110.0, 4), (130.0, 1)):
        count.add(time_s, engines)
    assert count.mean(100.0, 110.0) == 2
    assert count.mean(105.0, 115.0) == 3.0
    assert count.mean(120.0, 140.0) == 2.5
    assert count.mean(120.0, 120.0) == 1
    assert EngineCount().mean(0.0, 1.0) == 1.0
    sides = Sides(engines=2, rollout_devices=8, learner_devices=3).with_engines(2.5)
    assert (sides.engines, sides.rollout_devices, sides.learner_devices) == (2.5, 10.0, 3)
