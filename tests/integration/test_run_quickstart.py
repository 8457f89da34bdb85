"""The quickstart, shortened: its files keep every guarantee; a broken twin fails each check."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from paths import QUICKSTART
from run_support import (
    Finished,
    check_asynchrony,
    check_checkpoint,
    check_conservation,
    check_metrics,
    check_staleness,
    check_time_law,
    check_token_flow,
    finished,
    overlap_share,
    read_rows,
    rows_of,
)
from tracking_world import check_documented, check_history, documented, summary_names

from dapo_async import config as knobs
from dapo_async.tracking.group_trace import trace_group

pytestmark = pytest.mark.ray
NUM_STEPS = 30


@pytest.fixture(scope="session")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same system at staleness 0: learner and engine wait for each other. Groups are small, so
    that many are rejected."""
    root = tmp_path_factory.mktemp("synchronous") / "run"
    small = (
        "replay.groups_per_step=8",
        "replay.group_size=4",
        "learner.num_minibatches=1",  # with more, the learner trains while the engine generates
        "train.record=true",
        "evaluation.num_prompts=0",
    )
    return finished(root, "replay.max_staleness=0", "train.num_steps=8", *small)


def all_rollouts(run: Finished) -> list[dict[str, Any]]:
    return [rollout for step in range(len(run.metrics)) for rollout in run.rollouts(step)]


def test_run_ends_done_with_every_file_in_its_directory(quickstart: Finished) -> None:
    assert quickstart.exit_code == 0, quickstart.output
    files = {path.name for path in quickstart.root.iterdir()}
    written = {
        "config.yaml",
        "summary.json",
        "metrics.jsonl",
        "files.jsonl",
        "groups.jsonl",
        "events.jsonl",
        "status.json",
        "process.json",
        "evaluations.jsonl",
        "timeline.json",
        "dynamics.png",
        "mlflow.json",
    }
    assert files == {*written, "rollouts", "recorded", "checkpoints", "evaluations"}
    assert {path.name for path in (quickstart.root / "rollouts").iterdir()} == {
        f"step_{step:06d}.jsonl" for step in range(NUM_STEPS)
    }
    assert (quickstart.root / "dynamics.png").read_bytes().startswith(b"\x89PNG")


def test_each_evaluation_says_which_problems_it_solved(quickstart: Finished) -> None:
    told = [
        json.loads(path.read_text()) for path in sorted((quickstart.root / "evaluations").iterdir())
    ]
    assert [each["version"] for each in told] == [row["version"] for row in quickstart.evaluations]
    for each, row in zip(told, quickstart.evaluations, strict=True):
        assert len(each["rows"]) == len(set(each["rows"])) == row["num_prompts"]
        assert sum(each["accuracies"]) / len(each["accuracies"]) == row["accuracy"]


def test_saved_config_is_the_one_that_ran(quickstart: Finished) -> None:
    saved = knobs.load(quickstart.root / "config.yaml")
    assert saved.train.num_steps == NUM_STEPS
    assert saved.run_dir == ""  # a run folder can be moved: its files do not name it
    assert saved.algorithm == knobs.load(QUICKSTART).algorithm


def test_metrics_are_one_flat_object_of_numbers_per_step(quickstart: Finished) -> None:
    rows = quickstart.metrics
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    for row in rows:
        assert all(
            isinstance(value, int | float) and math.isfinite(value) for value in row.values()
        ), row
        assert row["version"] == row["step"] + 1
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)


def test_summary_has_its_fixed_points(quickstart: Finished) -> None:
    summary = quickstart.summary
    assert (summary["status"], summary["reason"]) == ("done", "all steps trained")
    assert summary["steps"] == NUM_STEPS
    assert summary["tokens"] == sum(row["tokens"] for row in quickstart.metrics)
    for name in ("initial_accuracy", "final_accuracy"):
        assert 0.0 <= summary[name] <= 1.0
    assert 0.0 < summary["train_s"] < summary["wall_s"]
    assert {"rollout", "learner"} <= set(summary["idle"])
    assert all(0.0 <= share <= 1.0 for share in summary["idle"].values()), summary["idle"]
    assert set(summary["groups"]) == {
        "admitted",
        "trained",
        "evicted",
        "failed",
        "skipped",
        "unused",
        "in_flight",
        "rejected",
    }
    assert set(summary["groups"]["rejected"]) == {
        "all_correct",
        "all_wrong",
        "all_equal",
        "too_few_tokens",
        "filtered",
    }
    assert summary["caught"] == {}


