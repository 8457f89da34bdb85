"""The sides that replace engines and learner, and the config of the loop, without Ray."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from native_engine_world import SIZES, group, tiny_decoder
from paths import QUICKSTART

from dapo_async.bench.loop import LoopBench
from dapo_async.bench.made_up import fixed_lengths, lognormal_lengths, made_up_group
from dapo_async.bench.replaced import AnsweringEngine, AnswerSource, SleepingRank
from dapo_async.bench.rollout import RequestMaker, RolloutSweep
from dapo_async.bench.session import Cell, Rounds
from dapo_async.bench.sglang_rollout import SGLangRolloutBench
from dapo_async.cli.main import main
from dapo_async.config import AlgorithmConfig, Config, LearnerConfig, load
from dapo_async.config.validate import check
from dapo_async.model import ModelConfig
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.utils.state_clock import StateClock

CONFIG = load(QUICKSTART, ["replay.max_staleness=2"])


def bench(subject: str, config: Config = CONFIG, **options: object) -> LoopBench:
    made = LoopBench(config, subject, Rounds(1, 3), fixed_lengths(5), 8, 0.0, None)
    return replace(made, **options)  # type: ignore[arg-type]


def config_of(made: LoopBench, cell: Cell, folder: Path) -> Config:
    config = made._config_of(cell, folder)
    check(config)
    return config


def test_each_subject_of_the_loop_has_its_rows() -> None:
    assert bench("replay").cells == [{"kind": "replay", "workers": 1}]
    replaced = [cell["replaced"] for cell in bench("end-to-end").cells]
    assert replaced == ["learner", "rollout", "nothing"]
    (both,) = bench("end-to-end", replaced=("nothing",)).cells
    assert both == {"kind": "end-to-end", "replaced": "nothing"}
    (sleeps,) = bench("replay", step_s=1.0).cells
    assert sleeps["learner step s"] == 1.0
    publish = bench("publish", transports=("disk",), modes=("drain", "keep_kv")).cells
    assert publish == [
        {"kind": "publish", "transport": "disk", "mode": "drain"},
        {"kind": "publish", "transport": "disk", "mode": "keep_kv"},
    ]
    assert len(bench("publish").cells) == 6


def test_loop_runs_with_the_users_sizes_and_made_up_data(tmp_path: Path) -> None:
    made = bench("end-to-end")
    config = config_of(made, made.cells[0], tmp_path)
    for name in ("model", "rollout", "learner", "algorithm", "weights"):
        assert getattr(config, name) == getattr(CONFIG, name)
    assert config.replay == replace(CONFIG.replay, dynamic_sampling=False)
    # Warm-up, a full buffer, the measured steps, and those at the end without new groups.
    assert config.train.num_steps == 1 + 3 + 3 + 5
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) > 1000
    assert {len(row["prompt"]) for row in rows} == {8}


def test_publish_changes_transport_and_mode_and_replay_needs_no_server(tmp_path: Path) -> None:
    sglang = load(QUICKSTART, ["rollout.engine=sglang", "rollout.server_flags=--log-level info"])
    made = bench("publish", sglang)
    config = config_of(made, {"kind": "publish", "transport": "disk", "mode": "drain"}, tmp_path)
    assert (config.weights.transport, config.rollout.weight_update) == ("disk", "drain")
    assert config.rollout.engine == "sglang"
    assert config_of(made, {"kind": "replay", "workers": 1}, tmp_path).rollout.engine == "torch"


def test_engine_that_answers_at_once_gives_its_version_and_all_siblings() -> None:
    source = AnswerSource(lognormal_lengths(6, sigma=1.0, longest=9), SIZES["vocab_size"])  # type: ignore[arg-type]
    engine = AnsweringEngine(tiny_decoder(), source, num_slots=64, max_len=64)
    engine.version = 3
    engine.submit(group(5, [1, 2], siblings=4))
    engine.submit(group(6, [1, 2], siblings=2))
    engine.submit(group(7, [1, 2], siblings=2))
    assert engine.abort([7, 8]) == [7]
    answers = dict(engine.step())
    assert (engine.has_work, engine.step()) == (False, [])
    assert [len(answers[each]) for each in (5, 6)] == [4, 2]
    for completion in answers[5]:
        assert set(completion.weight_versions.tolist()) == {3} == {completion.prefill_version}
        assert 1 <= len(completion.token_ids) <= 9


def test_recorded_responses_are_given_in_turn_to_as_many_siblings_as_asked() -> None:
    recorded = [
        made_up_group(number, np.array([number + 2, 3]), prompt_tokens=2, vocabulary=9)
        for number in range(2)
    ]
    source = AnswerSource(fixed_lengths(5), 9, recorded)
    lengths = [
        [len(each.token_ids) for each in source.answer(group(key, [1], siblings=3), version=0)]
        for key in range(3)
    ]
    assert lengths == [[2, 3, 2], [3, 3, 3], [2, 3, 2]]


def test_learner_that_sleeps_takes_its_time_and_changes_the_weights() -> None:
    decoder = tiny_decoder()
    before = [parameter.detach().clone() for parameter in decoder.parameters()]
    rank = SleepingRank(decoder, algorithm=AlgorithmConfig(), learner=LearnerConfig())
    rank.step_s, rank.groups_per_step = 0.0, 2
    groups = [made_up_group(0, np.array([3, 5]), prompt_tokens=2, vocabulary=9)]
    metrics = rank.step(groups).flat()
    assert (metrics["non_finite"], metrics["staleness"], rank.version) == (0.0, 0.0, 1)
    for old, new in zip(before, decoder.parameters(), strict=True):
        assert not old.equal(new) or not old.any()


def test_rows_of_an_engine_behind_its_protocol_are_those_of_the_sweep() -> None:
    lengths = [fixed_lengths(4), lognormal_lengths(4, sigma=1.0, longest=8)]
    sweep = RolloutSweep((1, 4), (24,), lengths, prompt_tokens=6, max_len=64)
    model = ModelConfig.from_folder(Path(CONFIG.model.path))
    made = SGLangRolloutBench(CONFIG, model, sweep, Rounds(0, 2))

    async def measured() -> list[dict[str, int]]:
        core = TorchEngine(tiny_decoder(), num_slots=8, max_len=64)
        engine, maker = ThreadedEngine(core, StateClock("test")), RequestMaker(vocabulary=61)
        rows = []
        for cell in made.cells[1:]:  # the capacity is a question to the server
            figures = await made._measure(engine, maker, cell)  # type: ignore[arg-type]
            assert all(value > 0 for values in figures.values() for value in values)
            rows.append({name: len(values) for name, values in figures.items()})
        await engine.close()
        return rows

    prefill, *others = asyncio.run(measured())
    assert prefill == {"prefill_tokens_per_s": 2}
    assert (
        others
        == [{"decode_step_s": 2, "tokens_per_s": 2, "mbu": 2}] * 2 + [{"tokens_per_s": 2}] * 4
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("publish", "--modes", "drain,fast"), "argument --modes: fast must be one of recompute, "),
        (
            ("publish", "--step-s", "1"),
            "--step-s is an option of bench replay and end-to-end; leave it out",
        ),
        (
            ("end-to-end", "--replaced", "both"),
            "argument --replaced: both must be one of learner, ",
        ),
        (
            ("replay", "--replaced", "nothing"),
            "--replaced is an option of bench end-to-end; leave it out",
        ),
        (("end-to-end", "--step-s", "-1"), "--step-s (-1) must be at least 0"),
        (
            ("rollout", "--recorded", "x"),
            "--recorded is an option of bench learner and end-to-end; leave it out",
        ),
        (
            ("publish", "model.placement=shared"),
            "bench CONFIG publish measures both sides while they overlap; set model.placement",
        ),
    ],
)
def test_wrong_options_of_the_loop_are_refused_before_ray_starts(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    local = "ray.address=local"
    assert main(["bench", str(QUICKSTART), *words, local]) == 2
    captured = capsys.readouterr()
    assert line in captured.err
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)
