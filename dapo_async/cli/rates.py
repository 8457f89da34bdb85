"""Where `plan` and `simulate` get rates: a scenario file, results of `bench`, or a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dapo_async.cli.arguments import Parser, path

if TYPE_CHECKING:  # numpy takes a while to import
    from dapo_async.planner.from_run import Measured
    from dapo_async.planner.scenario import Scenario
    from dapo_async.planner.settings import Cluster


def add_rates(parser: Parser) -> None:
    """Adds --from-run and --bench."""
    parser.add_argument(
        "--from-run", type=path, metavar="RUN_DIR", help="take the rates of the last steps of a run"
    )
    parser.add_argument(
        "--bench",
        type=path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="take rates from results of dapo-async bench --json in place of those of the scenario",
    )


def read_rates(options: argparse.Namespace) -> tuple[Scenario, Cluster, Measured | None]:
    """What is played, what `plan` may change, and what a run has measured. Raises ValueError."""
    from dapo_async.planner.inputs import read_input

    benched = None
    if options.bench:
        from dapo_async.bench.scenario import scenario_of_results

        benched = scenario_of_results(options.bench)
    return read_input(options.scenario, from_run=options.from_run, benched=benched)
