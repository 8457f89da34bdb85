"""What binds at 1,000 and 10,000 GPUs, by simulation: `docs/scale.md` has the table.

python benchmarks/planner_scale.py [--json OUT] [--quick] [--cases NAME …] [--draw OUT.png]

A 32B model on H100, engines of 4 GPUs, 30 % of the GPUs train. The rates come from the planner's
cost model; nothing here was measured on GPUs. The largest case takes minutes. `--draw` only draws
the cases of `results/planner_scale.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from support.output import show, write_result

from dapo_async.planner import Lengths, Outage, Scenario, simulate
from dapo_async.planner.cost_model import Efficiency, Training, engine_speed, learner_speed
from dapo_async.planner.hardware import find_gpu
from dapo_async.planner.planned_model import model_of

QWEN_32B: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27_648,
    "tie_word_embeddings": False,
}
RESULT = Path(__file__).parent / "results" / "planner_scale.json"
ENGINE_GPUS, SLOTS, LEARNER_SHARE, MINIBATCHES = 4, 128, 0.3, 16
PROMPT, RESPONSE, LONGEST, GROUP_SIZE = 200, 6000, 20_480, 16
OUTAGE_S = 900.0
# Name → GPUs, groups per step, staleness bound, publish and its pause in seconds, steps, outages.
CASES: Mapping[str, tuple[int, int, int, float, float, int, int]] = {
    "128": (128, 256, 4, 20, 20, 16, 0),
    "1,024, batch of 512": (1024, 512, 4, 20, 20, 16, 0),
    "1,024, batch of 512, S = 8": (1024, 512, 8, 20, 20, 16, 0),
    "1,024": (1024, 2048, 4, 20, 20, 16, 0),
    "1,024, publish 60 s": (1024, 2048, 4, 60, 60, 16, 0),
    "1,024, publish 60 s, pause 5 s": (1024, 2048, 4, 60, 5, 16, 0),
    "1,024, 44 engines lost for 15 min": (1024, 2048, 4, 20, 20, 16, 44),
    "10,240, batch of 2,048, S = 8": (10_240, 2048, 8, 20, 20, 18, 0),
    "10,240": (10_240, 8192, 4, 20, 20, 13, 0),
    "10,240, S = 8": (10_240, 8192, 8, 20, 20, 18, 0),
}


def scenario_of(
    gpus: int,
    groups: int,
    max_staleness: int,
    publish_s: float,
    pause_s: float,
    num_steps: int,
    num_outages: int,
) -> Scenario:
    """One case; the losses are spread over the measured steps."""
    model, gpu, efficiency = model_of(QWEN_32B), find_gpu("H100"), Efficiency(minibatch_s=0.0)
    learner_gpus = int(LEARNER_SHARE * gpus)
    engines = (gpus - learner_gpus) // ENGINE_GPUS
    outages = [
        Outage(7 * k % engines, 4000.0 + 90 * k, 4000.0 + 90 * k + OUTAGE_S)
        for k in range(num_outages)
    ]
    return Scenario(
        num_engines=engines,
        engine=engine_speed(model, gpu, gpus=ENGINE_GPUS, slots=SLOTS, efficiency=efficiency),
        learner=learner_speed(
            model,
            gpu,
            Training(
                prompt_tokens=PROMPT,
                response_tokens=RESPONSE,
                longest_tokens=LONGEST,
                group_size=GROUP_SIZE,
                groups=groups // MINIBATCHES,
                microbatch_tokens=32_768,
                recompute="none",
                zero_stage=3,
            ),
            gpus=learner_gpus,
            efficiency=efficiency,
        ),
        lengths=Lengths(tail=0.8, mean_tokens=RESPONSE, max_tokens=LONGEST),
        prompt_tokens=PROMPT,
        group_size=GROUP_SIZE,
        groups_per_step=groups,
        num_minibatches=MINIBATCHES,
        max_staleness=max_staleness,
        num_steps=num_steps,
        warm_up_steps=8,
        acceptance=(0.6, 0.6),
        publish_s=publish_s,
        pause_s=pause_s,
        outages=tuple(outages),
    )


def measure(name: str) -> dict[str, Any]:
    scenario = scenario_of(*CASES[name])
    began_s = time.process_time()
    outcome = simulate(scenario)
    return {
        "case": name,
        "engines": scenario.num_engines,
        "groups per step": scenario.groups_per_step,
        "step s": round(outcome.step_s, 1),
        "trained tokens/s per GPU": round(outcome.trained_tokens_per_s / CASES[name][0]),
        "learner works": round(outcome.learner["train"], 2),
        "waits for deadlines": round(outcome.learner["deadline"], 2),
        "slots run": round(outcome.engines["running"], 2),
        "sync": round(outcome.engines["sync"], 2),
        "dead": round(outcome.engines["dead"], 2),
        "staleness": round(outcome.staleness, 2),
        "offered groups/s": round(outcome.groups_per_s / 0.6, 1),
        "CPU s": round(time.process_time() - began_s),
    }


def draw(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The rate per GPU of each case, and what both sides do."""
    names = [f"{case['case'].replace(', ', ' GPUs, ', 1)}" for case in cases]
    places = range(len(cases))
    figure, (rate, shares) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    rates = [case["trained tokens/s per GPU"] for case in cases]
    rate.barh(places, rates, color="#4c72b0")
    rate.bar_label(rate.containers[0], padding=2)
    rate.set_yticks(places, [name if "GPUs" in name else f"{name} GPUs" for name in names])
    rate.invert_yaxis()
    rate.set_xlabel("trained tokens/s per GPU")
    rate.margins(x=0.15)
    for offset, name, colour in (
        (-0.25, "learner works", "#4c72b0"),
        (0.0, "waits for deadlines", "#c44e52"),
        (0.25, "slots run", "#55a868"),
    ):
        heights = [case[name] for case in cases]
        shares.barh([y + offset for y in places], heights, 0.25, label=name, color=colour)
    shares.set_xlabel("share of the time")
    figure.legend(loc="upper right", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="only the first case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="draw the recorded cases")
    options = parser.parse_args()
    if options.draw is not None:
        draw(json.loads(RESULT.read_text())["cases"], options.draw)
        return
    rows = [measure(name) for name in (options.cases[:1] if options.quick else options.cases)]
    show(rows)
    write_result(options.json, "planner_scale", cases=rows)


if __name__ == "__main__":
    main()
