"""What a checkpoint and a publish cost a step.

One run of the quickstart that saves every other step; copying and writing of larger models.

python benchmarks/costs.py [--json OUT] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from quickstart import CONFIG, QUICK, environment

from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank, save_state
from dapo_async.model import Decoder, Mesh, ModelConfig, checksum, take_snapshot

EVERY_STEPS = 2
SHAPES = {"5 M": (256, 6, 4096), "50 M": (640, 9, 8192)}  # hidden size, layers, vocabulary


def of_a_run(folder: Path, overrides: tuple[str, ...]) -> dict[str, float]:
    """Means over the steps of one run, in seconds."""
    run_dir = folder / "run"
    command = [
        sys.executable,
        "-m",
        "dapo_async",
        "train",
        str(CONFIG),
        f"run_dir={run_dir}",
        f"train.checkpoint_every_steps={EVERY_STEPS}",
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    summary = json.loads((run_dir / "summary.json").read_text())
    states = summary["seconds_by_state"]["learner"]
    return {
        "step_s": fmean(row["step_s"] for row in rows),
        "checkpoint_pause_s": summary["checkpoints"]["pause_s"],
        "checkpoint_write_s": summary["checkpoints"]["write_s"],
        "checkpoints": summary["checkpoints"]["saved"],
        "checkpoints_skipped": summary["checkpoints"]["skipped"],
        "publish_snapshot_s": states["snapshot"] / (summary["steps"] + 1),
        "publish_engine_pause_s": fmean(row["publish_pause_s"] for row in rows),
    }


def of_a_model(shape: tuple[int, int, int], folder: Path) -> dict[str, float]:
    """Seconds of one rank in this process.

    Times the copies on the step path, the files beside it, and one copy of the weights to compare.
    """
    hidden, layers, vocabulary = shape
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        }
    )
    rank = LearnerRank(Decoder(config), algorithm=AlgorithmConfig(), learner=LearnerConfig())
    for parameter in rank.decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    rank._optimizer.step(lr=1e-6)  # so that there are moments to save
    times: dict[str, float] = {
        "parameters": sum(parameter.numel() for parameter in rank.decoder.parameters())
    }

    def timed(name: str, work: Any) -> Any:
        began_s = time.perf_counter()
        result = work()
        times[name] = time.perf_counter() - began_s
        return result

    timed(
        "warm_up_s", lambda: [parameter.detach().clone() for parameter in rank.decoder.parameters()]
    )
    timed(
        "copy_of_weights_s",
        lambda: [parameter.detach().clone() for parameter in rank.decoder.parameters()],
    )
    state = timed("checkpoint_pause_s", rank.capture_state)
    timed("checkpoint_write_s", lambda: save_state(state, folder / "learner", Mesh()))
    snapshot = timed(
        "publish_snapshot_s", lambda: take_snapshot(rank.decoder, version=1, probe_tokens=16)
    )
    timed("publish_checksum_s", lambda: checksum(snapshot.weights))
    del times["warm_up_s"]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny run: shows that the benchmark works, without meaningful numbers",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = of_a_run(Path(folder), QUICK if options.quick else ())
        models = (
            {}
            if options.quick
            else {name: of_a_model(shape, Path(folder)) for name, shape in SHAPES.items()}
        )
    print("| what | ms | of a step |\n|---|---|---|")
    for name in (
        "step_s",
        "checkpoint_pause_s",
        "checkpoint_write_s",
        "publish_snapshot_s",
        "publish_engine_pause_s",
    ):
        print(
            f"| {name.removesuffix('_s')} | {1000 * run[name]:.1f} "
            f"| {run[name] / run['step_s']:.1%} |"
        )
    for name, times in models.items():
        copy = times["copy_of_weights_s"]
        cells = ", ".join(
            f"{what.removesuffix('_s')} {1000 * value:.0f} ms ({value / copy:.1f} x)"
            for what, value in times.items()
            if what != "parameters"
        )
        print(f"{name} parameters, in copies of the weights: {cells}")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "environment": environment(),
                    "quick": options.quick,
                    "run": run,
                    "models": models,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
