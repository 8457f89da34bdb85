"""What a checkpoint and a publish cost a step.

One run of the quickstart that saves every other step; copying and writing of larger models, on one
rank and on several.

With `--recorded RUN_DIR`, a run with `train.record=true`: its learner alone trains on its batches
again, and the share of the weights is counted that each publish changes in bfloat16.

python benchmarks/costs.py [--json OUT] [--quick] [--recorded RUN_DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from quickstart import CONFIG, QUICK, environment
from support.publish_ranks import publish_of_ranks
from torch import Tensor

from dapo_async.config import AlgorithmConfig, LearnerConfig, load
from dapo_async.learner import LearnerRank, save_state
from dapo_async.learner.rerun import recorded_steps
from dapo_async.model import Decoder, Mesh, ModelConfig, load_decoder, score_tokens, take_snapshot
from dapo_async.replay.group_io import read_groups

EVERY_STEPS = 2
RATES = (1e-4, 1e-5, 1e-6)  # the last one is that of the DAPO paper
BLOCK = 64  # weights: 128 bytes
PROBE_TOKENS = 16
QUICK_SHAPES = {"tiny": (64, 2, 512)}
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


def model(shape: tuple[int, int, int]) -> dict[str, Any]:
    """A Hugging Face config."""
    hidden, layers, vocabulary = shape
    return {
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


def of_a_model(shape: tuple[int, int, int], folder: Path) -> dict[str, float]:
    """Seconds of one rank in this process.

    Times the copies on the step path, the files beside it, and one copy of the weights to compare.
    """
    config = ModelConfig.from_dict(model(shape))
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
    before = take_snapshot(rank.decoder, version=0, probe_tokens=PROBE_TOKENS)
    snapshot = timed(
        "publish_snapshot_s",
        lambda: take_snapshot(rank.decoder, version=1, probe_tokens=PROBE_TOKENS, over=before.copy),
    )
    timed("publish_probe_s", lambda: score_tokens(rank.decoder, snapshot.probe_ids))
    timed("publish_checksum_s", snapshot.copy.checksum)
    del times["warm_up_s"]
    return times


def changed_shares(run_dir: Path, *, lr: float | None) -> dict[str, float]:
    """What a publish in bfloat16 would change, over the steps of a recorded run.

    `lr`: another learning rate, constant from the first step on; None: that of the run.
    """
    config = load(run_dir / "config.yaml", files=False)
    learner = config.learner
    if lr is not None:
        learner = replace(learner, lr=lr, warmup_steps=0)
    decoder = load_decoder(CONFIG.parent / "base" / "quickstart")
    rank = LearnerRank(decoder, algorithm=config.algorithm, learner=learner)
    size = config.replay.groups_per_step // learner.num_minibatches
    steps = recorded_steps(run_dir / "recorded")
    elements, blocks = [], []
    before = rounded(rank)
    for step in steps:
        groups = read_groups(run_dir / "recorded" / f"step_{step:06d}.safetensors")
        rank.step(groups, groups_per_minibatch=size)
        after = rounded(rank)
        changed = before != after
        elements.append(changed.float().mean().item())
        whole = len(changed) // BLOCK * BLOCK
        blocks.append(changed[:whole].view(-1, BLOCK).any(1).float().mean().item())
        before = after
    late = slice(len(steps) // 2, None)
    return {
        "lr": learner.lr,
        "steps": len(steps),
        "changed_share": fmean(elements),
        "changed_share_late": fmean(elements[late]),
        "changed_blocks_share": fmean(blocks),
    }


def rounded(rank: LearnerRank) -> Tensor:
    """All weights in bfloat16, one after the other."""
    parts = [each.detach().bfloat16().flatten() for each in rank.decoder.parameters()]
    return torch.cat(parts)


def print_changed(run_dir: Path) -> list[dict[str, float]]:
    """A table of `changed_shares` by learning rate."""
    rows = [changed_shares(run_dir, lr=lr) for lr in (None, *RATES)]
    print("| lr | changed weights | in the second half | changed blocks of 64 |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['lr']:g} | {row['changed_share']:.1%} | {row['changed_share_late']:.1%} "
            f"| {row['changed_blocks_share']:.1%} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny run: shows that the benchmark works, without meaningful numbers",
    )
    parser.add_argument("--recorded", type=Path, metavar="RUN_DIR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.recorded:
        rows = print_changed(options.recorded)
        if options.json:
            options.json.write_text(json.dumps({"changed": rows}, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        run = of_a_run(Path(folder), QUICK if options.quick else ())
        models = (
            {}
            if options.quick
            else {name: of_a_model(shape, Path(folder)) for name, shape in SHAPES.items()}
        )
    ranks = {
        name: publish_of_ranks(
            model(shape), dp=2, tp=2, num_engines=2, rounds=1 if options.quick else 9
        )
        for name, shape in (QUICK_SHAPES if options.quick else SHAPES).items()
    }
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
    for name, times in ranks.items():
        cells = ", ".join(
            f"{what.removesuffix('_s')} {1000 * value:.1f} ms"
            for what, value in times.items()
            if what.endswith("_s")
        )
        print(
            f"{name} parameters, 2 x 2 ranks and two engines: {cells}; the standstill of the "
            f"learner is {times['standstill_over_copy']:.2f} copies of a shard"
        )
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "environment": environment(),
                    "quick": options.quick,
                    "run": run,
                    "models": models,
                    "ranks": ranks,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
