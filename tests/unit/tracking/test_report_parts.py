"""The verdict on a run, and the colours of its rollouts' tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from tracking_world import run_dir_with

from dapo_async.algorithm import group_advantages
from dapo_async.data.tokenizer import load_tokenizer
from dapo_async.replay.group_io import write_groups
from dapo_async.tracking.report_page import response
from dapo_async.tracking.report_reading import RunRecord, read_run
from dapo_async.tracking.rollout_tokens import Piece, TokenReader, advantages, spans_of
from dapo_async.tracking.verdict import duration, verdict
from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout

MODEL = ROOT / "configs" / "base" / "quickstart"
SUMMARY: dict[str, Any] = {
    "status": "done",
    "reason": "all steps trained",
    "steps": 30,
    "train_s": 234.2,
    "initial_accuracy": 0.141,
    "final_accuracy": 0.998,
    "idle": {"learner": 0.63, "rollout": 0.27},
    "bottleneck": "generation limits the speed (idle: learner 63%, engine slots 27%)",
    "groups": {"admitted": 100, "rejected": {"all_correct": 70, "all_wrong": 3}},
}


def test_verdict_says_what_a_run_reached_and_what_limited_it() -> None:
    assert verdict(SUMMARY, []) == (
        "Trained 30 steps in 3 min 54 s; held-out accuracy rose from 0.141 to 0.998; generation "
        "limits the speed (idle: learner 63%, engine slots 27%)."
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bottleneck": None}, "rose from 0.141 to 0.998."),
        ({"final_accuracy": 0.1}, "held-out accuracy fell from 0.141 to 0.100"),
        ({"final_accuracy": 0.143}, "held-out accuracy stayed at 0.143"),
        ({"status": "failed"}, "Failed after 30 steps in 3 min 54 s (all steps trained)"),
        ({"status": "solved"}, "Ended early after 30 steps"),
        ({"status": "out_of_time"}, "Ran out of time after 30 steps"),
    ],
)
def test_verdict_follows_the_summary(changes: dict[str, Any], expected: str) -> None:
    assert expected in verdict(SUMMARY | changes, [])


def test_verdict_needs_no_summary() -> None:
    assert verdict({}, [{"truncated": 0.5}]) == (
        "1 steps are written and there is no summary: the run goes on, or was killed; "
        "50% of the last step's responses were cut at rollout.max_response_tokens."
    )
    assert [duration(s) for s in (12.4, 234.2, 7384)] == ["12 s", "3 min 54 s", "2 h 3 min"]


def recorded_run(root: Path) -> tuple[RunRecord, dict[str, Any]]:
    """A run with one recorded rollout of two weight versions, and its row of rollouts/."""
    run_dir = run_dir_with(root)
    run_dir.config.write_text(f"model:\n  path: {MODEL}\n")
    tokenizer = load_tokenizer(MODEL)
    ids: Any = tokenizer(["12#34"], add_special_tokens=False)
    token_ids = np.array(ids["input_ids"][0], np.int32)
    versions = np.array([3] * 2 + [4] * (len(token_ids) - 2), np.int32)
    completion = Completion(
        token_ids=token_ids,
        behaviour_logprobs=np.zeros(len(token_ids), np.float32),
        weight_versions=versions,
        prefill_version=3,
        finish_reason=FinishReason.STOP,
    )
    text = tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
    rollout = Rollout(
        completion=completion, text=text, accuracy=1.0, reward=1.0, extracted="4", reason="correct"
    )
    prompt = Prompt(row=0, text="1+3=", answer="4", token_ids=np.array([1], np.int32), source="")
    (run_dir.root / "recorded").mkdir()
    path = run_dir.root / "recorded" / "step_000004.safetensors"
    write_groups(path, [Group(7, prompt, (rollout,), "x", 1.0)])
    spans = [[3, 0, 2], [4, 2, len(token_ids)]]
    row = {"group_id": 7, "sibling": 0, "response": text, "weight_versions": spans}
    return read_run(run_dir.root, "run"), row


def test_recorded_response_is_cut_where_its_weight_version_changes(tmp_path: Path) -> None:
    run, row = recorded_run(tmp_path / "run")
    pieces = TokenReader(run, 4).pieces(row)
    assert [(piece.version, piece.first, piece.end) for piece in pieces] == [
        (3, 0, 2),
        (4, 2, row["weight_versions"][1][2]),
    ]
    assert "".join(piece.text for piece in pieces) == row["response"]
    assert all(piece.text for piece in pieces)
    # Another step was not recorded: one piece without a version.
    assert TokenReader(run, 3).pieces(row) == [Piece(row["response"], None)]
    single = row | {"weight_versions": [[3, 0, 5]]}
    assert TokenReader(run, 3).pieces(single) == [Piece(row["response"], 3, 0, 5)]
    assert run.notes == []


def test_broken_record_is_a_note_and_not_an_error(tmp_path: Path) -> None:
    run, row = recorded_run(tmp_path / "run")
    (run.root / "recorded" / "step_000004.safetensors").write_bytes(b"broken")
    assert TokenReader(run, 4).pieces(row) == [Piece(row["response"], None)]
    (line,) = run.notes
    assert line.startswith("step_000004.safetensors can't colour tokens by weight version: ")


@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_are_those_of_the_learner(normalize_std: bool) -> None:
    import torch

    rewards = [1.0, -1.0, -0.5, 1.0]
    config = {"replay.group_size": 4, "algorithm.normalize_std": normalize_std}
    found = advantages([{"reward": reward} for reward in rewards], config)
    expected = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        normalize_std=normalize_std,
    )
    assert found == pytest.approx(expected.tolist())


def test_advantage_of_an_incomplete_group_is_unknown() -> None:
    rows: list[dict[str, Any]] = [{"reward": 1.0}, {"reward": None}]
    assert all(map(math.isnan, advantages(rows, {})))
    assert all(map(math.isnan, advantages(rows[:1], {"replay.group_size": 2})))
    assert advantages(rows[:1], {}) == [0.0]


def test_response_has_a_shade_per_staleness_and_a_side_per_advantage() -> None:
    html = response([Piece("<a>", 3, 0, 2), Piece("b", 1, 2, 3)], step=3, advantage=-0.5)
    assert html == (
        '<pre class="down" style="--a:30">'
        '<span class="v0" title="weight version 3, 0 behind; tokens 0 to 2">&lt;a&gt;</span>'
        '<span class="v2" title="weight version 1, 2 behind; tokens 2 to 3">b</span></pre>'
    )
    plain = response([Piece("x", None)], step=3, advantage=math.nan)
    assert plain == '<pre class="" style="--a:0">x</pre>'


@pytest.mark.parametrize("spans", [None, 7, [[1, 2]], [["1", 0, 2]], [[1, 0, 2], 7]])
def test_spans_of_another_form_are_none(spans: Any) -> None:
    assert spans_of({"weight_versions": spans}) == []
