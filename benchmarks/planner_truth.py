"""The planner against published runs: calibrated on some rows of a table, it predicts the others.

python benchmarks/planner_truth.py [--runs FILE] [--json OUT] [--quick]

The file holds published tables by name (see `TABLES`); unknown ones are left out. At most half of
a table's rows calibrate, and no constant is fitted to a row that it predicts. What a table does not
say (response lengths, the batch of a small run) is assumed; `assumed` has it. Tables that can't be
predicted have a line that says why.

The last line is the speed of the simulator: CPU seconds for 128 GPUs and 100 steps of 512 groups of
16 rollouts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from support.output import show, write_result

from dapo_async.planner import EngineSpeed, LearnerSpeed, Lengths, Scenario, simulate

Row = dict[str, Any]
STEP_BOUND, STALENESS_BOUND = 0.15, 0.10  # relative errors that count as true
NOT_PREDICTED = {
    "areal_speedup": "one row per model: nothing in a row predicts another model",
    "nemo_rl_h100": "one synchronous row does not separate generation, training and refit",
    "verl_v1_async": "one synchronous row does not separate generation and training",
    "pipeline_rl": "a single row",
    "llama_rl": "speedups without a row to calibrate on",
}


def bisect(step_s: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The value at which the rising function `step_s` is `wanted`."""
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if step_s(middle) < wanted else (low, middle)
    return (low + high) / 2


def step_of(run: Callable[[float], Scenario], token_s: float) -> float:
    """The simulated step of the scenario with engines of `token_s` seconds per token."""
    return simulate(run(token_s)).step_s


def row(
    table: str, what: str, predicted: float, published: float, *, bound: float, **notes: str
) -> Row:
    error = predicted / published - 1
    return {
        "table": table,
        "what": what,
        "predicted": round(predicted, 3),
        "published": published,
        "error": f"{error:+.1%}",
        "within": abs(error) <= bound,
        **notes,
    }


def verl_7b(table: Mapping[str, Any]) -> Iterator[Row]:
    """Calibrated on the asynchronous row of staleness 0; predicts the one of staleness 0.5."""
    known, wanted = (
        next(row for row in table["rows"] if row["mode"] == "async" and row["staleness"] == bound)
        for bound in (0.0, 0.5)
    )
    other_s = known["step"] - known["gen"] - known["update"]  # neither wait nor update
    for mean, tail in ((2500, 0.8), (4000, 1.0), (7000, 1.0)):
        lengths = Lengths(tail=tail, mean_tokens=mean, max_tokens=28_000)
        tokens = 64 * 16 * mean

        def run(token_s: float, lengths: Lengths = lengths, tokens: int = tokens) -> Scenario:
            return Scenario(
                num_engines=2,  # an eighth of the fleet with an eighth of the batch
                engine=EngineSpeed.constant(token_s, 512),
                learner=LearnerSpeed(token_s=known["update"] / tokens, fixed_s=other_s / 4),
                lengths=lengths,
                groups_per_step=64,
                num_minibatches=4,
                max_staleness=0,
                admission="eager",
                num_steps=30,
                warm_up_steps=8,
            )

        token_s = bisect(partial(step_of, run), known["step"], 1e-4, 0.05)
        outcome = simulate(replace(run(token_s), max_staleness=1, credit_steps=1.5))
        yield row(
            "verl_fully_async_qwen2.5_math_7b",
            "step, staleness 0.5",
            outcome.step_s,
            wanted["step"],
            bound=STEP_BOUND,
            calibrated="row of staleness 0: its step and update",
            assumed=f"lengths: mean {mean}, tail {tail}",
        )


