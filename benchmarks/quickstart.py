"""The quickstart on several seeds: held-out accuracy, response length, seconds and idle shares.

python benchmarks/quickstart.py [--seeds 0 1 2] [--json OUT] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
QUICK = (
    "train.num_steps=3",
    "replay.groups_per_step=4",
    "replay.group_size=8",
    "evaluation.num_prompts=64",
)


def run(seed: int, folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Trains once by the command line; returns the summary and the curves of the run.

    Raises CalledProcessError when the run fails.
    """
    run_dir = folder / f"seed_{seed}"
    command = [
        sys.executable,
        "-m",
        "dapo_async",
        "train",
        str(CONFIG),
        f"seed={seed}",
        f"run_dir={run_dir}",
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    del summary["checkpoint"], summary["seconds_by_state"]
    curve = ("step", "time_s", "accuracy", "response_tokens", "entropy", "staleness")
    return {
        **summary,
        "mixed_versions": max(step["mixed_versions"] for step in steps),
        "curve": [{name: step[name] for name in curve} for step in steps],
    }


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def print_table(runs: list[dict[str, Any]]) -> None:
    columns = (
        "seed",
        "held-out accuracy",
        "response length",
        "steps",
        "training s",
        "wall s",
        "idle learner",
        "idle rollout",
        "staleness",
    )
    print(f"| {' | '.join((*columns, 'rejected all correct', 'evicted'))} |")
    print("|---" * (len(columns) + 2) + "|")
    for each in runs:
        cells = (
            str(each["seed"]),
            f"{each['initial_accuracy']:.3f} → {each['final_accuracy']:.3f}",
            f"{each['initial_response_tokens']:.1f} → {each['final_response_tokens']:.1f}",
            str(each["steps"]),
            f"{each['train_s']:.1f}",
            f"{each['wall_s']:.1f}",
            f"{each['idle']['learner']:.0%}",
            f"{each['idle']['rollout']:.0%}",
            f"{each['staleness']['mean']:.2f} (max {each['staleness']['max']})",
            str(each["groups"]["rejected"]["all_correct"]),
            str(each["groups"]["evicted"]),
        )
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one tiny run: checks that the benchmark works, measures nothing",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = options.seeds[:1] if options.quick else options.seeds
        runs = [run(seed, Path(folder), QUICK if options.quick else ()) for seed in seeds]
    print_table(runs)
    if options.json:
        options.json.write_text(
            json.dumps(
                {"environment": environment(), "quick": options.quick, "runs": runs}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
