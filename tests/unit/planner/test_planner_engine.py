"""One simulated engine: against a loop over single decode steps, and with a full KV cache."""

from __future__ import annotations

import pytest

from dapo_async.planner.engine import EngineSpeed, OpenGroup, Sequence, SimulatedEngine
from dapo_async.replay.slot_demand import SlotDemand


def engine_of(speed: EngineSpeed, *lengths: int, prompt_tokens: int = 0) -> SimulatedEngine:
    """An engine with one group of these lengths."""
    demand = SlotDemand(num_slots=speed.num_slots, group_size=len(lengths))
    engine = SimulatedEngine(0, speed, prompt_tokens=prompt_tokens, demand=demand)
    group = OpenGroup(0, list(lengths), 0.0, demand.start(), len(lengths))
    engine.waiting.extend(Sequence(group, float(tokens)) for tokens in lengths)
    engine.fill()
    return engine


def play(engine: SimulatedEngine) -> list[tuple[float, int]]:
    """Time and finished sequences of each event, until the engine is empty."""
    events, before = [], len(engine.sequences) + len(engine.waiting)
    while engine.sequences:
        time_s = engine.next_event_s()
        engine.arrive(time_s)
        engine.finish()
        if engine.is_full:
            engine.retract()
        engine.fill()
        left = len(engine.sequences) + len(engine.waiting)
        events.append((time_s, before - left))
        before = left
    return events


def ends_by_single_steps(
    speed: EngineSpeed, lengths: tuple[int, ...], *, prompt_tokens: int
) -> list[float]:
    """When sequences of these lengths end: a loop over decode steps, all run from the start."""
    now_s, ends, running = 0.0, [], sorted(lengths)
    for step in range(max(lengths)):
        n = len(running)
        context = n * (prompt_tokens + step + 0.5)
        now_s += speed.step_s[n] + speed.context_s * context
        while running and running[0] == step + 1:
            running.pop(0)
            ends.append(now_s)
    return ends


def test_events_are_those_of_a_loop_over_single_decode_steps() -> None:
    speed = EngineSpeed(step_s=(0.01, 0.011, 0.013, 0.016, 0.02), context_s=1e-5)
    lengths, prompt_tokens = (300, 100, 250, 37), 50
    expected = ends_by_single_steps(speed, lengths, prompt_tokens=prompt_tokens)
    events = play(engine_of(speed, *lengths, prompt_tokens=prompt_tokens))
    assert [time_s for time_s, _ in events] == pytest.approx(expected, rel=1e-9)


def test_a_stop_between_events_changes_nothing() -> None:
    speed = EngineSpeed(step_s=(0.01,) * 4, context_s=1e-5)
    whole, stopped = (engine_of(speed, 300, 100, 200) for _ in range(2))
    end_s = play(whole)[-1][0]
    for k in range(1, 7):
        stopped.advance(k * 0.1)
    assert play(stopped)[-1][0] == pytest.approx(end_s)
    assert stopped.generated == pytest.approx(600)


def test_a_free_slot_is_refilled_at_once() -> None:
    engine = engine_of(EngineSpeed.constant(1.0, 2), 10, 30, 20, 5)
    times, counts = zip(*play(engine), strict=True)
    assert times == pytest.approx((10, 30, 35))
    assert counts == (1, 2, 1)
    assert engine.slot_s.running == pytest.approx(65)


def test_prefill_delays_every_sequence_and_a_prompt_is_prefilled_once_per_version() -> None:
    speed = EngineSpeed(step_s=(1.0,) * 5, prefill_s=0.1)
    engine = engine_of(speed, 10, 10, 10, 10, prompt_tokens=20)
    assert engine.next_event_s() == pytest.approx(12.0)
    assert engine.prefilled_tokens == 20
    engine.advance(7.0)  # five tokens each
    engine.switch(1, recompute=True)
    assert engine.prefilled_tokens == 20 + 4 * 25
    assert engine.next_event_s() == pytest.approx(7.0 + 10.0 + 5.0)


def test_a_full_cache_retracts_the_shortest_and_loses_no_token() -> None:
    speed = EngineSpeed(step_s=(1.0,) * 5, kv_tokens=100, prefill_s=0.01, reserve_tokens=5)
    engine = engine_of(speed, 60, 60, 60, 60)
    events = play(engine)
    assert sum(count for _, count in events) == 4
    assert engine.num_retracted >= 2
    assert engine.generated == pytest.approx(240)
    assert engine.prefilled_tokens > 0
    end_s = events[-1][0]
    assert sum(engine.slot_s.values()) == pytest.approx(4 * end_s)
    assert engine.slot_s.queued > 0


def test_tokens_have_the_version_that_the_engine_served_when_they_were_sampled() -> None:
    engine = engine_of(EngineSpeed.constant(1.0, 2), 10, 20)
    sequence = engine.sequences[0]
    group = sequence.group
    engine.advance(5.0)
    engine.switch(3, recompute=False)
    play(engine)
    assert group.versions == pytest.approx(3 * (5 + 15))
    assert group.oldest_version == 0
