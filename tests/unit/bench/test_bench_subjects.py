"""The subjects of `dapo-async bench` on a tiny model, and its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import QUICKSTART

from dapo_async.bench.learner import made_up_groups, recorded_groups
from dapo_async.bench.made_up import (
    fixed_lengths,
    lengths_of_run,
    lognormal_lengths,
    made_up_group,
)
from dapo_async.bench.rollout import RequestMaker
from dapo_async.cli.main import main
from dapo_async.config import load
from dapo_async.model import ModelConfig
from dapo_async.replay.group_io import write_groups

QUICK = ("--repeats", "2", "--warm-up", "0")
ROLLOUT = ("bench", str(QUICKSTART), "rollout", *QUICK, "--running", "1,4", "--contexts", "20")
LEARNER = ("bench", str(QUICKSTART), "learner", *QUICK, "--microbatch-tokens", "256,1024")
SMALL = ("replay.group_size=2", "replay.groups_per_step=4")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", 1), captured
    return captured.err.removeprefix("dapo-async: ").rstrip()


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_rollout_gives_the_table_that_a_planner_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rollout.json"
    assert main([*ROLLOUT, "rollout.num_slots=16", "--json", str(out)]) == 0
    result = read(out)
    assert (result["subject"], result["complete"]) == ("rollout", True)
    assert result["settings"] == {"repeats": 2, "warm_up": 0}
    assert {"torch", "dapo_async"} <= result["versions"].keys()
    assert result["device"].keys() == {"cpu", "cores", "threads"}
    rows = {json.dumps(row["what"]): row["figures"] for row in result["rows"]}
    assert list(rows) == [
        '{"kind": "capacity"}',
        '{"kind": "prefill", "context": 20}',
        '{"kind": "decode", "running": 1, "context": 20}',
        '{"kind": "decode", "running": 4, "context": 20}',
        '{"kind": "generate", "running": 1, "lengths": "fixed"}',
        '{"kind": "generate", "running": 4, "lengths": "fixed"}',
        '{"kind": "generate", "running": 1, "lengths": "lognormal 1"}',
        '{"kind": "generate", "running": 4, "lengths": "lognormal 1"}',
    ]
    assert rows['{"kind": "capacity"}']["kv_capacity_tokens"]["values"] == [16 * 48]
    decode = rows['{"kind": "decode", "running": 4, "context": 20}']
    for step_s, rate in zip(
        decode["decode_step_s"]["values"], decode["tokens_per_s"]["values"], strict=True
    ):
        assert rate == pytest.approx(4 / step_s)
    printed = capsys.readouterr().out
    assert "  8/8  generate running 4 lengths lognormal 1: tokens " in printed
    assert str(tmp_path) not in out.read_text()


def test_learner_measures_each_size_and_compares_with_an_older_result(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, old = tmp_path / "new.json", tmp_path / "old.json"
    assert main([*LEARNER, *SMALL, "--json", str(old)]) == 0
    result = read(old)
    assert [row["what"]["microbatch tokens"] for row in result["rows"]] == [256, 1024]
    assert {"step_s", "tokens_per_s", "mfu"} <= result["rows"][0]["figures"].keys()
    for row in result["rows"]:
        for figure in row["figures"].values():
            figure["values"] = [value * 1000 for value in figure["values"]]
    old.write_text(json.dumps(result))
    capsys.readouterr()
    # A thousandth of tokens/s and MFU is worse, a thousandth of the seconds is better.
    assert main([*LEARNER, *SMALL, "--json", str(out), "--compare", str(old)]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("4 of ")
    assert "the results differ" not in printed
    for row in result["rows"]:
        for name, figure in row["figures"].items():
            scale = 1e-6 if name.endswith(("per_s", "mfu")) else 1.0
            figure["values"] = [value * scale for value in figure["values"]]
    old.write_text(json.dumps(result))
    assert main([*LEARNER, *SMALL, "learner.lr=1e-3", "--compare", str(old)]) == 0
    assert "the results differ in config: the ratios compare more" in capsys.readouterr().out


def test_learner_trains_a_recorded_batch(tmp_path: Path) -> None:
    groups = [
        made_up_group(number, np.array([3, 5]), prompt_tokens=4, vocabulary=10)
        for number in range(2)
    ]
    (tmp_path / "run" / "recorded").mkdir(parents=True)
    write_groups(tmp_path / "run" / "recorded" / "step_000003.safetensors", groups)
    out = tmp_path / "out.json"
    words = [*LEARNER[:-1], "256", "--recorded", str(tmp_path / "run"), "--json", str(out)]
    assert main(words) == 0
    (row,) = read(out)["rows"]
    assert row["what"] == {
        "kind": "step",
        "microbatch tokens": 256,
        "groups": 2,
        "lengths": "recorded",
    }
    model = ModelConfig.from_folder(Path(load(QUICKSTART).model.path))
    wrong = [made_up_group(0, np.array([3, 5]), prompt_tokens=4, vocabulary=50_000)]
    write_groups(tmp_path / "run" / "recorded" / "step_000004.safetensors", wrong)
    with pytest.raises(ValueError, match=r"vocabulary has .*; give a run of the same model"):
        recorded_groups(tmp_path / "run", model)


def test_bench_needs_no_data(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{path: {QUICKSTART.parent / 'base' / 'random'}}}\n")
    words = [str(config), "learner", *QUICK, "--microbatch-tokens", "256", "--groups", "1"]
    assert main(["bench", *words, "--response-tokens", "8", "replay.group_size=2"]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("rollouts",), ": invalid choice: 'rollouts'"),
        (("learner", "--running", "4"), "--running is an option of bench rollout; leave it out"),
        (("rollout", "--running", "4,x"), "argument --running: 4,x must be numbers separated"),
        (("rollout", "--running", "0"), "--running (0) must be at least 1"),
        (("rollout", "--running", "999"), "--running (999) must be at most rollout.num_slots ("),
        (("rollout", "--contexts", "48"), "--contexts (48) must be at most 40: the longest "),
        (("rollout", "--repeats", "0"), "--repeats (0) must be at least 1"),
        (("rollout", "--tolerance", "nan"), "--tolerance (nan) must be at least 0"),
        (("rollout", "--sigma", "-1"), "--sigma (-1) must be at least 0"),
        (("rollout", "--response-tokens", "99"), "--response-tokens (99) must be at most 24, "),
        (("rollout", "--prompt-tokens", "48"), "--prompt-tokens (48) leaves no room for a "),
        (("rollout", "--lengths-from", "{folder}"), "has no rollouts/step_*.jsonl; give the "),
        (("learner", "--recorded", "{folder}"), "has no recorded batch; train with "),
        (("learner", "--json", "{folder}"), "is a folder; give a file"),
        (("learner", "--json", "{folder}/a/b.json"), "is in no folder; make {folder}/a first"),
        (("learner", "--compare", "{folder}/none.json"), "can't be read: No such file"),
        (("learner", "model.path={folder}/none"), "model.path ({folder}/none) does not exist"),
        (("learner", "learner.lrr=1"), "unknown key learner.lrr; did you mean learner.lr?"),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_measuring(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [word.format(folder=tmp_path) for word in words]
    found = refused(capsys, "bench", str(QUICKSTART), *given)
    assert line.replace("{folder}", str(tmp_path)) in found
    assert not list(tmp_path.iterdir())


def test_lognormal_lengths_have_their_mean_and_stay_within_their_bounds() -> None:
    lengths = lognormal_lengths(100, sigma=1.0, longest=10_000)
    drawn = lengths.draw(np.random.default_rng(0), 20_000)
    assert drawn.mean() == pytest.approx(100, rel=0.05)
    assert np.log(drawn).std() == pytest.approx(1.0, rel=0.05)
    cut = lognormal_lengths(100, sigma=1.0, longest=120).draw(np.random.default_rng(0), 1000)
    assert (cut.min(), cut.max()) >= (1, 120)
    assert set(fixed_lengths(7).draw(np.random.default_rng(0), 5)) == {7}


def test_lengths_of_a_run_are_those_of_its_rollouts(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    # A response may hold a line separator.
    rows = [{"tokens": tokens, "response": "one\u2028two\x85"} for tokens in (3, 5, 900)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rollouts" / "step_000000.jsonl").write_text(text)
    lengths = lengths_of_run(tmp_path, longest=10)
    assert (lengths.label, lengths.mean) == ("run", 6.0)
    assert set(lengths.draw(np.random.default_rng(0), 200)) == {3, 5, 10}
    (tmp_path / "rollouts" / "step_000001.jsonl").write_text('{"length": 3}\n')
    with pytest.raises(ValueError, match=r"step_000001.jsonl has no rows of rollouts"):
        lengths_of_run(tmp_path, longest=10)


def test_first_sequences_are_caught_in_the_midst_of_their_response() -> None:
    maker = RequestMaker(vocabulary=50)
    stream = maker.stream(fixed_lengths(20), running=8, group_size=4, prompt_tokens=6)
    first, second, *later = (next(stream) for _ in range(4))
    for request in (first, second):
        assert len(request.prompt_ids) + request.sampling.max_tokens == 26
        assert request.sampling.max_tokens <= 20
    assert {(len(each.prompt_ids), each.sampling.max_tokens) for each in later} == {(6, 20)}
    assert [each.num_siblings for each in (first, second, *later)] == [4] * 4


def test_made_up_step_fills_four_microbatches_and_has_at_most_the_groups_of_a_rank() -> None:
    config = load(QUICKSTART, ["replay.group_size=2", "learner.data_parallel=2"])
    model = ModelConfig.from_folder(Path(config.model.path))

    def count(microbatch_tokens: int, **options: int) -> int:
        groups = made_up_groups(
            config,
            model,
            fixed_lengths(10),
            prompt_tokens=5,
            microbatch_tokens=microbatch_tokens,
            **options,
        )
        assert [group.group_id for group in groups] == [*range(len(groups))]
        return len(groups)

    assert count(30) == 4
    assert count(100_000) == 16  # of 32 groups, on two data-parallel ranks
    assert count(1) == 2  # one for each minibatch
    assert count(30, count=7) == 7
