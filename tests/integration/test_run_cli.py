"""The command line as its users meet it: one clear line for what they can fix, exit codes, and runs that the filters end."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from paths import QUICKSTART
from run_support import (
    check_conservation,
    command,
    environment,
    finished,
    read_rows,
    write_rows,
)

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.data import PromptStream, load_tokenizer

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
            "must be a multiple of learner.num_minibatches (7); ",
        ),
        (["rollout.num_slots=4"], "rollout.num_slots (4) must be at least replay.group_size ("),
        (["rollout.temperature=0"], "rollout.temperature (0.0) must be positive: "),
        (["rollout.max_response_tokens=100000"], "must not pass the model's "),
        (["model.path={folder}/nowhere"], "model.path ({folder}/nowhere) does not exist; "),
        (["model.path={folder}"], "{folder}"),
        (
            ["algorithm.objective=gspo", "algorithm.correction_level=token"],
            "objective gspo does not take correction_level token; ",
        ),
        (["deadlines.work_s=0"], "deadlines.work_s (0.0) must be positive; "),
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
            "the following arguments are required: {train,eval,report,replay,grade,config}; dapo-async --help tells more",
        ),
        (("trian",), "invalid choice: 'trian' (choose from "),
        (
            ("train",),
            "which config? give a YAML file, such as configs/quickstart.yaml, or --resume RUN_DIR",
        ),
        ((*TRAIN, "--dry-rnu", "seed=1"), "unknown option --dry-rnu; dapo-async --help tells more"),
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
    names = leaves(OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out)))
    assert main(["config", "--explain"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " = " in line]
    assert [line.split(" = ")[0].strip() for line in lines] == names
    assert len(names) > 60


# Runs that the filters end. Their data is made from the base model's own answers: so they hold for any base.


def prompts_of(config: knobs.Config) -> list[str]:
    return [row["prompt"] for row in read_rows(Path(config.data.heldout))]


class Base:
    """The quickstart's base model by transformers: a reference that shares nothing with this project's decoder."""

    def __init__(self, config: knobs.Config) -> None:
        from transformers import AutoModelForCausalLM

        folder = Path(config.model.path)
        self._tokenizer, self._template = load_tokenizer(folder), config.data.template
        self._model = AutoModelForCausalLM.from_pretrained(folder)
        self._eos = self._model.config.eos_token_id

    @torch.no_grad()
    def logits(self, problem: str, response: Sequence[int] = ()) -> torch.Tensor:
        """Of the next token: [vocabulary]."""
        ids = self._tokenizer([self._template.replace("{problem}", problem)])["input_ids"][0]
        return self._model(torch.tensor([[*ids, *response]])).logits[0, -1].double()

    def greedy(self, problem: str, *, num_tokens: int) -> tuple[str, float]:
        """The greedy response, and by how much each of its tokens leads at least (logits)."""
        response: list[int] = []
        margin = math.inf
        while len(response) < num_tokens and (not response or response[-1] != self._eos):
            best, second = self.logits(problem, response).topk(2)[0].tolist()
            margin = min(margin, best - second)
            response.append(int(self.logits(problem, response).argmax()))
        return self._tokenizer.decode(response, skip_special_tokens=True), margin

    def coin(self, problem: str) -> tuple[str, float]:
        """The likeliest first token as text, and the temperature at which it is drawn every other time."""
        logits = self.logits(problem)
        low, high = 1e-3, 1e3
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (
                (middle, high) if float((logits / middle).softmax(0).max()) > 0.5 else (low, middle)
            )
        return self._tokenizer.decode([int(logits.argmax())], skip_special_tokens=True), middle


@pytest.mark.ray
def test_run_that_has_nothing_left_to_learn_ends_solved(tmp_path: Path) -> None:
    # The base model's own clearest answers are the gold ones, and rollouts are all but greedy: right from the start, every time.
    config = knobs.load(QUICKSTART)
    base = Base(config)
    greedy = {problem: base.greedy(problem, num_tokens=4) for problem in prompts_of(config)[:60]}
    clearest = sorted(
        (problem for problem in greedy if greedy[problem][0].strip()),
        key=lambda problem: -greedy[problem][1],
    )[:12]
    rows = [{"prompt": problem, "answer": greedy[problem][0]} for problem in clearest]
    data = write_rows(tmp_path / "own_answers.jsonl", rows)
    temperature = (
        min(greedy[problem][1] for problem in clearest) / 30
    )  # the second choice is e^30 times less likely
    clear = (
        f"rollout.temperature={temperature}",
        "rollout.max_response_tokens=4",
        "reward.verifier=exact",
        "reward.overlong_cache_tokens=null",
    )
    small = (
        "replay.groups_per_step=2",
        "replay.group_size=4",
        "replay.max_rejected_in_a_row=12",
        "rollout.num_slots=16",
    )
    run = finished(tmp_path / "run", f"data.train={data}", f"data.heldout={data}", *clear, *small)
    summary = run.summary
    assert (run.exit_code, summary["status"]) == (0, "solved"), run.output
    assert summary["reason"] == "task solved: 12 groups in a row were all correct"
    assert summary["initial_accuracy"] == summary["final_accuracy"] == 1.0
    assert summary["groups"]["rejected"]["all_correct"] == summary["groups"]["admitted"] >= 12
    check_conservation(summary["groups"])
    assert (summary["steps"], summary["weight_versions"]) == (0, 1)


@pytest.mark.ray
def test_run_whose_groups_are_all_wrong_fails_with_the_counts_by_reason(tmp_path: Path) -> None:
    # Forty problems whose answer can't be given, and first of all one whose siblings differ: accepted, but no batch.
    config = knobs.load(QUICKSTART)
    problems = prompts_of(config)[:41]
    answer, temperature = Base(config).coin(problems[0])
    rows = [{"prompt": problem, "answer": "impossible"} for problem in problems[1:]]
    rows.insert(PromptStream(range(41), seed=0)[0], {"prompt": problems[0], "answer": answer})
    data = write_rows(tmp_path / "impossible.jsonl", rows)
    one_token = (
        f"rollout.temperature={temperature}",
        "rollout.max_response_tokens=1",
        "reward.verifier=exact",
        "reward.overlong_cache_tokens=null",
    )
    small = (
        "seed=0",
        "replay.groups_per_step=2",
        "replay.group_size=16",
        "replay.max_rejected_in_a_row=30",
        "rollout.num_slots=32",
        "evaluation.num_prompts=8",
    )
    run = finished(tmp_path / "run", f"data.train={data}", *one_token, *small)
    summary = run.summary
    assert (run.exit_code, summary["status"]) == (1, "failed"), run.output
    assert summary["reason"].startswith("the filters rejected 30 groups in a row (all_wrong 30); ")
    groups = summary["groups"]
    assert groups["unused"] == 1
    assert groups["rejected"]["all_wrong"] == groups["admitted"] - 1 >= 30
    check_conservation(groups)
    with pytest.raises(AssertionError, match="were admitted"):
        check_conservation({**groups, "unused": 0})
    assert Path(summary["checkpoint"]).is_dir()
