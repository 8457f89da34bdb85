"""The frame of `dapo-async bench`: spread, rounds, interrupts, comparison, tables."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dapo_async.bench.compare import check_comparable, compare, differences
from dapo_async.bench.figures import BenchResult, BenchRow, Spread, higher_is_better
from dapo_async.bench.session import Cell, CellFailed, Figures, Rounds, measure, run_interruptible
from dapo_async.bench.table import tables, value_text

CPU = {"cpu": "A", "cores": 2, "threads": 1}


@dataclass
class FakeSubject:
    """Cells with a number each; `act` is called with the number and gives the figures."""

    act: Callable[[int], Figures]
    count: int = 3
    closed: bool = False
    notes: Sequence[str] = ("a note",)

    @property
    def cells(self) -> list[Cell]:
        return [{"kind": "cell", "number": number} for number in range(self.count)]

    @contextmanager
    def measuring(self) -> Iterator[Callable[[Cell], Figures]]:
        try:
            yield lambda cell: self.act(int(cell["number"]))
        finally:
            self.closed = True


def result_of(values: Mapping[str, Sequence[float]], **about: object) -> BenchResult:
    row = BenchRow({"kind": "cell"}, {name: Spread(tuple(each)) for name, each in values.items()})
    return BenchResult("fake", {"device": CPU, "config_sha256": "a", **about}, {"n": 1}, [row])


def verdict(name: str, before: Sequence[float], now: Sequence[float]) -> str:
    (compared,) = compare(result_of({name: before}), result_of({name: now}), tolerance=0.05)
    return compared.verdict


def test_spread_is_the_median_and_the_quartiles() -> None:
    spread = Spread((5.0, 1.0, 2.0, 3.0, 4.0))
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert (Spread((7.0,)).low, Spread((7.0,)).high) == (7.0, 7.0)


def test_rounds_of_the_warm_up_do_not_count() -> None:
    numbers = iter(range(100))
    assert Rounds(warm_up=2, repeats=3).of(lambda: next(numbers)) == [2, 3, 4]


def test_name_of_a_figure_tells_which_value_is_better() -> None:
    names = ("tokens_per_s", "step_s", "peak_bytes", "kv_capacity_tokens", "mean_length")
    assert [higher_is_better(name) for name in names] == [True, False, False, True, None]


def test_result_is_written_after_each_row_and_read_back_equal(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    seen: list[int] = []

    def act(number: int) -> Figures:
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        return {"step_s": [0.5 + number, 1.5], "peak_bytes": []}

    subject, said = FakeSubject(act), list[str]()
    result = BenchResult("fake", {"device": CPU, "commit": None}, {"repeats": 2})
    assert measure(subject, result, out=out, say=said.append) == 0
    assert (seen, subject.closed) == ([0, 1, 2], True)
    assert said[0] == "a note"
    assert said[1].startswith("  1/3  cell number 0: step 1 s (")
    read = BenchResult.read(out)
    assert (read.complete, read.subject, read.settings) == (True, "fake", {"repeats": 2})
    assert read.about == {"device": CPU, "commit": None}
    assert read.rows == result.rows
    assert [*read.rows[2].figures] == ["step_s"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_keeps_the_rows_before_it(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    def act(cell: int) -> Figures:
        if cell == 2:
            os.kill(os.getpid(), number)
        return {"step_s": [1.0]}

    out, said = tmp_path / "out.json", list[str]()
    subject, before = FakeSubject(act), signal.getsignal(number)
    result = BenchResult("fake", {}, {})
    assert measure(subject, result, out=out, say=said.append) == code
    assert said[-1] == f"{number.name}: 2 of 3 rows were measured; they are in {out}"
    read = BenchResult.read(out)
    assert (len(read.rows), read.complete, subject.closed) == (2, False, True)
    assert signal.getsignal(number) is before


def test_interrupted_coroutine_cleans_up_before_the_signal_is_raised() -> None:
    ended: list[str] = []

    async def work() -> Figures:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")
        return {}

    with asyncio.Runner() as runner:
        subject = FakeSubject(lambda cell: run_interruptible(runner, work()))
        assert measure(subject, BenchResult("fake", {}, {}), out=None, say=ended.append) == 143
    assert ended == ["a note", "cleaned up", "SIGTERM: 0 of 3 rows were measured"]


def test_cell_without_memory_fails_alone() -> None:
    def act(cell: int) -> Figures:
        if cell == 1:
            raise MemoryError
        return {"step_s": [1.0]}

    result = BenchResult("fake", {}, {})
    assert measure(FakeSubject(act), result, out=None, say=lambda line: None) == 0
    assert [row.failed for row in result.rows] == ["", "out of memory", ""]


def test_other_errors_of_a_cell_are_raised() -> None:
    def act(cell: int) -> Figures:
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        measure(FakeSubject(act), BenchResult("fake", {}, {}), out=None, say=lambda line: None)


def test_cell_that_an_engine_refuses_is_no_wrong_input() -> None:
    def act(cell: int) -> Figures:
        if cell == 1:
            raise ValueError("too long")
        return {"step_s": [1.0]}

    result = BenchResult("fake", {}, {})
    with pytest.raises(CellFailed, match="cell number 1: too long"):
        measure(FakeSubject(act), result, out=None, say=lambda line: None)
    assert len(result.rows) == 1


def test_figure_is_worse_only_beyond_tolerance_and_spread() -> None:
    assert verdict("step_s", [1.0, 1.01, 1.02], [1.2, 1.21, 1.22]) == "worse"
    assert verdict("step_s", [1.0, 1.01, 1.02], [1.04, 1.04, 1.04]) == ""  # within 5 %
    assert verdict("step_s", [1.0, 1.1, 2.0], [1.2, 1.3, 1.4]) == ""  # the quartiles overlap
    assert verdict("step_s", [1.2, 1.21, 1.22], [1.0, 1.01, 1.02]) == "better"
    assert verdict("tokens_per_s", [100.0, 101.0], [80.0, 81.0]) == "worse"
    assert verdict("tokens_per_s", [80.0, 81.0], [100.0, 101.0]) == "better"
    assert verdict("mean_length", [1.0], [2.0]) == ""


def test_only_rows_of_both_results_are_compared() -> None:
    old, new = result_of({"step_s": [2.0]}), result_of({"step_s": [1.0], "peak_bytes": [8.0]})
    new.rows.append(BenchRow({"kind": "other"}, {"step_s": Spread((1.0,))}))
    (compared,) = compare(old, new, tolerance=0.05)
    assert (compared.name, compared.ratio) == ("step_s", 0.5)


def test_results_of_another_device_or_config_say_so_in_one_line() -> None:
    versions = {"torch": "2.13", "dapo_async": "1"}
    old = result_of({"step_s": [1.0]}, versions=versions)
    assert differences(old, result_of({"step_s": [1.0]}, versions=versions)) == ""
    newer = {"torch": "2.13", "dapo_async": "2"}  # the code itself is what is compared
    assert differences(old, result_of({"step_s": [1.0]}, versions=newer)) == ""
    gpu = {**CPU, "gpu": "H200"}
    other = result_of({"step_s": [1.0]}, device=gpu, config_sha256="b", versions={"torch": "3"})
    assert differences(old, other) == (
        "the results differ in device (then A, 2 cores, 1 threads, now H200, 2 cores, "
        "1 threads), config, versions: the ratios compare more than the code"
    )


def test_result_of_another_subject_or_sweep_is_refused_before_measuring() -> None:
    old = result_of({"step_s": [1.0]})
    check_comparable(old, "fake", [{"kind": "cell"}])
    with pytest.raises(ValueError, match="this is bench learner; give a result of the same"):
        check_comparable(old, "learner", [{"kind": "cell"}])
    with pytest.raises(ValueError, match="no row that this command measures"):
        check_comparable(old, "fake", [{"kind": "other"}])


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 1}', '{"rows": [], "format": 9}'])
def test_file_that_is_no_result_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no result of dapo-async bench"):
        BenchResult.read(path)
    with pytest.raises(ValueError, match="can't be read: No such file"):
        BenchResult.read(tmp_path / "none.json")


def test_table_has_one_part_per_kind_with_aligned_columns() -> None:
    rows = [
        BenchRow({"kind": "decode", "running": 1}, {"decode_step_s": Spread((0.001, 0.002))}),
        BenchRow({"kind": "decode", "running": 16}, {"decode_step_s": Spread((0.01, 0.01))}),
        BenchRow({"kind": "capacity"}, {"kv_bytes": Spread((2.0**30,))}),
    ]
    lines = [*tables(rows)]
    assert [line.split("  ")[0] for line in lines if line[:1].strip()] == ["decode", "capacity"]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[-1].endswith("1.0 GiB")


def test_values_have_the_unit_of_their_figure() -> None:
    assert value_text("step_s", 2.5) == "2.5 s"
    assert value_text("step_s", 0.0025) == "2.5 ms"
    assert value_text("tokens_per_s", 12345.6) == "12,346/s"
    assert value_text("peak_bytes", 3 * 2.0**20) == "3.0 MiB"
    assert value_text("mfu", 0.41) == "0.41"
