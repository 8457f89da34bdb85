"""How many slots are occupied, and which staleness bound feeds the engines, in virtual time.

python benchmarks/slots.py [--json OUT] [--quick]

Buffer, pacer and the rule of the workers are the real ones; engines and learner are delays.
Response lengths are lognormal (sigma `tail`), and half of the variance is common to a group. The
same command always gives the same numbers.

`occupancy`: one engine of 128 slots, 256 sequences per step, a learner that takes no time. `before`
asks by whole groups, as the worker did before `SlotDemand`.

`decode`: a real worker on the native engine, 128 slots, both rules in alternation. Responses end
at any token with the same probability. Not deterministic.

`recipes`: the shape of each GPU recipe with a tail of 1 and a mean length of a quarter of the
longest. The learner consumes exactly what full slots produce, the hardest case. The rate is over
that of full slots: the lower one of two acceptances. Fleets of more than four engines are scaled
down with their batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine import SHAPE, hardware
from support.refilled_engine import decode
from support.simulated_run import UNLIMITED, Shape, both_rules, simulate
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async.bench.about import commit
from dapo_async.config import Config, load
from dapo_async.planner import Lengths

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = (
    "gsm8k_0.5b_1gpu",
    "gsm8k_1.5b_2gpu",
    "dapo_qwen2.5_1.5b",
    "dapo_qwen2.5_7b_math",
    "dapo_qwen2.5_32b",
)
TAIL, MEAN, ACCEPTANCES = 1.0, 4, (1.0, 0.6)
ENOUGH, HIGHEST, MOST_WORKERS = 0.95, 8, 4
Row = dict[str, Any]


def occupancies(*, quick: bool) -> Iterator[Row]:
    """Both rules for each group size, tail and staleness bound."""
    for group_size in (8, 16):
        for tail in (0.0, 1.0, 1.5):
            for bound in (UNLIMITED, 1, 2, 4):
                before, after = both_rules(
                    group_size, tail=tail, max_staleness=bound, num_steps=20 if quick else 100
                )
                yield {
                    "group_size": group_size,
                    "tail": tail,
                    "max_staleness": None if bound == UNLIMITED else bound,
                    "before": round(before.occupancy, 3),
                    "after": round(after.occupancy, 3),
                }


def shape_of(config: Config, *, max_staleness: int) -> Shape:
    """The shape of a recipe; workers and batch are halved until at most four workers are left."""
    rollout, replay, factor = config.rollout, config.replay, 1
    while rollout.num_workers // factor > MOST_WORKERS:
        factor *= 2
    return Shape(
        num_workers=rollout.num_workers // factor,
        num_slots=rollout.fixed_slots,
        group_size=replay.group_size,
        groups_per_step=replay.groups_per_step // factor,
        max_staleness=max_staleness,
        lengths=Lengths(
            tail=TAIL,
            mean_tokens=rollout.max_response_tokens // MEAN,
            max_tokens=rollout.max_response_tokens,
        ),
        num_steps=40,
    )


def recipe(name: str) -> Iterator[Row]:
    """The rate by staleness bound, up to the first one that is enough."""
    config = load(CONFIGS / f"{name}.yaml", [])
    for bound in range(1, HIGHEST + 1):
        rates = {}
        for rule, by_siblings in (("before", False), ("after", True)):
            outcomes = [
                simulate(
                    replace(
                        shape_of(config, max_staleness=bound),
                        acceptance=acceptance,
                        by_siblings=by_siblings,
                    )
                )
                for acceptance in ACCEPTANCES
            ]
            rates[rule] = round(min(outcome.rate for outcome in outcomes), 3)
        yield {"recipe": name, "max_staleness": bound, **rates}
        if rates["after"] >= ENOUGH:
            return


def decoding(*, quick: bool) -> Iterator[Row]:
    """Medians of alternated rounds, and the ratio of the two rules in each round."""
    rounds, warm_up_s, seconds = (1, 0.5, 1.0) if quick else (3, 4.0, 8.0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE)).save_pretrained(folder)
        for group_size, credits in ((8, 10_000), (16, 10_000), (8, 32)):
            runs: list[list[dict[str, float]]] = [[], []]
            for _ in range(rounds):
                for by_siblings in (False, True):
                    measured = decode(
                        Path(folder),
                        num_slots=128,
                        group_size=group_size,
                        credits=credits,
                        by_siblings=by_siblings,
                        warm_up_s=warm_up_s,
                        seconds=seconds,
                    )
                    runs[by_siblings].append(asyncio.run(measured))
            row: Row = {"group_size": group_size, "credits": credits, "rounds": rounds}
            for name in ("occupancy", "tokens_per_s", "tokens_per_cpu_s"):
                before, after = ([run[name] for run in rule] for rule in runs)
                # No token at all, in the short window of a quick run on a busy machine: no ratio.
                ratios = [
                    new / old if old else math.nan for old, new in zip(before, after, strict=True)
                ]
                row[name] = {
                    "before": round(statistics.median(before), 3),
                    "after": round(statistics.median(after), 3),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                }
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument("--quick", action="store_true", help="short runs and two recipes")
    options = parser.parse_args()
    print(f"{'G':>3} {'tail':>5} {'S':>5} {'before':>7} {'after':>7}   occupied slots")
    occupied = []
    for row in occupancies(quick=options.quick):
        occupied.append(row)
        bound = "-" if row["max_staleness"] is None else row["max_staleness"]
        print(
            f"{row['group_size']:>3} {row['tail']:>5} {bound:>5} "
            f"{row['before']:>7} {row['after']:>7}",
            flush=True,
        )
    decoded = []
    for row in decoding(quick=options.quick):
        decoded.append(row)
        print(f"groups of {row['group_size']}, {row['credits']} credits, native engine:")
        for name in ("occupancy", "tokens_per_s", "tokens_per_cpu_s"):
            both = row[name]
            print(
                f"  {name:<17}{both['before']:>12} {both['after']:>12} {both['ratio']:>7}",
                flush=True,
            )
    print(f"{'recipe':<22} {'S':>3} {'before':>7} {'after':>7}   rate")
    rates = []
    for name in RECIPES[:1] if options.quick else RECIPES:
        for row in recipe(name):
            rates.append(row)
            print(
                f"{name:<22} {row['max_staleness']:>3} {row['before']:>7} {row['after']:>7}",
                flush=True,
            )
    if options.json:
        report = {
            "benchmark": "slots",
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "occupancy": occupied,
            "decode": decoded,
            "recipes": rates,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
