"""How much an evaluation beside training slows down the steps, for each evaluation engine.

python benchmarks/evaluation.py [--json OUT] [--quick]

It compares the steps during an evaluation with the other steps of the same run. A trained model
continues with a learning rate of 0 and without filters, so the steps differ in nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quickstart import CONFIG, QUICK, environment

ENGINES = ("snapshot", "dedicated")
EVERY_STEPS, NUM_STEPS, WARM_UP_STEPS = 4, 40, 3
STILL = (
    "learner.lr=0",
    "learner.weight_decay=0",
    "replay.dynamic_sampling=false",
    "rollout.num_workers=2",
)
Window = tuple[float, float]


def train(run_dir: Path, *overrides: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "dapo_async",
        "train",
        str(CONFIG),
        f"run_dir={run_dir}",
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run_dir


def windows(trace: Sequence[Mapping[str, Any]]) -> tuple[dict[int, Window], list[Window]]:
    """The time of each step and of each evaluation, in seconds.

    A step lasts from the driver's wait for it to the next one. An evaluation lasts from its load
    to its end.
    """
    names = {event["pid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    spans = sorted((event for event in trace if event["ph"] == "X"), key=lambda event: event["ts"])
    begun = {
        int(span["args"]["detail"].removeprefix("step ")): span["ts"] / 1e6
        for span in spans
        if names[span["pid"]] == "driver" and span["name"] == "wait for step"
    }
    steps = {step: (begun[step], begun[step + 1]) for step in begun if step + 1 in begun}
    evaluations = [
        (span["ts"] / 1e6, (span["ts"] + span["dur"]) / 1e6)
        for span in spans
        if names[span["pid"]] == "evaluator" and span["name"] not in ("start", "wait")
    ]
    return steps, evaluations


def cost(run_dir: Path) -> dict[str, Any]:
    """Mean step seconds and tokens/s during evaluations and otherwise.

    A step counts for both, in proportion to its time.
    """
    steps, evaluations = windows(json.loads((run_dir / "timeline.json").read_text())["traceEvents"])
    rows = {
        row["step"]: row
        for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    }
    measured = [
        json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()
    ]
    sums = {"during": [0.0, 0.0, 0.0], "otherwise": [0.0, 0.0, 0.0]}  # steps, seconds, tokens
    for step, (start, end) in steps.items():
        if step < WARM_UP_STEPS:
            continue
        covered = sum(
            max(0.0, min(end, until) - max(start, since)) for since, until in evaluations
        ) / (end - start)
        for name, share in (("during", covered), ("otherwise", 1.0 - covered)):
            for index, value in enumerate((1.0, end - start, rows[step]["tokens"])):
                sums[name][index] += share * value
    result: dict[str, Any] = {
        name: {
            "steps": count,
            "step_s": seconds / count if count else None,
            "tokens_per_s": tokens / seconds if seconds else None,
        }
        for name, (count, seconds, tokens) in sums.items()
    }
    beside = [row for row in measured if row["engine"] != "all"]
    summary = json.loads((run_dir / "summary.json").read_text())
    if all(part["step_s"] for part in result.values()):
        result["step_ratio"] = result["during"]["step_s"] / result["otherwise"]["step_s"]
    return result | {
        "evaluations": len(beside),
        "skipped": summary["evaluations_skipped"],
        "wall_s": sum(row["wall_s"] for row in beside) / len(beside) if beside else None,
        "waited_s": sum(row["waited_s"] for row in beside) / len(beside) if beside else None,
        "idle": summary["idle"],
    }


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    print(
        "| engine | evaluations (skipped) | seconds each (waited) | step s during | otherwise "
        "| ratio | tokens/s during | otherwise |"
    )
    print("|---" * 8 + "|")
    for engine, result in results.items():
        during, otherwise = result["during"], result["otherwise"]
        seconds = f"{result['wall_s']:.2f} ({result['waited_s']:.2f})"
        if "step_ratio" not in result:
            print(f"| {engine} | no step with or none without an evaluation |")
            continue
        print(
            f"| {engine} | {result['evaluations']} ({result['skipped']}) | {seconds} "
            f"| {during['step_s']:.2f} | {otherwise['step_s']:.2f} | {result['step_ratio']:.2f} "
            f"| {during['tokens_per_s']:.0f} | {otherwise['tokens_per_s']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the first engine, a tiny run from the base model: measures nothing",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = 2 if options.quick else EVERY_STEPS
        often = (
            f"evaluation.every_steps={every}",
            f"train.checkpoint_every_steps={every}",
            "train.keep_checkpoints=1",
        )
        size = (*QUICK, "train.num_steps=6") if options.quick else (f"train.num_steps={NUM_STEPS}",)
        model: tuple[str, ...] = ()
        if not options.quick:
            trained = train(folder / "model", "train.num_steps=20")
            model = (f"model.path={trained / 'checkpoints' / 'step_000020'}",)
        engines = ENGINES[:1] if options.quick else ENGINES
        results = {
            engine: cost(
                train(folder / engine, *STILL, *often, *size, *model, f"evaluation.engine={engine}")
            )
            for engine in engines
        }
    print_table(results)
    if options.json:
        options.json.write_text(
            json.dumps(
                {"environment": environment(), "quick": options.quick, "engines": results}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