def verl_30b(table: Mapping[str, Any]) -> Iterator[Row]:
    """Calibrated on the synchronous row; predicts the asynchronous one."""
    known = next(row for row in table["rows"] if row["mode"] == "sync")
    wanted = next(row for row in table["rows"] if row["mode"] == "async")
    rollout = known["gpus"] / wanted["rollout_gpus"]
    learner = known["gpus"] / wanted["learner_gpus"]
    lengths = Lengths(tail=0.8, mean_tokens=2500, max_tokens=8192)
    tokens = 32 * 16 * 2500

    def run(token_s: float) -> Scenario:
        return Scenario(
            num_engines=4,
            engine=EngineSpeed.constant(token_s, 128),
            learner=LearnerSpeed(token_s=1e-9),
            lengths=lengths,
            groups_per_step=32,
            max_staleness=0,
            admission="eager",
            num_steps=30,
            warm_up_steps=8,
        )

    token_s = bisect(partial(step_of, run), known["gen"], 1e-4, 1.0)
    train_s = (known["update"] + known["ref"]) * learner
    outcome = simulate(
        replace(
            run(token_s * rollout),
            learner=LearnerSpeed(token_s=train_s / tokens),
            max_staleness=1,
            credit_steps=1.5,
            num_minibatches=4,
        )
    )
    yield row(
        "verl_fully_async_qwen3_30b_a3b",
        "step, 96 + 32 GPUs",
        outcome.step_s,
        wanted["step"],
        bound=STEP_BOUND,
        calibrated="synchronous row",
        assumed="training scales with its GPUs; lengths: mean 2500, tail 0.8",
    )


def areal_scaling(table: Mapping[str, Any]) -> Iterator[Row]:
    """Calibrated on the first and third size: a fixed time per step, and one that scales."""
    for each in table["rows"]:
        sizes, rates = each["gpus"], each["async"]
        (first, third), (rate, other) = (sizes[0], sizes[2]), (rates[0], rates[2])
        batch = 512 * 16 * 8.0  # thousands of tokens of a step; any number gives the same rates
        first_s, third_s = batch / rate, batch / other
        scaled = (first_s - third_s) / (1 / first - 1 / third)  # seconds × GPUs
        fixed_s = first_s - scaled / first
        for gpus, published in zip(sizes[1::2], rates[1::2], strict=True):
            outcome = simulate(
                Scenario(
                    num_engines=4,
                    engine=EngineSpeed.constant(first_s / 40_000, 256),
                    learner=LearnerSpeed(token_s=scaled / gpus / (32 * 16 * 8000), fixed_s=fixed_s),
                    lengths=Lengths(tail=0.5, mean_tokens=8000, max_tokens=27_648),
                    groups_per_step=32,
                    max_staleness=4,
                    num_steps=40,
                    warm_up_steps=12,
                )
            )
            yield row(
                "areal_scaling_ktok_s",
                f"{each['model']}, {gpus} GPUs",
                batch / outcome.step_s,
                published,
                bound=STEP_BOUND,
                calibrated=f"{first} and {third} GPUs",
                assumed="the learner is the bottleneck",
            )


def tail_of(longest: float, group_size: int) -> float:
    """The sigma at which the longest of a group is `longest` times the mean."""
    lengths = Lengths(shared=0.0, mean_tokens=1000, max_tokens=20_000)
    return bisect(
        lambda tail: replace(lengths, tail=tail).longest_of(group_size), longest, 0.0, 2.0
    )


def applied_compute(table: Mapping[str, Any]) -> Iterator[Row]:
    """Nothing is calibrated: the rows name rates and bounds, and the staleness is predicted."""
    group_size = 8
    for each in table["rows"]:
        in_flight, batch = each["C"], each["B"]
        generate_s = batch * 1000 / in_flight  # at a second per token
        groups = batch // group_size
        outcome = simulate(
            Scenario(
                num_engines=1,
                engine=EngineSpeed.constant(1.0, in_flight),
                learner=LearnerSpeed(token_s=0.0, group_s=each["rho"] * generate_s / groups),
                lengths=Lengths(
                    tail=tail_of(each["M"], group_size),
                    shared=0.0,
                    mean_tokens=1000,
                    max_tokens=20_000,
                ),
                group_size=group_size,
                groups_per_step=groups,
                max_staleness=12,
                credit_steps=each["q"] + in_flight / batch + 1,
                admission="eager",
                num_steps=200,
                warm_up_steps=30,
            )
        )
        yield row(
            "applied_compute_staleness",
            f"staleness, rho {each['rho']}, q {each['q']}",
            outcome.group_staleness,
            each["measured"],
            bound=STALENESS_BOUND,
            calibrated="nothing",
            assumed="groups of 8; a finished rollout that the queue has no place for waits",
        )