def test_every_admitted_group_ends_exactly_once(quickstart: Finished) -> None:
    groups = quickstart.summary["groups"]
    check_conservation(groups)
    for row in quickstart.metrics:
        check_conservation(
            {
                name.removeprefix("groups."): count
                for name, count in row.items()
                if name.startswith("groups.")
            }
        )
    config = knobs.load(QUICKSTART)
    assert groups["trained"] == NUM_STEPS * config.replay.groups_per_step
    assert groups["evicted"] == groups["failed"] == groups["skipped"] == groups["in_flight"] == 0


def test_conservation_check_notices_one_lost_group(quickstart: Finished) -> None:
    groups = quickstart.summary["groups"]
    with pytest.raises(AssertionError, match="were admitted"):
        check_conservation({**groups, "trained": groups["trained"] - 1})


def test_no_token_is_staler_than_the_bound(quickstart: Finished) -> None:
    check_staleness(all_rollouts(quickstart), max_staleness=2)
    staleness = quickstart.summary["staleness"]
    assert 0 < staleness["max"] <= 2
    assert 0 < staleness["mean"] <= staleness["max"]


def test_staleness_check_notices_a_run_beyond_its_bound(quickstart: Finished) -> None:
    with pytest.raises(AssertionError, match="was trained at step"):
        check_staleness(
            all_rollouts(quickstart), max_staleness=quickstart.summary["staleness"]["max"] - 1
        )


def test_every_version_was_served_and_attested(quickstart: Finished) -> None:
    summary = quickstart.summary
    assert summary["weight_versions"] == NUM_STEPS + 1
    assert "mismatch" not in summary["handshake"]
    assert sum(summary["handshake"].values()) == NUM_STEPS + 1
    assert summary["handshake"]["passed"] >= NUM_STEPS // 2


def test_log_of_groups_has_every_outcome_and_tells_the_events_of_a_group(
    quickstart: Finished,
) -> None:
    counts: Counter[str] = Counter()
    for row in read_rows(quickstart.root / "groups.jsonl"):
        counts[row["event"]] += len(row.get("group_ids", ()))
    groups = quickstart.summary["groups"]
    assert counts["admitted"] == groups["admitted"]
    assert counts["trained"] == counts["released"] == groups["trained"]
    assert counts["rejected"] == sum(groups["rejected"].values())
    assert counts["unused"] == groups["unused"]
    group_id = quickstart.rollouts(9)[0]["group_id"]
    header, _, *events, responses = trace_group(quickstart.root, group_id)
    assert header.endswith(": trained")
    assert responses.endswith("rollouts/step_000009.jsonl")
    told = " ".join(events)
    size = knobs.load(quickstart.root / "config.yaml").replay.group_size
    assert sum(" ends with " in event for event in events) == size
    order = ("admitted to", " start", " ends with ", "scored", "offered", "taken", "trained")
    places = [told.index(event) for event in (*order, "released")]
    assert places == sorted(places), told


def test_arrows_of_groups_join_bars_of_all_actors(quickstart: Finished) -> None:
    points = [event for event in quickstart.trace if event["ph"] in ("s", "t", "f")]
    bars = [event for event in quickstart.trace if event["ph"] == "X"]
    for point in points:
        assert any(
            bar["pid"] == point["pid"] and bar["ts"] <= point["ts"] <= bar["ts"] + bar["dur"]
            for bar in bars
        ), point
    whole = [each for each in points if each["ph"] == "f"]
    assert len(whole) >= NUM_STEPS / 2
    by_group: dict[int, dict[int, Any]] = {each["id"]: {} for each in whole}
    for point in points:
        by_group.get(point["id"], {})[point["pid"]] = point
    assert max(len(actors) for actors in by_group.values()) == 3  # replay, rollout-0, learner


