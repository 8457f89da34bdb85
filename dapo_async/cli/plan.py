"""`dapo-async plan`: arguments for `planner.find_plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from dapo_async.cli.arguments import Parser, path, say
from dapo_async.cli.rates import add_rates, read_rates

HELP = "how to split GPUs between engines and learner"


def add_arguments(parser: Parser) -> None:
    """Adds what `plan` takes."""
    parser.add_argument("scenario", type=path, nargs="?", help="YAML file with a section plan")
    add_rates(parser)
    parser.add_argument(
        "--cost-per-gpu-hour", type=float, metavar="PRICE", help="price of a GPU, as plan.gpu_hour"
    )
    parser.add_argument("--json", type=path, metavar="OUT", help="also write all figures there")
    parser.add_argument("--html", type=path, metavar="OUT", help="also write a page with pictures")
    parser.add_argument(
        "--config",
        type=path,
        metavar="OUT",
        help="also write a config for train: that of --recipe, or of the run, with the best split",
    )
    parser.add_argument("--recipe", type=path, metavar="CONFIG", help="the config for --config")


def run(options: argparse.Namespace) -> int:
    """Finds the split and prints it."""
    from dapo_async.planner.screens import measured_line, overrides, plan_as_json, plan_lines
    from dapo_async.planner.simulator import simulate
    from dapo_async.planner.sweep import find_plan

    recipe = _recipe(options)
    if options.html is not None:
        from dapo_async.tracking.plan_page import check_html_name

        check_html_name(options.html)
    scenario, cluster, measured = read_rates(options)
    if (price := options.cost_per_gpu_hour) is not None:
        if not 0 < price < 1e9:
            raise ValueError(f"--cost-per-gpu-hour ({price:g}) must be above 0")
        cluster = replace(cluster, gpu_hour=price)
    if measured is not None:
        say(measured_line(measured, scenario, simulate(scenario)))
    plan = find_plan(scenario, cluster)
    for line in plan_lines(plan):
        say(line)
    if options.json is not None:
        options.json.write_text(json.dumps(plan_as_json(plan), indent=1) + "\n")
        say(f"figures    {options.json.resolve()}")
    if options.html is not None:
        from dapo_async.tracking.plan_page import write_plan_page

        write_plan_page(plan, options.html)
        say(f"page       {options.html.resolve()}")
    if recipe is not None:
        from dapo_async.planner.recipe import planned_config

        options.config.write_text(planned_config(recipe, overrides(plan)))
        say(f"config     {options.config.resolve()}")
    return 0


def _recipe(options: argparse.Namespace) -> Path | None:
    """The config to start from; None without --config. Checked before anything is simulated."""
    given: Path | None = options.recipe
    if options.config is None:
        if given is not None:
            raise ValueError("--recipe is for --config OUT; give it too, or leave it out")
        return None
    if given is None and options.from_run is None:
        raise ValueError("--config needs --recipe CONFIG, the config that the split is for")
    recipe: Path = given or options.from_run / "config.yaml"
    from dapo_async.config import load

    if given is not None:
        load(recipe, files=False)
    return recipe
