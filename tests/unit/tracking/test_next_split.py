"""What the planner says about a running job."""

from __future__ import annotations

import math
import time
from typing import Any, cast

import pytest
from paths import ROOT

from dapo_async import config as knobs
from dapo_async.config import Config
from dapo_async.tracking import bottleneck
from dapo_async.tracking.bottleneck import BottleneckWatch, Idle, Layout, advised_split
from dapo_async.tracking.faults import WINDOW
from dapo_async.tracking.next_split import NextSplit, compared, next_split, split_line

GROUPS, SIZE, MEAN, SLOTS = 16, 8, 400, 64
TOKENS = float(GROUPS * SIZE * MEAN)


def config_of(*changes: str) -> Config:
    """Two engines and six learner GPUs."""
    return knobs.load(
        ROOT / "configs" / "quickstart.yaml",
        [
            "model.device=cuda",
            f"replay.groups_per_step={GROUPS}",
            f"replay.group_size={SIZE}",
            "replay.max_staleness=6",
            "rollout.num_workers=2",
            f"rollout.num_slots={SLOTS}",
            f"rollout.max_response_tokens={2 * MEAN}",
            "reward.overlong_cache_tokens=null",
            "learner.data_parallel=6",
            "learner.num_minibatches=1",
            *changes,
        ],
        files=False,
    )


def rows(count: int = WINDOW, **changes: Any) -> list[dict[str, float]]:
    """The engines are busy all the time, the learner a quarter of it."""
    row = {
        "step_s": 8.0,
        "tokens": TOKENS,
        "response_tokens": float(MEAN),
        "staleness": 1.0,
        "idle.learner": 0.75,
        "slots.idle": 0.02,
        "offered": float(GROUPS),
        "acceptance": 1.0,
        "tokens_per_s.generated": TOKENS / 8.0,
        "publish_pause_s": 0.0,
        "group_staleness_max": 2.0,
        **changes,
    }
    return [{**row, "version": 1.0 + each} for each in range(count)]


def test_a_run_whose_engines_limit_it_is_advised_to_give_them_gpus() -> None:
    found = next_split(rows(), config_of())
    assert found is not None
    assert found.engines > 2
    assert found.engines + found.learner_gpus == 8
    assert 1.5 < found.gain < found.engines / 2


def test_the_finding_of_a_window_takes_the_planners_split() -> None:
    config = config_of()
    watch, found = BottleneckWatch(Layout.of(config)), next_split(rows(), config)
    line = [watch.add(row) for row in rows()][-1]
    assert line is not None
    assert found is not None
    assert f"rollout.num_workers={found.engines} instead of 2" in line.line
    # The learner worked a quarter of the time on six GPUs: on three of them half of it.
    assert (found.learner_gpus, found.gain > 0.98 / 0.5) == (3, True)
    assert "about 1.96 times" in line.line


def test_gain_of_a_split_is_not_more_than_the_idle_shares_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in benchmarks/advice.py: five engines worked 78 % of the time, so four gain nothing."""
    config = config_of("learner.data_parallel=3", "rollout.num_workers=5")
    promised = NextSplit(4, 4, 1.19, cast(Any, None))
    monkeypatch.setattr(bottleneck, "next_split", lambda *_: promised)
    shares: dict[str, Any] = {"idle.learner": 0.05, "slots.idle": 0.22}
    balanced = rows(**shares)
    idle, layout = Idle.over(balanced), Layout.of(config)
    assert idle is not None
    assert advised_split(idle, layout, balanced) is None
    shares = {"idle.learner": 0.02, "slots.idle": 0.6}
    waiting = rows(**shares)
    idle = Idle.over(waiting)
    assert idle is not None
    found = advised_split(idle, layout, waiting)
    assert found is not None
    assert found[:2] == (4, 4)
    assert found[2] == pytest.approx(1.19)


def test_the_summary_has_measured_predicted_and_recommended() -> None:
    watch = BottleneckWatch(Layout.of(config_of()))
    for row in rows(2 * WINDOW):
        watch.add(row)
    split = watch.split()
    assert split is not None
    assert split["measured"] == {"step_s": 8.0, "staleness": 1.0, "idle_learner": 0.75}
    assert split["predicted"]["step_s"] == pytest.approx(8.0, rel=0.15)
    assert split["predicted"]["idle_learner"] == pytest.approx(0.75, abs=0.1)
    wanted = split["recommended"]
    assert wanted["gain"] > 1.3
    assert wanted["step_s"] == pytest.approx(8.0 / wanted["gain"])
    line = split_line(split)
    assert line is not None
    assert "8 s per step measured in the last steps" in line
    assert f"rollout.num_workers={wanted['engines']}" in line


def test_without_gpus_nothing_is_recommended_but_the_step_is_predicted() -> None:
    split = compared(rows(), config_of("model.device=cpu"))
    assert split is not None
    assert split["recommended"] is None
    assert "recommended" not in str(split_line(split))


def test_no_split_is_recommended_for_shared_gpus_and_their_step_is_predicted() -> None:
    """Validation refuses one: each rank has its own engine there."""
    shared = ("model.placement=shared", "weights.transport=disk", "rollout.num_workers=6")
    config = config_of(*shared, "replay.max_staleness=1", "rollout.num_slots=16")
    turns: dict[str, Any] = {"idle.learner": 0.75, "slots.idle": 0.1, "slots.asleep": 0.25}
    turns["switch_s"] = 0.2
    watch = BottleneckWatch(Layout.of(config))
    for row in rows(2 * WINDOW, **turns):
        watch.add(row)
    split = watch.split()
    assert split is not None
    assert split["recommended"] is None
    assert split["predicted"]["step_s"] == pytest.approx(8.0, rel=0.15)
    assert next_split(rows(**turns), config) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_s.generated": math.nan},
        {"tokens": 0.0},
        {"acceptance": 0.0},
        {"slots.idle": 1.0},
        {"response_tokens": 5.0 * MEAN},
    ],
)
def test_rows_that_say_too_little_give_no_advice(changes: dict[str, Any]) -> None:
    assert next_split(rows(**changes), config_of()) is None
    assert compared(rows(**changes), config_of()) is None
    assert split_line(None) is None


def test_the_advice_takes_a_few_milliseconds() -> None:
    config = config_of("rollout.num_workers=48", "learner.data_parallel=16")
    next_split(rows(), config)  # draws the lengths once
    began_s = time.process_time()
    next_split(rows(), config)
    assert time.process_time() - began_s < 0.05
