"""Prometheus gauges: which there are, their labels, and the dashboard that shows them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from tracking_world import documented, step_row

from dapo_async.runtime.gauges import OF_ROW, Gauges, all_names

DASHBOARD = ROOT / "cluster" / "grafana" / "dapo_async.json"
METRIC = re.compile(r"\b((?:ray_dapo_async_|sglang:)[a-z0-9_]+)")


class FakeGauge:
    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["run"], tags["actor"], tags["engine"]] = value


def queries() -> Iterator[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable["query"]


def test_every_gauge_is_a_documented_metric() -> None:
    known = set(documented("metrics.jsonl"))
    patterns = [re.compile(re.sub(r"\\<\w+\\>|<\w+>", "[^.]+", re.escape(each))) for each in known]
    for names in OF_ROW.values():
        for name in names:
            assert any(pattern.fullmatch(name) for pattern in patterns), name


def test_each_gauge_has_run_actor_and_engine() -> None:
    made: dict[str, FakeGauge] = {}

    def make(name: str) -> FakeGauge:
        made[name] = FakeGauge(name)
        return made[name]

    gauges = Gauges("quickstart", make=make)
    row = step_row(4) | {"tokens_per_s.generated": 900.0, "entropy": None}
    engines = {"rollout-0": {"version": 4.0, "tokens_per_s": 900.0}, "rollout-1": {"version": 3.0}}
    gauges.step(row, engines)
    gauges.step(row | {"tokens_per_s.generated": 800.0}, engines)
    gauges.evaluation({"version": 4, "accuracy": 0.25})
    assert made["dapo_async_tokens_per_s_generated"].values == {("quickstart", "rollout", ""): 800}
    assert made["dapo_async_version"].values == {("quickstart", "driver", ""): 5}
    assert made["dapo_async_engine_version"].values == {
        ("quickstart", "rollout-0", "rollout-0"): 4,
        ("quickstart", "rollout-1", "rollout-1"): 3,
    }
    assert made["dapo_async_evaluation_accuracy"].values == {("quickstart", "evaluator", ""): 0.25}
    assert "dapo_async_entropy" not in made, "a number that is not known has no gauge"


def test_dashboard_shows_each_gauge_and_nothing_that_does_not_exist() -> None:
    shown = {name for query in queries() for name in METRIC.findall(query)}
    own = {name for name in shown if name.startswith("ray_")}
    assert own == all_names()
    assert len(own) > 50


def test_sglang_metrics_of_the_dashboard_exist_in_the_installed_sglang() -> None:
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    source = Path(spec.submodule_search_locations[0]) / "srt"
    texts = [path.read_text() for path in source.rglob("*metrics_collector.py")]
    shown = {name for query in queries() for name in METRIC.findall(query)}
    for name in shown:
        if name.startswith("sglang:"):
            assert any(f'"{name}"' in text for text in texts), name
