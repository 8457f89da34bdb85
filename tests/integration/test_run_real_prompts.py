"""Real prompts through the whole loop: a model that knows nothing ends with a clear message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import QUICKSTART
from run_support import check_conservation, finished
from shared_data import DATA, EVALUATION_SETS, needs_data

from dapo_async import config as knobs
from dapo_async.data import TEMPLATES, load_tokenizer

CONFIG = QUICKSTART.with_name("real_prompts.yaml")
SETS = ",".join(f"{name}={path}" for name, path in EVALUATION_SETS.items() if name != "aime24")
HERE = (f"data.heldout=aime24={EVALUATION_SETS['aime24']}", f"data.contamination=drop,{SETS}")


@needs_data
@pytest.mark.ray
def test_real_prompts_that_a_random_model_never_solves_end_with_a_clear_message(
    tmp_path: Path,
) -> None:
    # A part of the file with five evaluation problems: tokenising all takes longer than the run.
    part = tmp_path / "part.jsonl"
    part.write_bytes(
        b"".join(
            (DATA / "dapo_math_17k" / "data.jsonl")
            .read_bytes()
            .splitlines(keepends=True)[5000:7000]
        )
    )
    small = (
        "replay.groups_per_step=1",
        "learner.num_minibatches=1",
        "evaluation.num_prompts=4",
        "tracking.sinks=none",
        "rollout.max_response_tokens=8",
        "train.record=true",
    )
    run = finished(
        tmp_path / "run",
        f"data.train=dapo_math_17k_en={part}",
        *HERE,
        *small,
        config=CONFIG,
        timeout_s=150.0,
    )
    summary = run.summary
    assert (run.exit_code, summary["status"], summary["steps"]) == (1, "failed", 0), run.output
    assert summary["reason"].startswith(
        "the filters rejected 32 groups in a row (all_wrong 32); "
        "read the run's rollouts: all_wrong means too hard "
    )
    assert summary["groups"]["rejected"]["all_wrong"] == summary["groups"]["admitted"] >= 32
    check_conservation(summary["groups"])
    left_out = (
        "20 of another language (rows 386, 392, 395, …), "
        "5 contaminated (rows 577, 675, 925, …), 495 over-long (rows 32, 33, 43, …)"
    )
    kept = "kept: 430 with control characters (rows 809, 1226, 1227, …)"
    known = "evaluation problems among them, left out: math500 5"
    assert (
        "1480 prompts of 276 to 640 tokens from dapo_math_17k_en; "
        f"left out: {left_out}; {kept}; {known}\n" in run.output
    )
    assert (
        "held-out   20 prompts of 354 to 633 tokens from aime24; "
        "left out: 10 over-long (rows 1, 6, 9, …)\n" in run.output
    )
    assert f"failed: {summary['reason']}\n" in run.output


@needs_data
def test_a_real_problem_is_its_bytes_in_the_words_of_dapo() -> None:
    tokenizer = load_tokenizer(Path(knobs.load(CONFIG).model.path))
    problem = (
        json.loads((DATA / "dapo_math_17k" / "data.jsonl").read_text().splitlines()[0])["problem"]
        + " 求"
    )
    (ids,) = tokenizer([TEMPLATES["dapo"].replace("{problem}", problem)])["input_ids"]
    assert len(ids) == len(TEMPLATES["dapo"].replace("{problem}", problem).encode())
    assert tokenizer.decode(ids).endswith(
        f'{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    )


def test_the_random_model_here_is_the_one_of_its_script(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    committed = Path(knobs.load(CONFIG).model.path)
    script = committed.parent / "make_random.py"
    subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    ours, made = (
        load_file(committed / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert ours.keys() == made.keys()
    assert all(ours[name].equal(made[name]) for name in ours)
    assert sum(tensor.numel() for tensor in ours.values()) == 29_056
    assert (committed / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
