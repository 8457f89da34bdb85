"""`dapo-async plan`: arguments for `planner.find_plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from dapo_async.cli.arguments import Parser, path, say

HELP = "how to split GPUs between engines and learner"


def add_arguments(parser: Parser) -> None:
    """Adds what `plan` takes."""
    parser.add_argument("scenario", type=path, nargs="?", help="YAML file with a section plan")
    parser.add_argument(
        "--from-run", type=path, metavar="RUN_DIR", help="take the rates of the last steps of a run"
    )
    parser.add_argument(
        "--cost-per-gpu-hour", type=float, metavar="PRICE", help="price of a GPU, as plan.gpu_hour"
    )
    parser.add_argument("--json", type=path, metavar="OUT", help="also write all figures there")


def run(options: argparse.Namespace) -> int:
    """Finds the split and prints it."""
    from dapo_async.planner.inputs import read_input
    from dapo_async.planner.screens import measured_line, plan_as_json, plan_lines
    from dapo_async.planner.simulator import simulate
    from dapo_async.planner.sweep import find_plan

    scenario, cluster, measured = read_input(options.scenario, from_run=options.from_run)
    if (price := options.cost_per_gpu_hour) is not None:
        if not 0 < price < 1e9:
            raise ValueError(f"--cost-per-gpu-hour ({price:g}) must be above 0")
        cluster = replace(cluster, gpu_hour=price)
    if measured is not None:
        say(measured_line(measured, simulate(scenario)))
    plan = find_plan(scenario, cluster)
    for line in plan_lines(plan):
        say(line)
    if options.json is not None:
        options.json.write_text(json.dumps(plan_as_json(plan), indent=1) + "\n")
        say(f"figures    {options.json.resolve()}")
    return 0
