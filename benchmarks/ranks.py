"""The learner's step on several ranks of this machine against one: what a layout costs and saves.

gloo, one thread per rank, the same rollouts for all. A speedup is the time of one process divided
by that of the ranks, as the median of the ratios of the rounds; for two ranks it is at most 2.
Memory is the storage of weights, gradients and moments of one rank.

The ZeRO stages are compared on two data-parallel ranks in passes of at most 512 tokens. A ratio is
the time with stage 3 divided by that with another stage.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from engine import hardware
from learner import SHAPES, rollouts

from dapo_async.bench.about import commit
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.model import (
    Mesh,
    ModelConfig,
    build_decoder,
    build_mesh,
    join_store,
    open_store,
    shard_of,
)

HOST, TIMEOUT_S = "127.0.0.1", 300.0
LAYOUTS = ((1, 1), (1, 2), (2, 1))  # dp, tp
STAGES = (3, 2, 1)
SMALL_PASSES = 512  # tokens


def rank_process(
    pipe: Connection,
    shape: dict[str, Any],
    num_groups: int,
    dp: int,
    tp: int,
    number: int,
    knobs: LearnerConfig,
) -> None:
    """Answers each message with the seconds of one step.

    Before that the first rank sends the port of its rendezvous, the other ranks receive it, and
    each rank sends its bytes of state.
    """
    torch.set_num_threads(1)
    mesh = Mesh()
    if dp * tp > 1:
        store = (
            open_store(HOST, timeout_s=TIMEOUT_S)
            if number == 0
            else join_store((HOST, pipe.recv()), timeout_s=TIMEOUT_S)
        )
        if number == 0:
            pipe.send(store.port)
        mesh = build_mesh(
            store,
            rank=number,
            dp=dp,
            tp=tp,
            host=HOST,
            device=torch.device("cpu"),
            timeout_s=TIMEOUT_S,
        )
    decoder = build_decoder(
        ModelConfig.from_dict({"model_type": "qwen2", "rms_norm_eps": 1e-6, **shape}), mesh=mesh
    )
    for parameter in map(shard_of, decoder.parameters()):
        parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    rank = LearnerRank(
        decoder, algorithm=AlgorithmConfig(proximal="current"), learner=knobs, mesh=mesh
    )
    groups = rollouts(num_groups, even=False)
    rank.step(groups)
    moments = sum(tensor.nbytes for *_, tensor in rank._optimizer.moments())
    pipe.send(2 * sum(shard_of(each).nbytes for each in decoder.parameters()) + moments)
    while pipe.recv():
        began_s = time.perf_counter()
        rank.step(groups)
        pipe.send(time.perf_counter() - began_s)


class Layout:
    """The processes of one layout, which wait for their next step."""

    def __init__(
        self, shape: dict[str, Any], num_groups: int, dp: int, tp: int, **knobs: Any
    ) -> None:
        learner = LearnerConfig(lr=1e-5, warmup_steps=0, **knobs)
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for number in range(dp * tp):
            ours, theirs = context.Pipe()
            context.Process(
                target=rank_process,
                args=(theirs, shape, num_groups, dp, tp, number, learner),
                daemon=True,
            ).start()
            self.pipes.append(ours)
        if dp * tp > 1:
            port = self.pipes[0].recv()
            for pipe in self.pipes[1:]:
                pipe.send(port)
        self.state_bytes = max(pipe.recv() for pipe in self.pipes)

    def step(self) -> float:
        for pipe in self.pipes:
            pipe.send(True)
        return max(float(pipe.recv()) for pipe in self.pipes)

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(False)


def measured(name: str, *, rounds: int) -> dict[str, Any]:
    shape, num_groups = SHAPES[name]
    num_groups = max(2, num_groups)
    layouts = {
        f"dp {dp} x tp {tp}": Layout(shape, num_groups, dp, tp, microbatch_tokens=4096)
        for dp, tp in LAYOUTS
    }
    taken = [{key: layout.step() for key, layout in layouts.items()} for _ in range(rounds + 1)][1:]
    for layout in layouts.values():
        layout.stop()
    alone = next(iter(layouts))
    return {
        key: {
            "ms": round(1000 * statistics.median(row[key] for row in taken), 1),
            "speedup": round(statistics.median(row[alone] / row[key] for row in taken), 2),
            "state_mb_per_rank": round(layout.state_bytes / 1e6, 1),
        }
        for key, layout in layouts.items()
    }


def stages(name: str, *, rounds: int) -> dict[str, Any]:
    """The step with each ZeRO stage, on two data-parallel ranks, in many passes."""
    shape, num_groups = SHAPES[name]
    num_groups = max(2, num_groups)
    layouts = {
        stage: Layout(shape, num_groups, 2, 1, microbatch_tokens=SMALL_PASSES, zero_stage=stage)
        for stage in STAGES
    }
    taken = [
        {stage: layout.step() for stage, layout in layouts.items()} for _ in range(rounds + 1)
    ][1:]
    for layout in layouts.values():
        layout.stop()
    return {
        f"stage {stage}": {
            "ms": round(1000 * statistics.median(row[stage] for row in taken), 1),
            "ratio": round(statistics.median(row[STAGES[0]] / row[stage] for row in taken), 2),
        }
        for stage in STAGES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument("--quick", action="store_true", help="the small model once, no stages")
    options = parser.parse_args()
    names = list(SHAPES)[:1] if options.quick else list(SHAPES)
    steps = {name: measured(name, rounds=1 if options.quick else 7) for name in names}
    zero = {} if options.quick else {name: stages(name, rounds=7) for name in names}
    report = {
        "benchmark": "ranks",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "steps": steps,
        "zero_stages": zero,
    }
    print(json.dumps({"steps": steps, "zero_stages": zero}, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
