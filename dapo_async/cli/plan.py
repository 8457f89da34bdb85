"""`dapo-async plan`: arguments for `planner.find_plan`."""

from __future__ import annotations

import argparse
import json

from dapo_async.cli.arguments import Parser, path, say

HELP = "how to split GPUs between engines and learner"


def add_arguments(parser: Parser) -> None:
    """Adds what `plan` takes."""
    parser.add_argument("scenario", type=path, help="YAML file with a section plan")
    parser.add_argument("--json", type=path, metavar="OUT", help="also write all figures there")


def run(options: argparse.Namespace) -> int:
    """Finds the split and prints it."""
    from dapo_async.planner.screens import plan_as_json, plan_lines
    from dapo_async.planner.settings import read_scenario_file
    from dapo_async.planner.sweep import find_plan

    plan = find_plan(*read_scenario_file(options.scenario))
    for line in plan_lines(plan):
        say(line)
    if options.json is not None:
        options.json.write_text(json.dumps(plan_as_json(plan), indent=1) + "\n")
        say(f"figures    {options.json.resolve()}")
    return 0
