"""A benchmark measures a fixed number of slots, also with `rollout.num_slots=auto`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from paths import QUICKSTART

from dapo_async.bench.command import BenchOptions, with_fixed_slots
from dapo_async.config import load

OPTIONS = BenchOptions(subject="rollout")


@pytest.mark.parametrize(
    ("slots", "running", "fixed"),
    [("auto", None, 64), ("auto", (1, 256), 256), ("auto", (8,), 64), ("32", (8,), 32)],
)
def test_adaptive_slots_become_a_number(
    slots: str, running: tuple[int, ...] | None, fixed: int
) -> None:
    config = load(QUICKSTART, [f"rollout.num_slots={slots}"])
    found = with_fixed_slots(config, replace(OPTIONS, running=running))
    assert found.rollout.num_slots == fixed
