"""`dapo-async eval`: siblings are judged during generation; an interrupted evaluation continues."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocked_imports import run_without
from native_engine_world import tiny_decoder
from paths import QUICKSTART
from prompts import prompt
from run_support import environment

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.data import load_tokenizer
from dapo_async.evaluate.command import Options, evaluation_totals, prepare_evaluation
from dapo_async.evaluate.record import Record, digest
from dapo_async.evaluate.sampled import ProblemResult, answer_all, judged
from dapo_async.reward import Verdict
from dapo_async.rollout import GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.types import Completion, FinishReason, Prompt
from dapo_async.utils.state_clock import StateClock

SAMPLING = SamplingParams(max_tokens=6, temperature=1.0, stop_token_ids=(9,), seed=5, top_p=0.8)
SETTINGS = {"checkpoint": "/a", "weights_sha256": "1", "k": 2}
BASE = ("eval", str(QUICKSTART))


def completion(length: int, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(
        np.arange(length, dtype=np.int32),
        np.zeros(length, np.float32),
        np.zeros(length, np.int32),
        0,
        finish,
    )


def problem(row: int, *, correct: int = 1) -> ProblemResult:
    answers = ["7" if number < correct else "8" for number in range(2)]
    return ProblemResult(
        row,
        "7",
        2,
        correct,
        correct / 2,
        1.0,
        [float(answer == "7") for answer in answers],
        [*answers],
        [3, 4],
        [False, True],
    )


class FakeEngine:
    """Answers at once, but not the prompts in `never`; records how many prompts it had at once."""

    num_slots = 2

    def __init__(self, never: Sequence[int] = ()) -> None:
        self.requests: list[GroupRequest] = []
        self.never, self.here, self.most = never, 0, 0

    async def generate(self, request: GroupRequest) -> tuple[Completion, ...]:
        self.requests.append(request)
        self.here += 1
        self.most = max(self.most, self.here)
        await asyncio.sleep(60 if -1 - request.group_id in self.never else 0.001)
        self.here -= 1
        return tuple(completion(3) for _ in range(request.num_siblings))


def answered(
    engines: Sequence[Any], prompts: Sequence[Prompt], judge: Any, *, siblings: int = 2
) -> dict[int, ProblemResult]:
    done: dict[int, ProblemResult] = {}

    async def run() -> None:
        await answer_all(
            engines,
            prompts,
            num_siblings=siblings,
            sampling=SAMPLING,
            judge=judge,
            finished=lambda each: done.update({each.row: each}),
        )

    asyncio.run(run())
    return done


def test_verdicts_of_the_siblings_come_to_literal_numbers() -> None:
    verdicts = [
        Verdict(True, "7", "correct"),
        Verdict(0.5, "6", "wrong"),
        Verdict(False, None, "no_answer"),
        Verdict(0.5, "6", "wrong"),
    ]
    completions = [completion(1), completion(2), completion(3, FinishReason.LENGTH), completion(4)]
    assert judged(prompt(4), completions, verdicts) == ProblemResult(
        row=4,
        gold="4",
        num_judged=4,
        num_correct=1,
        accuracy=0.5,
        majority_accuracy=0.5,
        accuracies=[1.0, 0.5, 0.0, 0.5],
        extracted=["7", "6", None, "6"],
        lengths=[1, 2, 3, 4],
        truncated=[False, False, True, False],
    )


def test_response_whose_verdict_failed_is_neither_right_nor_wrong() -> None:
    failed, right, wrong = (
        Verdict(False, "9", "failed"),
        Verdict(True, "7", "correct"),
        Verdict(False, "9", "wrong"),
    )
    some = judged(prompt(4), [completion(1)] * 4, [failed, right, failed, wrong])
    assert (some.num_judged, some.num_correct, some.accuracy, some.accuracies) == (
        2,
        1,
        0.5,
        [None, 1.0, None, 0.0],
    )
    assert some.majority_accuracy == 1.0  # 7 and 9 once each: the first wins
    none = judged(prompt(5), [completion(1)] * 4, [failed] * 4)
    totals = evaluation_totals([some, none], num_siblings=4, seed=0)
    assert (totals["problems"], totals["responses"], totals["unjudged"]) == (2, 8, 6)
    assert [totals[name]["mean"] for name in ("avg@4", "pass@1", "pass@2", "pass@4", "maj@4")] == [
        0.5,
        0.5,
        1.0,
        1.0,
        1.0,
    ]
    with pytest.raises(RuntimeError, match="the verifier failed on every response"):
        evaluation_totals([none], num_siblings=4, seed=0)


def test_every_prompt_is_asked_once_and_an_engine_is_never_flooded() -> None:
    engines = [FakeEngine(), FakeEngine()]
    done = answered(
        engines,
        [prompt(row) for row in range(3, 23)],
        lambda asked, each: Verdict(asked.answer == "4", asked.answer, ""),
    )
    assert sorted(done) == list(range(3, 23))
    assert [row for row, each in done.items() if each.num_correct] == [4]
    requests = [request for engine in engines for request in engine.requests]
    assert sorted(request.group_id for request in requests) == sorted(
        -1 - row for row in range(3, 23)
    )
    assert {request.sampling.top_p for request in requests} == {0.8}
    assert [engine.most for engine in engines] == [
        3,
        3,
    ]  # slots and one more: full as long as any prompt waits


def test_slow_verdicts_hold_up_neither_the_event_loop_nor_the_engine() -> None:
    threads, engine = set(), FakeEngine()
    asked_s: list[float] = []

    def slow(asked: Prompt, each: Completion) -> Verdict:
        threads.add(threading.current_thread())
        asked_s.append(time.monotonic())
        time.sleep(0.05)
        return Verdict(True, asked.answer, "correct")

    began_s = time.monotonic()
    answered([engine], [prompt(row) for row in range(8)], slow, siblings=1)
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert time.monotonic() - began_s >= 8 * 0.05  # one at a time
    assert len(engine.requests) == 8
    assert engine.here == 0


@pytest.mark.parametrize("where", ["engine", "verdict"])
def test_first_failure_ends_everything_and_is_raised_as_it_was(where: str) -> None:
    class Broken(FakeEngine):
        async def generate(self, request: GroupRequest) -> tuple[Completion, ...]:
            if where == "engine":
                raise RuntimeError("logits are not finite")
            return await super().generate(request)

    def refuse(asked: Prompt, each: Completion) -> Verdict:
        raise ValueError("the gold answer is empty")

    began_s = time.monotonic()
    with pytest.raises(
        RuntimeError if where == "engine" else ValueError,
        match=r"logits are not finite|the gold answer is empty",
    ):
        answered(
            [Broken(), FakeEngine(never=range(10))], [prompt(row) for row in range(10)], refuse
        )
    assert time.monotonic() - began_s < 60  # the other engine never answers


def test_responses_depend_neither_on_the_other_prompts_nor_on_the_slots() -> None:
    def responses(slots: int, rows: Sequence[int]) -> dict[int, list[str | None]]:
        async def run() -> dict[int, ProblemResult]:
            engine = ThreadedEngine(
                TorchEngine(tiny_decoder(), num_slots=slots, max_len=16), StateClock("test")
            )
            done: dict[int, ProblemResult] = {}
            await answer_all(
                [engine],
                [prompt(row, [row + 10, 5]) for row in rows],
                num_siblings=4,
                sampling=SAMPLING,
                judge=lambda asked, each: Verdict(True, str(each.token_ids.tolist()), ""),
                finished=lambda each: done.update({each.row: each}),
            )
            await engine.close()
            return done

        return {row: each.extracted for row, each in asyncio.run(run()).items()}

    whole = responses(3, range(8))
    assert len({text for row in whole.values() for text in row}) > 8  # they differ at all
    assert responses(32, [6, 2, 1]) == {row: whole[row] for row in (1, 2, 6)}


def test_record_goes_on_where_it_stopped_and_drops_an_unfinished_line(
    tmp_path: Path,
) -> None:
    out = tmp_path / "folder" / "out.json"
    with Record(out, SETTINGS) as record:
        record.add(problem(3))
        record.add(problem(5, correct=2))
    with record.partial.open("a") as file:
        file.write('{"row": 7, "gol')
    with Record(out, {**SETTINGS, "checkpoint": "/moved"}) as record:
        assert record.done == {3: problem(3), 5: problem(5, correct=2)}
        assert not record.finished
        record.add(problem(8))
    with Record(out, SETTINGS) as record:
        assert sorted(record.done) == [3, 5, 8]
        record.finish(
            {"settings": SETTINGS, "problems": [each.to_json() for each in record.done.values()]}
        )
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    with Record(out, SETTINGS) as record:
        assert record.finished
        assert sorted(record.done) == [3, 5, 8]


def test_record_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with Record(out, SETTINGS) as record:
        record.add(problem(3))
    with pytest.raises(
        ValueError,
        match=r"out.json.partial.jsonl holds an evaluation with other settings: "
        r"k was 2, is 3; use the same settings or",
    ):
        Record(out, {**SETTINGS, "k": 3})
    with pytest.raises(ValueError, match=r"other settings: the checkpoint differs; "):
        Record(out, {**SETTINGS, "weights_sha256": "2"})
    with Record(out, SETTINGS) as record:
        record.finish({"settings": SETTINGS, "problems": []})
    with pytest.raises(
        ValueError, match=r"out.json holds an evaluation with other settings: k was 2, is 3; "
    ):
        Record(out, {**SETTINGS, "k": 3})


def test_record_refuses_files_of_something_else_and_a_second_writer(tmp_path: Path) -> None:
    (tmp_path / "else.json").write_text('{"problems": []}')
    with pytest.raises(
        ValueError,
        match=r"else.json exists and is no result of dapo-async eval: it has no settings; give",
    ):
        Record(tmp_path / "else.json", SETTINGS)
    (tmp_path / "half.json.partial.jsonl").write_text("[]\n")
    with pytest.raises(
        ValueError,
        match=r"half.json.partial.jsonl is no partial result of dapo-async eval: it is JSON",
    ):
        Record(tmp_path / "half.json", SETTINGS)
    with (
        Record(tmp_path / "out.json", SETTINGS),
        pytest.raises(ValueError, match=r"another process writes .*out.json.partial.jsonl; "),
    ):
        Record(tmp_path / "out.json", SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--json .*/file/out.json can't be written: "):
        Record(tmp_path / "file" / "out.json", SETTINGS)


def test_record_keeps_what_no_utf_8_file_can(tmp_path: Path) -> None:
    odd = replace(problem(3), extracted=["\ud800", "\u2028∑"])
    with Record(tmp_path / "out.json", SETTINGS) as record:
        record.add(odd)
    with Record(tmp_path / "out.json", SETTINGS) as record:
        assert record.done == {3: odd}
        record.finish({"settings": SETTINGS, "problems": [odd.to_json()]})
    with Record(tmp_path / "out.json", SETTINGS) as record:
        assert record.done == {3: odd}


def test_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    assert digest([tmp_path / "a"]) == digest([tmp_path / "a"]) != digest([tmp_path / "b"])


def test_checkpoint_of_the_command_line_is_measured_without_ray(tmp_path: Path) -> None:
    out = tmp_path / "base.json"
    arguments = [*BASE, "--k", "4", "--max-problems", "12", "--json", str(out), "seed=3"]
    script = f"from dapo_async.cli.main import main\nraise SystemExit(main({arguments!r}))"
    ended = run_without(["ray", "mlflow", "sglang"], script)
    assert (ended.returncode, ended.stderr) == (0, "")
    result = json.loads(out.read_text())
    settings, totals, problems = result["settings"], result["totals"], result["problems"]
    assert (
        settings["k"],
        settings["temperature"],
        settings["top_p"],
        settings["seed"],
        settings["problems"],
    ) == (4, 1.0, 0.7, 3, 12)
    assert [each["row"] for each in problems] == list(range(12))
    assert (
        totals["avg@4"]["mean"]
        == totals["pass@1"]["mean"]
        == pytest.approx(sum(each["num_correct"] for each in problems) / 48)
    )
    assert totals["pass@4"]["mean"] == pytest.approx(
        sum(each["num_correct"] > 0 for each in problems) / 12
    )
    assert totals["maj@4"]["mean"] == pytest.approx(
        sum(each["majority_accuracy"] for each in problems) / 12
    )
    assert totals["mean_response_tokens"] == pytest.approx(
        sum(sum(each["lengths"]) for each in problems) / 48
    )
    for name in ("avg@4", *(f"pass@{k}" for k in range(1, 5)), "maj@4"):
        assert totals[name]["low"] <= totals[name]["mean"] <= totals[name]["high"]
    assert f"pass@4    {totals['pass@4']['mean']:.3f}" in ended.stdout
    gold = [
        json.loads(line)["answer"] for line in Path(settings["data"]).read_text().splitlines()[:12]
    ]
    assert [each["gold"] for each in problems] == gold
    for each in problems:
        assert each["num_correct"] == sum(answer == each["gold"] for answer in each["extracted"])


def test_interrupted_evaluation_keeps_what_is_done_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = [
        sys.executable,
        "-m",
        "dapo_async",
        *BASE,
        "--k",
        "32",
        "--max-problems",
        "200",
        "--json",
        str(out),
        "rollout.num_slots=16",
    ]
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    partial, deadline_s = tmp_path / "out.json.partial.jsonl", time.monotonic() + 180
    while not partial.exists() or partial.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    kept = {row["row"]: row for row in map(json.loads, partial.read_text().splitlines()[1:])}
    assert 3 <= len(kept) < 200
    assert (
        f"SIGINT: {len(kept)} finished problems are kept in {partial}; "
        "the same command continues from there" in said
    )
    capsys.readouterr()
    assert (
        main([*arguments[3:-1], "rollout.num_slots=512"]) == 0
    )  # how many at a time is no setting of the result
    assert f"{len(kept)} problems are done already, in {partial}" in capsys.readouterr().out
    rows = {row["row"]: row for row in json.loads(out.read_text())["problems"]}
    assert sorted(rows) == list(range(200))
    assert {row: rows[row] for row in kept} == kept


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*BASE, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("dapo-async: ")


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, "--k", "0") == "--k (0) must be at least 1; give a larger number"
    assert refused(capsys, "--seed=-1").startswith("--seed (-1) must be at least 0; ")
    assert refused(capsys, "--top-p", "0").startswith("top_p (0.0) must lie in (0, 1]; ")
    assert refused(capsys, "--temperature=-1").startswith(
        "temperature (-1.0) must be finite and not negative; "
    )
    assert refused(capsys, "--checkpoint", str(tmp_path)).startswith(
        f"model folder {tmp_path} has no config.json; "
    )
    assert refused(capsys, "--data", str(tmp_path / "none.jsonl")).startswith(
        f"data.heldout ({tmp_path}/none.jsonl) does not exist; "
    )
    assert refused(capsys, "model.device=cuda").startswith("model.device (cuda) asks for a GPU, ")
    assert "the model's" in refused(capsys, "rollout.max_response_tokens=100000")


def test_all_stop_tokens_count_and_outside_servers_read_the_same_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = Path(knobs.load(QUICKSTART).model.path)
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [12, 3]}')
    asked = Options(
        checkpoint=folder,
        data=None,
        k=1,
        temperature=0.0,
        top_p=1.0,
        seed=None,
        max_problems=1,
        out=None,
    )
    assert prepare_evaluation(str(QUICKSTART), [], asked).sampling.stop_token_ids == (12, 3)
    shutil.copy(folder / "model.safetensors", folder / "value_head.safetensors")
    servers = ["rollout.engine=sglang", "rollout.servers=http://127.0.0.1:1"]
    line = refused(capsys, "--checkpoint", str(folder), *servers)
    assert "would misread" in line
    assert "because they also read value_head.safetensors; move" in line
    assert prepare_evaluation(str(QUICKSTART), [], asked).sampling.stop_token_ids == (12, 3)


def test_data_of_the_command_line_is_asked_and_a_checkpoint_brings_its_tokenizer(
    tmp_path: Path,
) -> None:
    odd = tmp_path / 'odd "name".jsonl'
    odd.write_text('{"prompt": "12", "answer": 3}\n{"prompt": "", "answer": 3}\n')
    base = Path(knobs.load(QUICKSTART).model.path)
    asked = Options(
        checkpoint=base,
        data=str(odd),
        k=2,
        temperature=1.0,
        top_p=1.0,
        seed=None,
        max_problems=None,
        out=None,
    )
    (tmp_path / "config.yaml").write_text(
        "model: {path: nowhere}\n"
        f"data: {{train: {QUICKSTART}, heldout: nowhere, template: '{{problem}}='}}\n"
        "rollout: {max_response_tokens: 8}\n"
    )
    job = prepare_evaluation(str(tmp_path / "config.yaml"), [], asked)
    assert [each.text for each in job.prompts] == ["12="]
    assert job.checkpoint == base.resolve()
    assert job.config.model.path == str(base.resolve())
    other = prepare_evaluation(str(tmp_path / "config.yaml"), ["data.template='{problem}'"], asked)
    assert other.settings["problems_sha256"] != job.settings["problems_sha256"]
    assert {name for name in job.settings if job.settings[name] != other.settings[name]} == {
        "problems_sha256"
    }
    thinking = prepare_evaluation(
        str(tmp_path / "config.yaml"), ["data.template='{problem}<think>'"], asked
    )
    ids = load_tokenizer(base)(["####3"], add_special_tokens=False)["input_ids"][0]
    said = replace(completion(1), token_ids=np.array(ids, np.int32))
    assert job.judge(job.prompts[0], said).reason == "correct"
    assert thinking.judge(thinking.prompts[0], said).reason == "no_answer"
