"""The planner against published runs: calibrated on some rows of a table, it predicts the others.

python benchmarks/planner_truth.py [--runs FILE] [--json OUT] [--quick]

The file holds published tables by name (see `TABLES`); unknown ones are left out. At most half of
a table's rows calibrate, and no constant is fitted to a row that it predicts. What a table does not
say (response lengths, the batch of a small run) is assumed; `assumed` has it. Tables that can't be
predicted have a line that says why. So has a table without its calibrating rows.

`--draw` only draws the figures of `results/`: these, and those of `planner_own_runs.py`.

The last line is the speed of the simulator: CPU seconds for 128 GPUs and 100 steps of 512 groups of
16 rollouts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from support.output import show, write_result

from dapo_async.planner import EngineSpeed, LearnerSpeed, Lengths, Scenario, simulate
from dapo_async.planner.cost_model import Efficiency, Training, engine_speed, learner_speed
from dapo_async.planner.hardware import find_gpu
from dapo_async.planner.planned_model import model_of
from dapo_async.planner.rates import between_points
from dapo_async.planner.settings import KEYS

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
STEP_BOUND, STALENESS_BOUND = 0.15, 0.10  # relative errors that count as true
REPEATS = 3  # of the simulation whose speed is told
NOT_PREDICTED = {
    "areal_speedup": "one row per model: nothing in a row predicts another model",
    "nemo_rl_h100": "one synchronous row does not separate generation, training and refit",
    "verl_v1_async": "one synchronous row does not separate generation and training",
    "pipeline_rl": "a single row",
    "llama_rl": "speedups without a row to calibrate on",
    "weight_sync": "each row has another number of GPUs on both sides",
    "learner_one_gpu": "MFU falls from 0.27 to 0.11 with the context: two rows, two constants",
}
QWEN_7B: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "tie_word_embeddings": False,
}
QWEN3_4B: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "tie_word_embeddings": True,
}
QWEN3_30B: Mapping[str, Any] = {
    **QWEN3_4B,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
# Layers, and GB in bfloat16.
SYNC_SIZES: Mapping[str, tuple[int, float]] = {
    "7B": (28, 15.2),
    "32B": (64, 65.5),
    "72B": (80, 145.4),
    "30B-A3B": (48, 61.1),
    "235B": (94, 470.0),
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
    """Calibrated on the asynchronous row of staleness 0; predicts the other asynchronous ones.

    The decode step is that of the cost model on H20, whose few FLOPs limit large batches. The mean
    length is what makes the calibrating row take its time.
    """
    rows = [row for row in table["rows"] if row["mode"] == "async"]
    known = next(row for row in rows if row["staleness"] == 0.0)
    other_s = known["step"] - known["gen"] - known["update"]  # neither wait nor update
    engine = engine_speed(
        model_of(QWEN_7B), find_gpu("H20"), gpus=4, slots=512, efficiency=Efficiency()
    )
    for tail in (0.8, 1.0):

        def run(mean: float, tail: float = tail) -> Scenario:
            tokens = 64 * 16 * (mean + 150)
            return Scenario(
                num_engines=2,  # an eighth of the fleet with an eighth of the batch
                engine=engine,
                learner=LearnerSpeed(token_s=known["update"] / tokens, fixed_s=other_s / 4),
                lengths=Lengths(tail=tail, mean_tokens=mean, max_tokens=28_000),
                prompt_tokens=150,
                groups_per_step=64,
                num_minibatches=4,
                max_staleness=0,
                admission="eager",
                num_steps=24,
                warm_up_steps=6,
            )

        mean = bisect(partial(step_of, run), known["step"], 500, 8000)
        for wanted in rows:
            if wanted is known:
                continue
            outcome = simulate(
                replace(run(mean), max_staleness=4, credit_steps=1 + wanted["staleness"])
            )
            yield row(
                "verl_fully_async_qwen2.5_math_7b",
                f"step, staleness {wanted['staleness']}",
                outcome.step_s,
                wanted["step"],
                bound=STEP_BOUND,
                calibrated="row of staleness 0: its step and update",
                assumed=f"decode steps of the cost model; tail {tail}; no deadlines",
            )


def verl_30b(table: Mapping[str, Any]) -> Iterator[Row]:
    """Calibrated on the synchronous row; predicts the asynchronous ones.

    Decode steps are those of the cost model times what makes the calibrating row take its time. The
    learner's time falls with (GPUs)^0.75, the planner's default: AReaL's tables have 0.73 and 0.77.
    """
    known = next(row for row in table["rows"] if row["mode"] == "sync")
    engine = engine_speed(
        model_of(QWEN3_30B), find_gpu("H20"), gpus=4, slots=512, efficiency=Efficiency()
    )
    for mean, tail in ((1500, 0.8), (2500, 0.8)):

        def run(factor: float, mean: int = mean, tail: float = tail) -> Scenario:
            return Scenario(
                num_engines=known["gpus"] // 4 // 8,  # an eighth of the fleet and of the batch
                engine=replace(
                    engine,
                    step_s=tuple(factor * seconds for seconds in engine.step_s),
                    context_s=factor * engine.context_s,
                ),
                learner=LearnerSpeed(token_s=0.0),
                lengths=Lengths(tail=tail, mean_tokens=mean, max_tokens=8192),
                prompt_tokens=150,
                groups_per_step=64,
                max_staleness=0,
                admission="eager",
                num_steps=24,
                warm_up_steps=6,
            )

        factor = bisect(partial(step_of, run), known["gen"], 0.5, 20)
        for wanted in table["rows"]:
            if wanted["mode"] != "async":
                continue
            learner = (known["gpus"] / wanted["learner_gpus"]) ** KEYS["learner"]["scaling"]
            train_s = (known["update"] + known.get("ref", 0.0)) * learner
            outcome = simulate(
                replace(
                    run(factor),
                    num_engines=wanted["rollout_gpus"] // 4 // 8,
                    learner=LearnerSpeed(token_s=train_s / (64 * 16 * (mean + 150))),
                    max_staleness=4,
                    credit_steps=1 + wanted.get("staleness", 0.5),
                    num_minibatches=4,
                )
            )
            yield row(
                "verl_fully_async_qwen3_30b_a3b",
                f"step, {wanted['rollout_gpus']} + {wanted['learner_gpus']} GPUs",
                outcome.step_s,
                wanted["step"],
                bound=STEP_BOUND,
                calibrated="synchronous row",
                assumed=f"mean {mean}, tail {tail}; training by GPUs^0.75",
            )


def areal_scaling(table: Mapping[str, Any]) -> Iterator[Row]:
    """Calibrated on the smallest and the largest size; predicts the sizes between them.

    Two measured numbers of GPUs give a part of the step that falls with them and a part that does
    not, as in a plan with `learner.token_s` by GPUs. Both modes are one learner-bound run here, and
    their ratio is the speedup.
    """
    for each in table["rows"]:
        sizes = each["gpus"]
        predicted: dict[tuple[str, int], float] = {}
        for mode in ("async", "sync_verl"):
            seconds = {gpus: 1 / rate for gpus, rate in zip(sizes, each[mode], strict=True)}
            ends = {gpus: seconds[gpus] for gpus in (sizes[0], sizes[-1])}
            for gpus in sizes[1:-1]:
                predicted[mode, gpus] = _rate(between_points(ends, gpus))
                yield row(
                    "areal_scaling_ktok_s",
                    f"{each['model']}, {gpus} GPUs, {mode}",
                    predicted[mode, gpus],
                    1 / seconds[gpus],
                    bound=STEP_BOUND,
                    calibrated=f"{sizes[0]} and {sizes[-1]} GPUs",
                    assumed="a part of the step falls with the GPUs",
                )
        for gpus in sizes[1:-1]:
            place = sizes.index(gpus)
            yield row(
                "areal_scaling_ktok_s",
                f"{each['model']}, {gpus} GPUs, speedup",
                predicted["async", gpus] / predicted["sync_verl", gpus],
                each["async"][place] / each["sync_verl"][place],
                bound=STEP_BOUND,
                calibrated=f"{sizes[0]} and {sizes[-1]} GPUs",
                assumed="as above",
            )


def _rate(seconds: float) -> float:
    """Thousands of tokens per second of a simulated run whose learner needs `seconds` for them."""
    tokens = 32 * 16 * 8.0  # thousands, of a step
    outcome = simulate(
        Scenario(
            num_engines=4,
            engine=EngineSpeed.constant(seconds / 40, 256),
            learner=LearnerSpeed(token_s=seconds / 1000),
            lengths=Lengths(tail=0.5, mean_tokens=8000, max_tokens=27_648),
            groups_per_step=32,
            max_staleness=4,
            num_steps=40,
            warm_up_steps=12,
        )
    )
    return tokens / outcome.step_s


def learner_rates(table: Mapping[str, Any]) -> Iterator[Row]:
    """Calibrated on Qwen3-4B on 8 H100: its MFU by our count; predicts H200."""
    known, wanted = table["Qwen3-4B_8xH100"], table["Qwen3-4B_8xH200"]
    work = Training(
        prompt_tokens=0,
        response_tokens=65_536,
        longest_tokens=65_536,
        group_size=1,
        groups=8,
        microbatch_tokens=65_536,
        recompute="none",  # an MFU counts nothing twice
        zero_stage=3,
    )

    def rate(gpu: str, mfu: float) -> float:
        speed = learner_speed(
            model_of(QWEN3_4B), find_gpu(gpu), work, gpus=8, efficiency=Efficiency(mfu=mfu)
        )
        return 1 / speed.token_s

    mfu = 0.3 * known["tok_s"] / rate("H100", 0.3)
    yield row(
        "learner_mfu",
        "Qwen3-4B, 8 H200, tokens/s",
        rate("H200", mfu),
        wanted["tok_s"],
        bound=STEP_BOUND,
        calibrated="8 H100",
        assumed=f"the same MFU ({mfu:.3f} by our count of FLOPs)",
    )


def weight_sync(table: Mapping[str, Any]) -> Iterator[Row]:
    """Full synchronisation. Dense: calibrated on the smallest and the largest model; a time per
    layer and one per byte. Mixtures: on the smallest one; a time per byte.
    """
    full = {row["model"]: _middle(row["full"]) for row in table["rows"]}
    dense = [name for name in SYNC_SIZES if name in full and "A3B" not in name and name != "235B"]
    first, last = dense[0], dense[-1]
    (layers, size), (more_layers, larger) = SYNC_SIZES[first], SYNC_SIZES[last]
    byte_s = (full[last] * layers - full[first] * more_layers) / (
        larger * layers - size * more_layers
    )
    layer_s = (full[first] - byte_s * size) / layers
    predicted = {
        name: (
            layer_s * SYNC_SIZES[name][0] + byte_s * SYNC_SIZES[name][1],
            f"{first} and {last}",
            "seconds per layer and per byte",
        )
        for name in dense[1:-1]
    }
    if "30B-A3B" in full and "235B" in full:
        ratio = SYNC_SIZES["235B"][1] / SYNC_SIZES["30B-A3B"][1]
        predicted["235B"] = full["30B-A3B"] * ratio, "30B-A3B", "seconds per byte"
    for name, (seconds, calibrated, assumed) in predicted.items():
        yield row(
            "verl_delta_weight_sync",
            f"full synchronisation, {name}",
            seconds,
            full[name],
            bound=STEP_BOUND,
            calibrated=calibrated,
            assumed=assumed,
        )


def _middle(value: Any) -> float:
    """Of a number or of a range."""
    return float(sum(value) / len(value) if isinstance(value, list) else value)


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
    "learner_mfu": learner_rates,
    "verl_delta_weight_sync": weight_sync,
}


def predict(name: str, table: Mapping[str, Any]) -> list[Row]:
    """The rows of a table; none, with a line, if it lacks what calibrates."""
    try:
        return list(TABLES[name](table))
    except (LookupError, RuntimeError, ArithmeticError, ValueError) as error:
        what = error.__cause__ or error
        print(f"{name} is not predicted: it lacks the calibrating rows ({what!r})")
        return []


def orders(rows: Sequence[Row]) -> Iterator[str]:
    """Per table whether its predicted rows have the order of the published ones."""
    for table in dict.fromkeys(row["table"] for row in rows):
        pairs = [
            (row["published"], row["predicted"])
            for row in rows
            if row["table"] == table and "speedup" not in row["what"]
        ]
        pairs = [pairs[0], *(each for each in pairs[1:] if each[0] != pairs[0][0])]
        if len(pairs) > 1:
            right = sorted(pairs) == sorted(pairs, key=lambda each: each[1])
            yield f"{table}: the order of the rows is {'right' if right else 'wrong'}"


def speed(num_steps: int) -> Row:
    """128 GPUs, half of them engines; the median of `REPEATS` runs."""
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
    seconds = []
    for _ in range(REPEATS):
        began_s = time.process_time()
        outcome = simulate(scenario)
        seconds.append(round(time.process_time() - began_s, 2))
    return {
        "simulated s": round(outcome.wall_s),
        "CPU s": statistics.median(seconds),
        "CPU s of each": seconds,
        "rollouts": outcome.counts.admitted * scenario.group_size,
    }


def draw(path: Path) -> None:
    """Predicted over published, and over measured by our own runs: each point beside 1."""
    truth = json.loads((RESULTS / "planner_truth.json").read_text())["rows"]
    own = json.loads((RESULTS / "planner_own_runs.json").read_text())["cases"]
    names = ("step_s", "generated_tokens_per_s", "staleness")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in truth:
        points.setdefault(row["table"].replace("_", " "), []).append(
            (row["published"], row["predicted"])
        )
    for name in names:
        points[f"own runs: {name}"] = [
            (case[f"{name} measured"], case[f"{name} predicted"]) for case in own
        ]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(points) + 1.4))
    for place, (name, pairs) in enumerate(points.items()):
        is_staleness = "staleness" in name
        bound = STALENESS_BOUND if is_staleness or name.startswith("own") else STEP_BOUND
        axes.barh(place, 2 * bound, left=1 - bound, height=0.8, color="#e8e8e8")
        ratios = [predicted / published for published, predicted in pairs]
        colour = "#55a868" if name.startswith("own") else "#4c72b0"
        axes.plot(ratios, [place] * len(ratios), "o", color=colour, alpha=0.7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
    axes.set_xlabel("predicted / published, or measured; grey: the bound of the error")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, help="JSON of published tables")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one table, and few steps")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="draw recorded figures")
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.draw)
        return
    runs = json.loads(options.runs.read_text()) if options.runs else {}
    if not runs:
        print("without --runs there are no published tables to compare with")
    names = list(TABLES)[:1] if options.quick else list(TABLES)
    rows = [each for name in names if name in runs for each in predict(name, runs[name])]
    if rows:
        show(rows)
    for line in orders(rows):
        print(line)
    for name, why in NOT_PREDICTED.items():
        if name in runs:
            print(f"{name} is not predicted: {why}")
    fast = speed(num_steps=20 if options.quick else 100)
    show([fast])
    write_result(options.json, "planner_truth", rows=rows, speed=fast, not_predicted=NOT_PREDICTED)


if __name__ == "__main__":
    main()