def test_timeline_is_a_chrome_trace_with_a_row_per_actor(quickstart: Finished) -> None:
    rows = rows_of(quickstart.trace)
    assert min(row[0][1] for row in rows.values()) == 0.0
    assert set(rows) == {
        "driver",
        "learner",
        "replay",
        "rollout-0",
        "evaluator",
    }


def test_states_of_every_actor_add_up_to_its_time(quickstart: Finished) -> None:
    rows = rows_of(quickstart.trace)
    check_time_law(rows)
    for actor, row in rows.items():
        total_s = sum(quickstart.summary["seconds_by_state"][actor].values())
        assert total_s == pytest.approx(sum(end - start for _, start, end in row), rel=1e-3)


@pytest.mark.parametrize("actor", ["driver", "learner", "replay", "rollout-0"])
def test_time_law_notices_one_lost_span(quickstart: Finished, actor: str) -> None:
    rows = rows_of(quickstart.trace)
    longest = max(rows[actor][1:-1], key=lambda span: span[2] - span[1])
    lossy = {**rows, actor: [span for span in rows[actor] if span != longest]}
    with pytest.raises(AssertionError, match=f"{actor}: .* s in states"):
        check_time_law(lossy)


def test_time_law_notices_two_states_at_a_time(quickstart: Finished) -> None:
    rows = rows_of(quickstart.trace)
    state, start_s, end_s = rows["learner"][3]
    doubled = {
        **rows,
        "learner": [*rows["learner"][:3], (state, start_s - 0.1, end_s), *rows["learner"][4:]],
    }
    with pytest.raises(AssertionError, match="at the same time"):
        check_time_law(doubled)


def test_engine_generates_while_the_learner_trains(quickstart: Finished) -> None:
    check_asynchrony(rows_of(quickstart.trace), all_rollouts(quickstart))


def test_asynchrony_check_fails_on_a_synchronous_run(synchronous: Finished) -> None:
    rows = rows_of(synchronous.trace)
    assert overlap_share(rows) == 0.0
    with pytest.raises(AssertionError, match="of the train spans only"):
        check_asynchrony(rows, all_rollouts(synchronous))
    assert all(len(rollout["weight_versions"]) == 1 for rollout in all_rollouts(synchronous))


def test_synchronous_run_counts_its_refill_waves(
    synchronous: Finished, quickstart: Finished
) -> None:
    assert synchronous.exit_code == 0, synchronous.output
    rows = synchronous.metrics
    assert all("refill_waves" in row for row in rows)
    assert sum(row["refill_waves"] for row in rows) > 0
    assert any(row.get("rejected.all_wrong", 0) for row in rows)
    assert not any("refill_waves" in row for row in quickstart.metrics)
    check_conservation(synchronous.summary["groups"])
    assert synchronous.summary["staleness"] == {"mean": 0.0, "max": 0}


def test_ratio_is_one_up_to_rounding_at_staleness_0_and_only_there(
    synchronous: Finished, quickstart: Finished
) -> None:
    assert max(row["behaviour_log_ratio_max"] for row in synchronous.metrics) <= 1e-5
    assert max(row["behaviour_log_ratio_max"] for row in quickstart.metrics) > 1e-3


def test_metrics_follow_from_the_rollouts(quickstart: Finished, synchronous: Finished) -> None:
    for run in (quickstart, synchronous):
        for row in run.metrics:
            check_metrics(row, run.rollouts(row["step"]))


def test_generated_tokens_are_trained_wasted_for_a_reason_or_in_flight(
    quickstart: Finished, synchronous: Finished
) -> None:
    for run in (quickstart, synchronous):
        flow = run.summary["token_flow"]
        check_token_flow(flow)
        assert flow["trained"] == run.summary["tokens"] > 0, "the learner counts them by itself"
        assert (flow["rejected"] > 0) == any(run.summary["groups"]["rejected"].values())
        assert (flow["evaluation"] > 0) == (run is quickstart)
        for row in run.metrics:
            named = {
                name.removeprefix("token_flow."): count
                for name, count in row.items()
                if name.startswith("token_flow.")
            }
            check_token_flow(named)
            assert row["tokens_per_s.generated"] >= 0