def vime(table: Mapping[str, Any]) -> Iterator[Row]:
    """Calibrated on the synchronous row, whose wait is generation."""
    known = next(row for row in table["rows"] if row["mode"] == "sync")
    wanted = next(row for row in table["rows"] if row["mode"] == "async")
    generate_s = known["step"] * known["learner_wait_share"]
    train_s = known["step"] - generate_s
    for group_size, tail in ((8, 0.5), (16, 0.8)):
        tokens = 32 * group_size * 1000

        def run(
            token_s: float, group_size: int = group_size, tail: float = tail, tokens: int = tokens
        ) -> Scenario:
            return Scenario(
                num_engines=1,
                engine=EngineSpeed.constant(token_s, 32 * group_size),
                learner=LearnerSpeed(token_s=train_s / tokens),
                lengths=Lengths(tail=tail, mean_tokens=1000, max_tokens=2048),
                group_size=group_size,
                groups_per_step=32,
                max_staleness=0,
                admission="eager",
                num_steps=60,
                warm_up_steps=10,
            )

        token_s = bisect(partial(step_of, run), known["step"], 1e-3, 0.5)
        outcome = simulate(replace(run(token_s), max_staleness=1))
        yield row(
            "vime_qwen3_4b_npu",
            "step, asynchronous",
            outcome.step_s,
            wanted["step"],
            bound=STEP_BOUND,
            calibrated="synchronous row",
            assumed=f"32 groups of {group_size}, all in flight; mean 1000, tail {tail}",
        )


TABLES: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "applied_compute_staleness": applied_compute,
    "vime_qwen3_4b_npu": vime,
    "verl_fully_async_qwen2.5_math_7b": verl_7b,
    "verl_fully_async_qwen3_30b_a3b": verl_30b,
    "areal_scaling_ktok_s": areal_scaling,
}


def speed(num_steps: int) -> Row:
    """128 GPUs, half of them engines."""
    scenario = Scenario(
        num_engines=64,
        engine=EngineSpeed(
            step_s=tuple(0.012 + 2e-5 * n for n in range(257)),
            context_s=3e-8,
            prefill_s=3e-5,
            kv_tokens=2_000_000,
            reserve_tokens=400,
        ),
        learner=LearnerSpeed(token_s=100 / (512 * 16 * 6200)),
        lengths=Lengths(tail=0.8, mean_tokens=6000, max_tokens=20_480),
        prompt_tokens=200,
        groups_per_step=512,
        max_staleness=3,
        num_steps=num_steps,
        publish_s=10,
        pause_s=5,
    )
    began_s = time.process_time()
    outcome = simulate(scenario)
    return {
        "simulated s": round(outcome.wall_s),
        "CPU s": round(time.process_time() - began_s, 2),
        "rollouts": outcome.counts.admitted * scenario.group_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, help="JSON of published tables")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one table, and few steps")
    options = parser.parse_args()
    runs = json.loads(options.runs.read_text()) if options.runs else {}
    if not runs:
        print("without --runs there are no published tables to compare with")
    names = list(TABLES)[:1] if options.quick else list(TABLES)
    rows = [each for name in names if name in runs for each in TABLES[name](runs[name])]
    if rows:
        show(rows)
    for name, why in NOT_PREDICTED.items():
        if name in runs:
            print(f"{name} is not predicted: {why}")
    fast = speed(num_steps=20 if options.quick else 100)
    show([fast])
    write_result(options.json, "planner_truth", rows=rows, speed=fast, not_predicted=NOT_PREDICTED)


if __name__ == "__main__":
    main()
