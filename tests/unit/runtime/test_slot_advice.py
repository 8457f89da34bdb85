"""Credits against slots: one line where some slots can never be occupied."""

from __future__ import annotations

import pytest
from paths import CONFIGS, QUICKSTART

from dapo_async.config import load
from dapo_async.runtime.slot_advice import slot_advice


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("rollout.engine=sglang rollout.num_slots=auto replay.groups_per_step=2", None),
        (
            "rollout.num_slots=auto replay.groups_per_step=2 replay.max_staleness=0",
            "credits allow 32 sequences in flight, the engines have 64 slots: "
            "set replay.max_staleness=1 or rollout.num_slots=32",
        ),
        # 32 x 16 x 3 = 1536 sequences
        ("rollout.num_slots=1536", None),
        (
            "rollout.num_slots=1537",
            "credits allow 1536 sequences in flight, the engines have 1537 slots: "
            "set replay.max_staleness=3 or rollout.num_slots=1536",
        ),
        (
            "replay.groups_per_step=4 replay.max_staleness=0 rollout.num_workers=4",
            "credits allow 64 sequences in flight, the engines have 512 slots: "
            "set replay.max_staleness=7 or rollout.num_slots=16",
        ),
        (
            "replay.groups_per_step=2 rollout.num_workers=3 rollout.num_slots=256",
            "credits allow 96 sequences in flight, the engines have 768 slots: "
            "set rollout.num_slots=32",
        ),
        (
            "replay.admission=lockstep replay.max_staleness=0 replay.groups_per_step=4",
            "credits allow 64 sequences in flight, the engines have 128 slots: "
            "set rollout.num_slots=64",
        ),
    ],
)
def test_line_names_the_bound_or_the_slots_that_match(overrides: str, line: str | None) -> None:
    assert slot_advice(load(QUICKSTART, overrides.split())) == line


def test_what_the_line_advises_ends_it() -> None:
    few = "replay.groups_per_step=4 rollout.num_workers=3 rollout.num_slots=100"
    line = slot_advice(load(QUICKSTART, few.split()))
    assert line is not None
    for advice in line.partition(": set ")[2].split(" or "):
        assert slot_advice(load(QUICKSTART, [*few.split(), advice])) is None


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_credits_for_all_its_slots(file: object) -> None:
    assert slot_advice(load(str(file))) is None
