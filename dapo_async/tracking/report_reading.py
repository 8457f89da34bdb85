"""Reads runs and evaluations for the report: files in, plain records out.

Anything broken or missing becomes a note and never an error: a run may still go on, or be copied
in part. Called by `report.py` and `plot.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.reasons import unreadable

LARGEST = 1e300  # larger numbers can't be drawn
MARKS = ("config.yaml", "metrics.jsonl", "summary.json")  # a run directory has at least one


@dataclass(frozen=True, slots=True)
class PassRates:
    """Share of correct responses, `[problems, evaluations]`; nan where one was not measured."""

    problems: list[int]  # rows of the data set
    evaluations: list[str]  # what was measured, in order
    values: list[list[float]]


@dataclass(slots=True)
class RunRecord:
    """One run directory, as far as it can be read."""

    name: str
    root: Path
    rows: list[dict[str, float]]  # the numbers of metrics.jsonl, ascending in `step`
    evaluations: list[dict[str, float]]  # of evaluations.jsonl, ascending in `version`
    watched: list[dict[str, float]]  # of `eval --watch`, ascending in `version`
    pass_rates: PassRates
    summary: dict[str, Any]
    config: dict[str, Any]  # by dotted knob
    steps_with_rollouts: list[int]
    notes: list[str] = field(default_factory=list)

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """The rollouts that were written for one step; broken rows become a note."""
        return _json_lines(rollout_file(self.root, step), self.notes)


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """The result of one `dapo-async eval`."""

    name: str
    settings: Mapping[str, Any]
    totals: Mapping[str, Any]
    accuracies: Mapping[int, float]  # mean over the k responses, by row


def rollout_file(root: Path, step: int) -> Path:
    """The file with the readable samples of a step."""
    return RunDir(root).rollouts / f"step_{step:06d}.jsonl"


def read_run(root: Path, name: str) -> RunRecord:
    """Raises ValueError for a folder that is no run directory."""
    if not any((root / mark).is_file() for mark in MARKS):
        raise ValueError(
            f"{root} is no run directory: it has none of {', '.join(MARKS)}; "
            "give the folder that a run has printed"
        )
    run_dir, notes = RunDir(root), list[str]()
    rows = _numbers(
        _json_lines(run_dir.metrics, notes), by="step", notes=notes, name=run_dir.metrics.name
    )
    if not rows:
        notes.append("no step has been written yet")
    evaluations = _numbers(
        _json_lines(run_dir.evaluations, notes),
        by="version",
        notes=notes,
        name=run_dir.evaluations.name,
    )
    steps = sorted(
        int(path.stem.removeprefix("step_"))
        for path in run_dir.rollouts.glob("step_*.jsonl")
        if path.stem[5:].isdecimal()
    )
    return RunRecord(
        name=name,
        root=root,
        rows=rows,
        evaluations=evaluations,
        watched=_numbers(run_dir.watched.rows(), by="version", notes=notes, name="watched"),
        pass_rates=_pass_rates(run_dir.problems, notes),
        summary=_json_object(run_dir.summary, notes),
        config=_config(run_dir.config, notes),
        steps_with_rollouts=steps,
        notes=notes,
    )


def read_evaluation(path: Path) -> EvalRecord:
    """The `--json` of an evaluation. Raises ValueError for anything else."""
    try:
        result = json.loads(path.read_bytes())
        # Where the verifier failed on all responses, the problem has no rate: nan.
        rates = {
            int(each["row"]): number(each["accuracy"] if each.get("num_judged") != 0 else None)
            for each in result["problems"]
        }
        settings, totals = dict(result["settings"]), dict(result["totals"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise ValueError(
            f"{path} is neither a run directory nor the result of dapo-async eval: "
            f"{unreadable(error)}; give one of them"
        ) from error
    return EvalRecord(path.stem, settings, totals, rates)


def rates_of(evaluations: Sequence[EvalRecord]) -> PassRates:
    """The pass rates of several results, in the order given."""
    return _arrange([(each.name, each.accuracies) for each in evaluations])


def number(value: Any) -> float:
    """The value if it is a number that can be drawn, else nan."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return math.nan
    return float(value)


def _pass_rates(folder: Path, notes: list[str]) -> PassRates:
    found = list[tuple[int, dict[int, float]]]()
    for path in folder.glob("version_*.json"):
        values = _json_object(path, notes)
        version, rows, accuracies = (values.get(n) for n in ("version", "rows", "accuracies"))
        if not (
            isinstance(version, int)
            and isinstance(rows, list)
            and isinstance(accuracies, list)
            and len(rows) == len(accuracies)
        ):
            name = f"evaluations/{path.name}"
            notes.append(f"{name} does not say which problems were solved; it is left out")
            continue
        pairs = zip(rows, accuracies, strict=True)
        found.append((version, {row: number(each) for row, each in pairs if isinstance(row, int)}))
    found.sort(key=lambda pair: pair[0])
    return _arrange([(str(version), accuracies) for version, accuracies in found])


def _arrange(columns: Sequence[tuple[str, Mapping[int, float]]]) -> PassRates:
    problems = sorted({row for _, accuracies in columns for row in accuracies})
    values = [[accuracies.get(row, math.nan) for _, accuracies in columns] for row in problems]
    return PassRates(problems, [name for name, _ in columns], values)


def _numbers(
    rows: Sequence[Mapping[str, Any]], *, by: str, notes: list[str], name: str
) -> list[dict[str, float]]:
    """The numbers of each row, one row per value of `by`: the last one."""
    known: dict[float, dict[str, float]] = {}
    for row in rows:
        if not math.isnan(place := number(row.get(by))):
            known[place] = {
                key: value for key, each in row.items() if not math.isnan(value := number(each))
            }
    if (lost := sum(math.isnan(number(row.get(by))) for row in rows)) > 0:
        notes.append(f"{name}: {lost} of {len(rows)} rows have no {by}; they are left out")
    return [known[place] for place in sorted(known)]


def _json_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    rows, broken, total = [], [], 0
    for total, line in enumerate(_lines(path, notes), start=1):
        value = _parsed(line)
        if isinstance(value, dict):
            rows.append(value)
        else:
            broken.append(total)
    if broken:
        notes.append(
            f"{path.name}: {len(broken)} of {total} lines are no JSON objects, "
            f"the first is line {broken[0]}; they are left out"
        )
    return rows


def _lines(path: Path, notes: list[str]) -> Iterator[bytes]:
    try:
        yield from path.read_bytes().splitlines() if path.exists() else ()
    except OSError as error:
        notes.append(f"{path.name} can't be read: {error.strerror}")


def _json_object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = b"\n".join(_lines(path, notes))
    value = _parsed(text)
    if text and not isinstance(value, dict):
        notes.append(f"{path.name} is no JSON object; it is left out")
    return value if isinstance(value, dict) else {}


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    """The knobs as they are written; the files that they name may be missing."""
    import yaml

    try:
        tree = yaml.safe_load(b"\n".join(_lines(path, notes)))
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append(f"{path.name} is not valid YAML; it is left out")
        return {}
    return dict(_flat(tree)) if isinstance(tree, dict) else {}


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
