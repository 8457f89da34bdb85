"""Wrong input on the command line is one line and exit code 2; a dry run starts nothing."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import pytest
import ray
from paths import QUICKSTART
from run_support import command, environment

from dapo_async import config as knobs
from dapo_async.cli.main import COMMANDS, main
from dapo_async.cli.train import closing_lines
from dapo_async.utils import files

TRAIN = ("train", str(QUICKSTART))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must end with exit code 2 before anything starts."""
    assert main(arguments) == 2
    assert not ray.is_initialized()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return lines[0].removeprefix("dapo-async: ")


def test_misspelt_key_is_refused_with_the_nearest_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(capsys, *TRAIN, "learner.lrr=1e-4", f"run_dir={tmp_path / 'run'}")
    assert line.startswith("unknown key learner.lrr; did you mean learner.lr?")
    assert not list(tmp_path.iterdir())


def test_override_of_the_wrong_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *TRAIN, "train.num_steps=many").startswith("train.num_steps: ")
    assert "not of the form key=value" in refused(capsys, *TRAIN, "train.num_steps")


def test_missing_config_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, "train", str(tmp_path / "nowhere.yaml"))
    assert line.startswith(f"config file {tmp_path / 'nowhere.yaml'} does not exist; ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.train={folder}/nowhere.jsonl"],
            "data.train ({folder}/nowhere.jsonl) does not exist; ",
        ),
        (["data.heldout={folder}/empty.jsonl"], "{folder}/empty.jsonl has no usable prompt; "),
        (["data.prompt_key=problem"], "has no column 'problem'; set data.prompt_key to one of "),
        (["data.answer_key=gold"], "has no column 'gold'; set data.answer_key to one of "),
        (["replay.group_size=1"], "replay.group_size (1) must be at least 2: "),
        (
            ["learner.num_minibatches=7", "algorithm.proximal=recompute"],
            "must be a multiple of learner.num_minibatches (7), because a group is in one ",
        ),
        (["rollout.num_slots=4"], "rollout.num_slots (4) must be at least replay.group_size ("),
        (["rollout.temperature=0"], "rollout.temperature (0.0) must be positive: "),
        (["rollout.max_response_tokens=100000"], "must not exceed the model's "),
        (["model.path={folder}/nowhere"], "model.path ({folder}/nowhere) does not exist; "),
        (["model.path={folder}"], "{folder}"),
        (
            ["algorithm.objective=gspo", "algorithm.correction_level=token"],
            "objective gspo does not take correction_level token; ",
        ),
        (["deadlines.work_s=0"], "deadlines.work_s (0.0) must be positive"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: Sequence[str], expected: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    line = refused(
        capsys,
        *TRAIN,
        *(override.format(folder=tmp_path) for override in overrides),
        f"run_dir={tmp_path / 'run'}",
    )
    assert expected.format(folder=tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_run_directory_with_anything_in_it_is_refused_and_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text("of another run")
    assert refused(capsys, *TRAIN, f"run_dir={tmp_path}").startswith(
        f"run_dir {tmp_path} is not empty; "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "of another run"


def test_run_directory_that_cannot_be_used_is_noted_by_a_dry_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main([*TRAIN, f"run_dir={tmp_path / 'file' / 'run'}", "--dry-run"]) == 0
    assert (
        f"could not start on this machine: run_dir {tmp_path}/file/run can't be made: "
        f"{tmp_path}/file is a file; choose another run_dir\n"
    ) in capsys.readouterr().out
    line = refused(capsys, *TRAIN, f"run_dir={tmp_path / ('a' * 300)}")
    assert line.endswith("can't be made: File name too long; choose another run_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_one_line_and_leaves_nothing_of_a_new_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", no_space)
        line = refused(capsys, *TRAIN, f"run_dir={tmp_path / 'runs' / 'run'}")
    assert line == (
        f"run_dir {tmp_path}/runs/run can't be made: No space left on device; "
        "choose another run_dir"
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(COMMANDS["config"], "run", no_space)
    assert main(["config"]) == 1
    assert capsys.readouterr().err == (
        "dapo-async: no space left on device; free some space on that disk\n"
    )


def test_same_arguments_without_the_mistake_are_accepted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The twin of the refusals above: what they complain about is the mistake alone.
    assert (
        main(
            [
                *TRAIN,
                "learner.lr=1e-4",
                "algorithm.objective=gspo",
                "algorithm.correction_level=sequence",
                "--dry-run",
            ]
        )
        == 0
    )
    assert main([*TRAIN, "replay.group_size=2", f"run_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


def test_overrides_may_stand_before_and_after_an_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        main(
            [
                *TRAIN,
                "rollout.num_workers=2",
                "--dry-run",
                "train.num_steps=7",
                f"run_dir={tmp_path / 'run'}",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "would train 7 steps" in printed
    assert "rollout-1" in printed
    assert f"would write {tmp_path / 'run'}" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            (),
            "which command? give one of train, submit, status, dump, scale, eval, report, verify, "
            "trace, rerun, grade, bench, plan, simulate, launch, config; ",
        ),
        (
            ("trian",),
            "unknown command trian; did you mean train? There are train, submit, status, dump, ",
        ),
        (("inspect",), "unknown command inspect; there are train, submit, status, dump, scale, "),
        (("replay", "run"), "the command replay was renamed: write dapo-async rerun"),
        (
            ("train",),
            "which config? give a YAML file, such as configs/quickstart.yaml, or --resume RUN_DIR",
        ),
        ((*TRAIN, "--dryrun", "seed=1"), "unknown option --dryrun; did you mean --dry-run?"),
        ((*TRAIN, "--dry"), "unknown option --dry; did you mean --dry-run?"),
        ((*TRAIN, "--gpus=3"), "unknown option --gpus=3; there are --help, --resume, --from, "),
        ((*TRAIN, "--learner.lr=3"), "learner.lr is a knob, not an option; write learner.lr=3"),
        ((*TRAIN, "--seed", "3"), "seed is a knob, not an option; write seed=..."),
        ((*TRAIN, "--learner.lrr=3"), "a knob is written without dashes, as in learner.lr=1e-4"),
        (("train", "seed=3"), "seed=3 is an override, and the config file is missing; give a YAML"),
        ((*TRAIN, "--resume", "run"), "--resume uses the config of the run; leave out "),
        (("config", "--explain", "nope"), "config file nope does not exist; give a YAML file"),
        (("config", "--explain", "configs"), "config file configs "),
        (("config", "--explain", "--all"), "unknown option --all; there are --help, --explain"),
        (("rerun", "run", "seed=3"), "dapo-async rerun does not take seed=3; leave it out"),
        (("eval", "--k", "3"), "the config file is missing; give a YAML file"),
        (
            ("report", "nope"),
            "nope is neither a run directory nor the result of dapo-async eval: no",
        ),
        (
            ("report", str(QUICKSTART)),
            "nor the result of dapo-async eval: it is not JSON; give one",
        ),
        ((*TRAIN, "--dry-run", "seed"), "override 'seed' is not of the form key=value"),
        ((*TRAIN, "run_dir=/proc/x"), "run_dir /proc/x can't be made: "),
    ],
)
def test_wrong_arguments_are_one_line_too(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], line: str
) -> None:
    assert line in refused(capsys, *arguments)


def test_console_script_ends_with_2_and_one_line(tmp_path: Path) -> None:
    ended = command(*TRAIN, "learner.lrr=1", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("dapo-async: unknown key learner.lrr; ")
    assert not list(tmp_path.iterdir())


def test_module_is_the_console_script() -> None:
    explained = [sys.executable, "-m", "dapo_async", "config", "--explain"]
    ended = subprocess.run(
        explained, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0
    assert ended.stdout == command("config", "--explain").stdout


def test_dry_run_tells_every_learner_rank_and_a_size_that_does_not_split_ends_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TRAIN, "learner.data_parallel=2", "learner.tensor_parallel=2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [f"learner-{rank}  " in printed for rank in range(5)] == [True] * 4 + [False]
    assert "groups of 16 per step, dp 2 x tp 2" in printed
    assert "learner.tensor_parallel (3) must divide the model's " in refused(
        capsys, *TRAIN, "learner.tensor_parallel=3", "--dry-run"
    )


def test_dry_run_tells_every_actor_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*TRAIN, "rollout.num_workers=3", f"run_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    actors = [
        words[0] for words in lines if words[1:2] and words[1].isdigit() and words[2] == "CPU"
    ]
    assert actors == ["replay", "learner", "rollout-0", "rollout-1", "rollout-2", "evaluator"]
    assert f"would write {tmp_path / 'run'}" in printed
    assert "credits allow" not in printed
    assert main([*TRAIN, "rollout.num_slots=2000", "--dry-run"]) == 0
    assert "\ncredits allow 1536 sequences in flight, the " in capsys.readouterr().out
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


def test_printed_config_loads_back_equal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    overrides = [
        "learner.lr=3e-5",
        "algorithm.dual_clip=3.0",
        "reward.overlong_cache_tokens=null",
        "seed=7",
    ]
    assert main(["config", str(QUICKSTART), *overrides]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert knobs.load(tmp_path / "printed.yaml") == knobs.load(QUICKSTART, overrides)
    assert knobs.load(tmp_path / "printed.yaml") != knobs.load(QUICKSTART)


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in tree.items()
        for name in (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
        )
    ]


def test_explain_names_every_knob_of_a_printed_config(capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    assert main(["config", str(QUICKSTART)]) == 0
    printed: Any = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    names = leaves(printed)
    assert main(["config", "--explain"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " = " in line]
    assert [line.split(" = ")[0].strip() for line in lines] == names
    assert len(names) > 60


def test_explain_of_a_config_marks_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(QUICKSTART), "--explain", "seed=7"]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("* ")]
    assert "* seed = 7  (integer, at least 0; default 0)" in marked
    assert any(line.startswith("* learner.lr = 0.0003 ") for line in marked)


def test_closing_lines_name_only_files_that_were_written(tmp_path: Path) -> None:
    summary = {
        "status": "failed", "reason": "no batch", "steps": 0, "tokens": 0, "final_accuracy": None,
        "groups": {"admitted": 3, "trained": 0, "rejected": {"all_wrong": 3}},
        "staleness": {"mean": 0.0, "max": 0}, "idle": {"learner": 1.0, "rollout": 0.0},
        "slot_advice": None, "split": None, "bottleneck": "the learner limits the speed",
        "checkpoint": str(tmp_path / "checkpoints" / "step_000000"),
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = list(closing_lines(tmp_path))
    assert (lines[0], lines[-1]) == ("", "failed: no batch")
    assert lines[1] == "0 steps, 0 tokens; groups: admitted 3, rejected all_wrong 3"
    assert f"summary    {tmp_path / 'summary.json'}" in lines
    assert not [line for line in lines if line.startswith(("metrics", "timeline", "MLflow"))]
    assert lines[-2] == f"continue   dapo-async train --resume {tmp_path}"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert f"metrics    {tmp_path / 'metrics.jsonl'}" in closing_lines(tmp_path)
    advised = summary | {"slot_advice": "credits allow 64 sequences"}
    (tmp_path / "summary.json").write_text(json.dumps(advised))
    assert list(closing_lines(tmp_path))[3:5] == [
        "the learner limits the speed",
        "credits allow 64 sequences",
    ]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name:<8} {command.HELP}\n" in printed for name, command in COMMANDS.items())


def test_version_names_the_installed_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(
        r"dapo-async \d\S*, Python 3\.\S+, torch \S+, ray \S+\n", capsys.readouterr().out
    )
