"""`dapo-async simulate`: arguments for `planner.simulate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dapo_async.cli.arguments import Parser, path, say
from dapo_async.cli.rates import add_rates, read_rates

HELP = "play a run of a scenario in virtual time"


def add_arguments(parser: Parser) -> None:
    """Adds what `simulate` takes."""
    parser.add_argument(
        "scenario", type=path, nargs="?", help="YAML file; docs/planner.md describes it"
    )
    add_rates(parser)
    parser.add_argument("--json", type=path, metavar="OUT", help="also write all figures there")


def run(options: argparse.Namespace) -> int:
    """Plays the run and prints its figures."""
    from dapo_async.planner.screens import as_json, measured_line, simulation_lines
    from dapo_async.planner.simulator import simulate

    scenario, _, measured = read_rates(options)
    outcome = simulate(scenario)
    for line in simulation_lines(scenario, outcome):
        say(line)
    if measured is not None:
        say(measured_line(measured, scenario, outcome))
    if options.json is not None:
        out: Path = options.json
        out.write_text(json.dumps(as_json(scenario, outcome), indent=1) + "\n")
        say(f"figures    {out.resolve()}")
    return 0
