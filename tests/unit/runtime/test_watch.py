"""`dapo-async eval --watch`: which versions it measures, what ends it, and what it survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from paths import CONFIGS, QUICKSTART

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.evaluate.command import Job, Options
from dapo_async.runtime.watch import MAX_FAILED, Watcher
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.run_status import RunState
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.manifest import MANIFEST

ASKED = Options(
    checkpoint=None,
    data=None,
    k=4,
    temperature=1.0,
    top_p=0.7,
    seed=None,
    max_problems=None,
    out=None,
)


def config_text(override: str) -> str:
    return knobs.to_yaml(knobs.load(QUICKSTART, [override]))


@dataclass(frozen=True)
class FakeJob:
    checkpoint: Path | None
    settings: dict[str, Any]


@dataclass
class World:
    """A run directory, and an evaluation that takes no time. `then`: what happens after each."""

    root: Path
    states: list[RunState] = field(default_factory=lambda: [RunState.DONE])
    measured: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)  # of the next evaluations; then 0
    then: Callable[[int], None] = lambda version: None
    has_base: bool = True
    overrides: Sequence[str] = ()  # of the newest evaluation

    def __post_init__(self) -> None:
        run_dir = RunDir.create(self.root)
        run_dir.config.write_text(config_text("tracking.sinks=none"))
        self.run_dir, self.checkpoints = run_dir, CheckpointFolder(run_dir.checkpoints)

    def save(self, version: int, weights: str = "first") -> None:
        state = self.checkpoints.path(version) / STATE
        state.mkdir(parents=True, exist_ok=True)
        (state / MANIFEST).write_text(weights)

    def prepare(self, file: str, overrides: Sequence[str], options: Options) -> Job:
        assert file == str(self.run_dir.config)
        self.overrides = overrides
        if options.checkpoint is None and not self.has_base:
            raise ValueError("model.path is not here")
        settings = {"k": options.k, "checkpoint": str(options.checkpoint)}
        return cast(Job, FakeJob(options.checkpoint, settings))

    def measure(self, job: Job, *, out: Path, say: Callable[[str], None]) -> int:
        version = int(job.settings["version"])
        self.measured.append(version)
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            k = job.settings["k"]
            estimate = {"mean": 0.5, "low": 0.4, "high": 0.6}
            totals: dict[str, Any] = {f"{name}@{k}": estimate for name in ("avg", "pass", "maj")}
            out.write_text(json.dumps({"settings": job.settings, "totals": totals}))
        self.then(version)
        return code

    def state(self, root: Path) -> RunState:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def watch(self, *, until_end: bool = True, options: Options = ASKED) -> int:
        watcher = Watcher(
            self.root,
            (),
            options,
            until_end=until_end,
            say=self.said.append,
            poll_s=0.001,
            patience_s=0.05,
            prepare=self.prepare,
            measure=self.measure,
            state=self.state,
        )
        return watcher.run()


def test_the_base_model_and_every_checkpoint_are_measured_in_order(tmp_path: Path) -> None:
    world = World(tmp_path / "run")
    world.save(4)
    world.save(2)
    assert world.watch() == 0
    assert world.measured == [0, 2, 4]
    settings = world.run_dir.watched.read(4)["settings"]
    assert settings["version"] == 4
    assert settings["checkpoint_sums"]
    assert world.said[-1] == f"3 versions are measured, in {world.run_dir.watched.root}"
    assert not world.run_dir.watched.lease.exists()


def test_the_servers_that_generate_for_the_run_are_not_used(tmp_path: Path) -> None:
    world = World(tmp_path / "run")
    servers = ["rollout.servers='http://a:1,http://b:2'", "rollout.num_workers=2"]
    config = knobs.load(CONFIGS / "quickstart_sglang.yaml", servers)
    world.run_dir.config.write_text(knobs.to_yaml(config))
    world.watch()
    assert knobs.load(world.run_dir.config, world.overrides).rollout.server_urls == ()
    again = knobs.load(world.run_dir.config, [*world.overrides, *servers])
    assert again.rollout.server_urls == config.rollout.server_urls


def test_checkpoints_that_appear_during_the_watch_are_measured_before_it_ends(
    tmp_path: Path,
) -> None:
    world = World(tmp_path / "run", states=[RunState.RUNNING] * 4 + [RunState.DONE])
    world.then = lambda version: world.save(version + 2) if version < 6 else None
    assert world.watch() == 0
    assert world.measured == [0, 2, 4, 6]


def test_a_second_watch_measures_only_what_has_no_result(tmp_path: Path) -> None:
    world = World(tmp_path / "run")
    world.save(2)
    world.watch()
    world.save(4)
    world.measured.clear()
    assert world.watch() == 0
    assert world.measured == [4]


def test_a_version_that_a_resumed_run_trained_again_is_measured_again(tmp_path: Path) -> None:
    world = World(tmp_path / "run")
    world.save(2)
    world.watch()
    world.save(2, weights="second")
    partial = world.run_dir.watched.root / "version_000002.json.partial.jsonl"
    partial.write_text('{"settings": {"checkpoint_sums": "of the first"}}\n')
    world.measured.clear()
    assert world.watch() == 0
    assert world.measured == [2]
    assert not partial.exists()


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(tmp_path: Path) -> None:
    world = World(tmp_path / "run", codes=[0, 1])
    world.save(2)
    world.save(4)

    def remove(version: int) -> None:
        if version == 2:
            shutil.rmtree(world.checkpoints.path(2))

    world.then = remove
    assert world.watch() == 0
    assert world.measured == [0, 2, 4]
    assert "version 2 was removed while it was measured" in world.said
    assert world.run_dir.watched.versions() == [0, 4]


def test_a_version_that_fails_again_and_again_ends_the_watch(tmp_path: Path) -> None:
    world = World(tmp_path / "run", codes=[0] + [1] * MAX_FAILED)
    world.save(2)
    assert world.watch() == 1
    assert world.measured == [0] + [2] * MAX_FAILED
    assert f"version 2 failed {MAX_FAILED} times; the watch ends" in world.said


def test_a_base_model_that_this_machine_lacks_is_left_out(tmp_path: Path) -> None:
    world = World(tmp_path / "run", has_base=False)
    world.save(2)
    assert world.watch() == 0
    assert world.measured == [2]
    assert world.said[0] == "the base model is not measured: model.path is not here"


def test_an_interrupted_run_is_awaited_because_it_may_be_resumed(tmp_path: Path) -> None:
    states = [RunState.ENDED, RunState.ENDED, RunState.RUNNING, RunState.KILLED]
    world = World(tmp_path / "run", states=states)
    assert world.watch() == 0
    assert world.states == [RunState.KILLED]  # the watch went on after `ended`, until its patience


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_watch_and_its_claim(tmp_path: Path, number: signal.Signals) -> None:
    world = World(tmp_path / "run", states=[RunState.RUNNING])
    before = signal.getsignal(number)
    world.then = lambda version: os.kill(os.getpid(), number)
    assert world.watch(until_end=False) == 128 + number
    assert not world.run_dir.watched.lease.exists()
    assert signal.getsignal(number) is before


def test_an_interrupted_evaluation_ends_the_watch_with_its_code(tmp_path: Path) -> None:
    assert World(tmp_path / "run", codes=[130]).watch(until_end=False) == 130


def test_results_with_other_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    world = World(tmp_path / "run")
    world.watch()
    world.save(2)
    other = Options(**{**{name: getattr(ASKED, name) for name in Options.__slots__}, "k": 8})
    with pytest.raises(ValueError, match="results with other settings: k was 4, is 8; use the"):
        world.watch(options=other)
    assert not world.run_dir.watched.lease.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--watch", "{root}"], "--watch {root} is no run directory: it has no config.yaml"),
        (["--watch", "{root}", "--json", "a.json"], "--watch takes no --json"),
        (["--watch", "{root}", "--checkpoint", "a"], "--watch takes no --checkpoint"),
        (["a.yaml", "--watch", "{root}"], "--watch takes no CONFIG"),
        ([], "the config file is missing"),
        (["a.yaml", "--follow-until-end"], "--follow-until-end needs --watch RUN_DIR"),
        (["--watch", "{root}", "learner.lr=1"], "--watch {root} is no run directory"),
    ],
)
def test_wrong_options_are_one_clear_line(
    tmp_path: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *(word.format(root=tmp_path) for word in words)]) == 2
    assert line.format(root=tmp_path) in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_numbers_go_to_the_mlflow_run_of_the_driver_and_are_kept_while_it_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dapo_async.tracking import watch_sink

    run_dir, said = RunDir.create(tmp_path / "run"), list[str]()
    run_dir.config.write_text(config_text("tracking.mlflow=http://127.0.0.1:1"))
    sent: list[tuple[str, str, int, float]] = []
    answers = [OSError("no route")]

    def log(uri: str, run_id: str, *, step: int, values: Any) -> None:
        if answers:
            raise answers.pop()
        sent.append((uri, run_id, step, values["watched/accuracy"]))

    monkeypatch.setattr(watch_sink, "log_to_known_run", log)
    sink = watch_sink.WatchSink(run_dir, (), say=said.append)
    sink.add({"version": 2, "accuracy": 0.25})  # the driver has not reached MLflow yet
    known = {"uri": "http://127.0.0.1:1", "experiment": "dapo-async", "run_id": "abc"}
    run_dir.mlflow.write_text(json.dumps(known))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    sink.add({"version": 4, "accuracy": 0.5})
    assert sent == []
    assert "MLflow does not take the results: no route" in said[0]
    sink.close("over")
    assert sent == [("http://127.0.0.1:1", "abc", 2, 0.25), ("http://127.0.0.1:1", "abc", 4, 0.5)]
    assert len(said) == 1


def test_a_real_evaluation_of_base_model_and_checkpoint_leaves_two_rows(tmp_path: Path) -> None:
    world = World(tmp_path / "run")
    world.save(2)
    base = Path(knobs.load(QUICKSTART).model.path)
    shutil.copytree(base, world.checkpoints.path(2), dirs_exist_ok=True)
    short = ("rollout.max_response_tokens=4", "rollout.num_slots=16", "replay.group_size=8")
    options = replace(ASKED, max_problems=3)
    said = world.said
    watcher = Watcher(
        world.root, short, options, until_end=True, say=said.append, state=lambda _: RunState.DONE
    )
    assert watcher.run() == 0, said
    base_row, row = world.run_dir.watched.rows()
    assert (base_row["version"], row["version"], row["k"], row["num_prompts"]) == (0, 2, 4, 3)
    assert {**base_row, "version": 2} == row  # the same weights, and the same noise
    assert not [*world.run_dir.watched.root.glob("*.partial*")]