def test_time_of_the_engines_adds_up_and_devices_are_used(quickstart: Finished) -> None:
    for engine in quickstart.summary["engines"].values():
        seconds = sum(engine["seconds"].values())
        slots = sum(engine["slot_seconds"].values()) / seconds
        assert slots == pytest.approx(round(slots), rel=1e-2), "slots x seconds"
        assert seconds > quickstart.summary["train_s"]
        assert engine["seconds"]["evaluation"] > 0
    for row in quickstart.metrics:
        shares = [share for name, share in row.items() if name.startswith("engine_time.")]
        assert sum(shares) == pytest.approx(1.0)
        assert 0 < row["mfu.learner"] < 1
        assert 0 < row["mfu.rollout"] < 1
        assert 0 < row["mbu.rollout"] < 1
        assert 0 < row["efficiency.rollout"] <= 1
    for name in ("mfu.learner", "mfu.rollout", "mbu.rollout", "efficiency.rollout"):
        assert 0 < quickstart.summary[name] <= 1, name


def test_every_number_is_documented_and_every_documented_one_is_written(
    quickstart: Finished, synchronous: Finished
) -> None:
    rows = {name for run in (quickstart, synchronous) for row in run.metrics for name in row}
    rows.add("reference_kl")  # only with algorithm.kl_coef
    # Only of a model with experts.
    rows |= {"expert_load.0", "expert_load_max", "experts_dead.0", "experts_dead_max"}
    rows.add("experts_replaced")
    check_documented(rows, documented("metrics.jsonl"))
    check_documented(summary_names(quickstart.summary), documented("summary.json"))


def test_mlflow_has_every_number_and_the_readable_files_of_the_run(quickstart: Finished) -> None:
    client, run_id = (
        MlflowClient(f"sqlite:///{quickstart.root.parent}/mlflow.db"),
        quickstart.summary["mlflow_run_id"],
    )
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["status"], run.info.run_name) == (
        "FINISHED",
        "done",
        "run",
    )
    assert run.data.params["train.num_steps"] == str(NUM_STEPS)
    check_history(client, run_id, quickstart.metrics)
    accuracies = {
        point.step: point.value
        for point in client.get_metric_history(run_id, "evaluation/accuracy")
    }
    assert accuracies == {
        evaluation["version"]: evaluation["accuracy"] for evaluation in quickstart.evaluations
    }
    assert accuracies[0] == quickstart.summary["initial_accuracy"]
    assert accuracies[NUM_STEPS] == quickstart.summary["final_accuracy"]
    copies = quickstart.root.parent / "mlartifacts" / run_id / "artifacts"
    for name in ("config.yaml", "dynamics.png"):
        assert (copies / name).read_bytes() == (quickstart.root / name).read_bytes()
    assert (
        json.loads((copies / "summary.json").read_text())["final_accuracy"]
        == quickstart.summary["final_accuracy"]
    )
    assert 3 <= len(list((copies / "rollouts").iterdir())) <= 16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 0.5),
        ("reward", 7.0),
        ("tokens", 1000),
        ("finish_reason", "length"),
        ("weight_versions", [[0, 0, 9]]),
        ("group_id", -1),
    ],
)
def test_recomputed_metrics_notice_one_changed_response(
    quickstart: Finished, name: str, value: object
) -> None:
    row = quickstart.metrics[NUM_STEPS - 1]
    rollouts = copy.deepcopy(quickstart.rollouts(row["step"]))
    next(rollout for rollout in rollouts if rollout[name] != value)[name] = value
    with pytest.raises(AssertionError, match="in the rollouts"):
        check_metrics(row, rollouts)


def test_checkpoint_loads_in_transformers_and_is_not_the_base(quickstart: Finished) -> None:
    checkpoint = quickstart.checkpoint
    assert checkpoint == quickstart.root / "checkpoints" / f"step_{NUM_STEPS:06d}"
    check_checkpoint(checkpoint, differs_from=Path(knobs.load(QUICKSTART).model.path))


def test_checkpoint_check_notices_an_untrained_model() -> None:
    base = Path(knobs.load(QUICKSTART).model.path)
    with pytest.raises(AssertionError, match="logits are those of"):
        check_checkpoint(base, differs_from=base)
