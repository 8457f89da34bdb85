"""Whole runs with a torn journal, damaged checkpoints, a full disk, a verifier that raises.

A verifier that hangs: tests/unit/reward/test_own_verifier.py. `.ci/full` runs them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from paths import QUICKSTART
from ray_cluster import wait_until
from run_support import (
    TINY,
    check_checkpoint,
    check_conservation,
    check_token_flow,
    command,
    read_rows,
    running,
)
from small_disk import fill_up, kept_full, make_room, small_disk

from dapo_async.utils.checkpoint_dir import CheckpointFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# It fails on every response to some prompts, and on one response in twenty.
JUDGE = """
import zlib
from dapo_async.reward import Verdict

def judge(response, gold, prompt):
    if gold == "0":
        raise KeyError(f"no entry for {gold}")
    if zlib.crc32((prompt + response).encode()) % 20 == 0:
        raise ValueError(response)
    answer = response.strip()
    return Verdict(answer == gold, answer, "correct" if answer == gold else "wrong")
"""


def test_a_replay_actor_drops_the_torn_end_of_its_journal(tmp_path: Path) -> None:
    with running(tmp_path / "run", *TINY, "train.num_steps=5000", "train.record=true") as live:
        live.wait_for(r"^step +5/")
        replay = live.pid("replay")
        os.kill(replay, signal.SIGSTOP)  # so that nothing is written behind the torn record
        segment = max((live.root / "journal").glob("*.log"))
        whole = segment.read_bytes()
        with segment.open("ab") as file:
            file.write(whole[:40])  # the header of a record and a part of its text
        os.kill(replay, signal.SIGKILL)
        live.wait_for("^replay goes on after", timeout_s=120.0)
        step = re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)[-1]
        live.wait_for(rf"^step +{int(step) + 4}/")
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=60.0)
    assert run.exit_code == 130, run.output
    check_conservation(run.summary["groups"])
    assert run.summary["groups"]["failed"] == 0
    assert [row["step"] for row in run.metrics] == [*range(len(run.metrics))]


def test_a_resume_steps_over_a_torn_and_a_rotten_checkpoint(tmp_path: Path) -> None:
    often = ("train.num_steps=5000", "train.checkpoint_every_steps=2", "train.keep_checkpoints=4")
    with running(tmp_path / "run", *TINY, *often) as live:
        saved = CheckpointFolder(live.root / "checkpoints")
        wait_until(lambda: len(saved.versions()) >= 4, timeout_s=180.0, what="four checkpoints")
        os.kill(live.driver, signal.SIGKILL)
        live.seconds_until_nothing_is_left(timeout_s=60.0)
    *_, whole, torn, rotten = (saved.path(version) for version in sorted(saved.versions()))
    for folder in (torn, rotten):
        (file,) = folder.glob("*.safetensors")
        data = bytearray(file.read_bytes())
        middle = len(data) // 2
        if folder == torn:
            del data[middle:]
        else:
            data[middle : middle + 64] = bytes(255 - byte for byte in data[middle : middle + 64])
        file.write_bytes(data)
    steps = int(rotten.name.removeprefix("step_")) + 4
    with running(live.root, f"train.num_steps={steps}", config=None) as resumed:
        run = resumed.finish(timeout_s=240.0)
    assert run.exit_code == 0, run.output
    for folder in (torn, rotten):
        assert f"{folder.name} is damaged, so it is not used: " in run.output
    assert f" from {whole}\n" in run.output
    check_conservation(run.summary["groups"])
    assert [row["step"] for row in run.metrics] == [*range(steps)]
    check_checkpoint(run.checkpoint)


def test_a_restarted_learner_steps_over_a_rotten_checkpoint(tmp_path: Path) -> None:
    often = ("train.num_steps=5000", "train.checkpoint_every_steps=8", "train.record=true")
    with running(tmp_path / "run", *TINY, *often) as live:
        saved = CheckpointFolder(live.root / "checkpoints")
        wait_until(lambda: len(saved.versions()) >= 2, timeout_s=180.0, what="two checkpoints")
        learner = live.pid("learner")
        os.kill(learner, signal.SIGSTOP)
        time.sleep(1.0)  # a checkpoint that was being written is there
        *_, older, newest = saved.versions()
        (file,) = (saved.path(newest) / "state" / "learner").glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        os.kill(learner, signal.SIGKILL)
        live.wait_for(
            rf"^{re.escape(str(saved.path(newest)))} is damaged, so the learner begins at version "
            rf"{older} instead: .*{re.escape(file.name)} has other content than was written"
        )
        live.wait_for(rf"^the learner trains again .* since version {older} again")
        step = re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)[-1]
        live.wait_for(rf"^step +{int(step) + 10}/")
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=60.0)
    assert run.exit_code == 130, run.output
    assert f"step_{older:06d}: 2 files, " in run.output, "what was checked, and how long it took"
    check_conservation(run.summary["groups"])
    assert run.summary["handshake"].get("mismatch", 0) == 0
    assert [row["step"] for row in run.metrics] == [*range(len(run.metrics))]
    check_checkpoint(run.checkpoint)


def test_a_run_outlasts_a_full_disk_and_loses_no_row(tmp_path: Path) -> None:
    often = ("train.num_steps=60", "train.checkpoint_every_steps=6")
    with small_disk(tmp_path / "disk", kib=10 * 1024) as disk:
        with running(disk / "run", *TINY, *often) as live:
            live.wait_for(r"^step +14/")
            live.wait_for_checkpoint()
            fill_up(disk)
            live.wait_for(r"^the checkpoint of version \d+ can't be written: no space left on")
            fill_up(disk)  # it has removed an older one
            live.wait_for(
                r"^metrics\.jsonl can't be written: no space left on device; the run goes"
            )
            make_room(disk)
            run = live.finish(timeout_s=240.0)
        assert run.exit_code == 0, run.output
        assert "Traceback" not in run.output, run.output
        summary = run.summary
        assert (summary["status"], summary["steps"]) == ("done", 60)
        assert summary["checkpoints"]["refused"] >= 1
        assert summary["caught"]["metrics.jsonl"] >= 1
        check_conservation(summary["groups"])
        assert [row["step"] for row in run.metrics] == [*range(60)]
        verified = command("verify", str(run.root))
        assert verified.returncode == 0, verified.stdout
        assert run.checkpoint.name == "step_000060"


def test_a_disk_that_stays_full_ends_the_run_with_one_line_and_its_summary_printed(
    tmp_path: Path,
) -> None:
    often = ("train.num_steps=500", "train.checkpoint_every_steps=2")
    # The run's output goes to a file beside the small disk.
    with small_disk(tmp_path / "run", kib=10 * 1024) as disk:
        with running(disk, *TINY, *often) as live:
            live.wait_for(r"^step +6/")
            live.wait_for_checkpoint()
            with kept_full(disk):
                run = live.finish(timeout_s=240.0)
        assert run.exit_code == 1, run.output
        assert "Traceback" not in run.output, run.output
        assert re.search(r"[5-9] times in a row; free some space", run.output), run.output
        assert "summary.json: {" in run.output
        make_room(disk)
        verified = command("verify", str(run.root))
        assert verified.returncode == 0, verified.stdout


def test_a_verifier_that_raises_on_some_prompts_costs_these_prompts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_judge.py").write_text(JUDGE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    # Few prompts, so that each one comes often.
    lines = (QUICKSTART.parent / "data/quickstart/train.jsonl").read_text().splitlines()[:16]
    (tmp_path / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    hopeless = [row for row, line in enumerate(lines) if json.loads(line)["answer"] == "0"]
    assert 0 < len(hopeless) < 8
    words = ("reward.verifier=my_judge:judge", f"data.train={tmp_path / 'train.jsonl'}")
    with running(tmp_path / "run", *TINY, *words, "train.num_steps=60") as live:
        live.wait_for("is left out from now on: the verifier failed on 3 of its groups")
        replay = live.pid("replay")
        os.kill(replay, signal.SIGKILL)  # what it has counted is in its journal
        run = live.finish(timeout_s=300.0)
    assert run.exit_code == 0, run.output
    summary = run.summary
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    quarantined = read_rows(run.root / "quarantine.jsonl")
    assert sorted(row["row"] for row in quarantined) == hopeless
    assert summary["quarantined"] == len(hopeless)
    assert summary["failures"]["verifier failed"] >= 3 * len(hopeless)
    assert summary["failures"]["prompt in quarantine"] > 0
    assert sum(row.get("verdicts.failed", 0) for row in run.metrics) > 10
    assert summary["groups"]["trained"] == 4 * 60
