"""TensorBoard and W&B: what their files hold, and that their errors never reach a run."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from paths import QUICKSTART
from tracking_world import config_with, run_dir_with, step_row

from dapo_async import config as knobs
from dapo_async.runtime.preflight import _sink_faults
from dapo_async.tracking.metric_names import finite_numbers
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sink_thread import ThreadedSink
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.tensorboard_writer import TensorBoardWriter
from dapo_async.tracking.terminal import Outlet, Progress

DEADLINE_S = 60.0


class FakeWriter:
    """Keeps what it gets, and raises for the steps in `refused`."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.got: list[tuple[int, Mapping[str, float]]] = []
        self.closed: tuple[str, str] | None = None
        self.refused = refused

    def log(self, step: int, values: Mapping[str, float], *, time_s: float) -> None:
        if step in self.refused:
            raise OSError(28, "no space left")
        self.got.append((step, values))

    def close(self, status: str, reason: str) -> None:
        self.closed = (status, reason)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the event files in `folder`, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def wandb_records(file: Path) -> list[Any]:
    """The records of a W&B file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    make: Any = wandb_internal_pb2
    data, block_bytes, head_bytes = file.read_bytes(), 32_768, 7
    found, whole, place = list[Any](), b"", head_bytes
    while place + head_bytes <= len(data):
        if block_bytes - place % block_bytes < head_bytes:  # the rest of a block is padding
            place += block_bytes - place % block_bytes
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + head_bytes : place + head_bytes + size]
        place += head_bytes + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = make.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def values_of(items: Any) -> dict[str, Any]:
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def sinks_of(run_dir: RunDir, names: str, said: list[str]) -> Sinks:
    class Out:
        def write(self, text: str) -> int:
            said.append(text)
            return len(text)

        def flush(self) -> None:
            pass

    progress = Progress(Outlet.on(Out()), num_steps=4, max_staleness=2)  # type: ignore[arg-type]
    return Sinks(config_with(sinks=names), run_dir, progress)


def test_tensorboard_reads_every_number_of_the_rows_under_the_shared_names(tmp_path: Path) -> None:
    run_dir = run_dir_with(tmp_path / "run")
    said: list[str] = []
    sinks = sinks_of(run_dir, "tensorboard", said)
    sinks.start()
    rows = run_dir.rows()
    for row in rows:
        sinks.step(row)
    sinks.evaluation({"version": 2, "accuracy": 0.75, "mean_response_tokens": 9.5})
    sinks.finish("done", "all steps trained")
    found = scalars(run_dir.tensorboard)
    for name, values in found.items():
        if not name.startswith("evaluation/"):
            assert [step for step, _ in values] == [row["version"] for row in rows]
            numbers = [finite_numbers(row)[name] for row in rows]
            assert [value for _, value in values] == pytest.approx(numbers)
    assert set(finite_numbers(rows[0])) <= set(found)
    assert found["evaluation/accuracy"] == [(2, 0.75)]
    assert sinks.caught == {}
    assert "tensorboard" not in "".join(said)


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path: Path) -> None:
    for first, accuracy in ((1, 0.25), (3, 0.5)):
        writer = TensorBoardWriter(tmp_path)
        for step in range(first, first + 4):
            writer.log(step, {"accuracy": accuracy}, time_s=float(step))
        writer.close("interrupted", "SIGINT received")
    assert scalars(tmp_path)["accuracy"] == [
        (1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5), (5, 0.5), (6, 0.5),
    ]  # fmt: skip


@pytest.mark.slow
def test_wandb_offline_keeps_every_number_the_knobs_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["train", "tracking.mlflow=http://me:secret@127.0.0.1:1"])
    run_dir, said = run_dir_with(tmp_path / "run"), list[str]()
    sinks = sinks_of(run_dir, "wandb", said)
    sinks.start()
    rows = run_dir.rows()
    for row in rows:
        sinks.step(row)
    sinks.evaluation({"version": 2, "accuracy": 0.75})  # after a later step
    sinks.finish("done", "all steps trained")
    assert sinks.caught == {}
    assert "wandb" not in "".join(said)
    run_id = json.loads((run_dir.root / "wandb.json").read_text())["run_id"]
    (file,) = run_dir.root.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    records = wandb_records(file)
    history = [values_of(each.history.item) for each in records if each.HasField("history")]
    measured = [{k: v for k, v in each.items() if not k.startswith("_")} for each in history]
    assert measured == [
        *({"version": row["version"], **finite_numbers(row)} for row in rows),
        {"version": 2, "evaluation/accuracy": 0.75},
    ]
    (run,) = (each.run for each in records if each.HasField("run"))
    assert (run.project, run.display_name) == ("dapo-async", "run")
    assert values_of(run.config.update)["learner.lr"] == "1e-06"
    summary: dict[str, Any] = {}
    for each in records:
        summary |= values_of(each.summary.update)
    assert (summary["status"], summary["reason"]) == ("done", "all steps trained")
    told = [path for path in run_dir.root.rglob("*") if path.is_file()]
    assert not [path for path in told if b"secret" in path.read_bytes()]


def test_a_refused_call_is_said_once_counted_and_the_next_ones_go_on() -> None:
    writer, said = FakeWriter(refused=(2, 3)), list[str]()
    sink = ThreadedSink("tensorboard", lambda: writer, say=said.append)
    sink.start()
    for step in range(4):
        sink.log_step(step_row(step))
    sink.finish("done", "all steps trained", deadline_s=DEADLINE_S)
    assert [step for step, _ in writer.got] == [1, 4]
    assert writer.closed == ("done", "all steps trained")
    assert sink.caught == {"tensorboard: OSError": 2}
    assert said == [
        "tensorboard refuses a call: [Errno 28] no space left; the run goes on, and its folder "
        "has everything"
    ]


def test_a_sink_that_cannot_be_opened_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = list[str]()
    sink = ThreadedSink(
        "tensorboard", lambda: TensorBoardWriter(tmp_path / "file"), say=said.append
    )
    sink.start()
    sink.log_step(step_row(0))
    sink.finish("done", "", deadline_s=DEADLINE_S)
    assert len(said) == 1
    assert said[0].startswith("tensorboard can't be opened and gets nothing: ")


def test_a_sink_that_hangs_is_given_up_at_its_deadline() -> None:
    ever, said = threading.Event(), list[str]()

    class Hanging(FakeWriter):
        def log(self, step: int, values: Mapping[str, float], *, time_s: float) -> None:
            ever.wait()

    sink = ThreadedSink("wandb", Hanging, say=said.append)
    sink.start()
    sink.log_step(step_row(0))
    sink.finish("done", "", deadline_s=0.01)
    ever.set()
    assert sink.caught == {"wandb: late": 1}
    assert "wandb has not taken everything within 0.01 s" in said[0]


def test_a_sink_whose_package_is_missing_is_refused_before_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = knobs.load(QUICKSTART, ["tracking.sinks=mlflow,wandb"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    (line,) = _sink_faults(config)
    assert line == (
        "tracking.sinks names wandb, and its package is not installed here; install it with "
        "pip install 'dapo-async[wandb]', or leave it out of tracking.sinks"
    )


def test_a_run_without_these_sinks_imports_neither(tmp_path: Path) -> None:
    before = set(sys.modules)
    sinks_of(run_dir_with(tmp_path / "run"), "none", []).start()
    assert not {"tensorboard", "wandb"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("tracking.sinks=mlflow,nosuch", "must be none or some of mlflow, tensorboard, wandb"),
        ("tracking.sinks=mlflow,mlflow", "each once"),
        ("tracking.mlflow=null", "tracking.mlflow=null was replaced: set tracking.sinks=none"),
        ("tracking.mlflow=here", "must be local, or a tracking URI"),
    ],
)
def test_wrong_sinks_are_one_clear_line(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        knobs.load(QUICKSTART, [override])


@pytest.mark.parametrize(
    ("sinks", "names"),
    [("none", ()), ("tensorboard, wandb", ("tensorboard", "wandb")), ("mlflow", ("mlflow",))],
)
def test_the_sinks_are_a_list_of_names(sinks: str, names: tuple[str, ...]) -> None:
    assert config_with(sinks=sinks).tracking.names == names
