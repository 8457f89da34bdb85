"""Where the commands get their scenario from: a file, or a run."""

from __future__ import annotations

from pathlib import Path

from dapo_async.planner.from_run import Measured, scenario_of_run
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.settings import Cluster, read_scenario, read_scenario_file


def read_input(
    file: Path | None, *, from_run: Path | None
) -> tuple[Scenario, Cluster, Measured | None]:
    """The scenario of a file, or of the run `from_run` with what was measured there.

    Raises ValueError unless exactly one of them is given.
    """
    if (file is None) == (from_run is None):
        raise ValueError("give a scenario file or --from-run RUN_DIR, one of them")
    if file is not None:
        return *read_scenario_file(file), None
    assert from_run is not None
    values, measured = scenario_of_run(from_run)
    return *read_scenario(values), measured
