"""The simulator is fast enough to sweep splits while somebody waits."""

from __future__ import annotations

import planner_truth
import pytest


@pytest.mark.timeout(900)
def test_100_steps_of_8192_rollouts_on_128_gpus_take_less_than_10_s_of_one_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CPU seconds. On a busy machine the slowest of three may take twice as long."""
    monkeypatch.setattr(planner_truth, "REPEATS", 3)
    found = planner_truth.speed(num_steps=100)
    assert found["rollouts"] == 819_200
    assert min(found["CPU s of each"]) < 10.0
