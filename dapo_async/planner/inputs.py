"""Where the commands get their scenario from: a file, or a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo_async.planner.from_run import Measured, scenario_of_run
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.settings import Cluster, read_scenario, read_scenario_file
from dapo_async.planner.simulator import simulate

LEAST_REST = 0.03  # of a step: less is noise
LEARNER_BOUND = 0.9  # share of time in which the simulated learner trains


def read_input(
    file: Path | None,
    *,
    from_run: Path | None,
    benched: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Scenario, Cluster, Measured | None]:
    """The scenario of a file, or of the run `from_run` with what was measured there.

    `benched`: sections of `dapo-async bench`, which replace those of the file. Raises ValueError
    unless either a file or a run is given.
    """
    if (file is None) == (from_run is None):
        raise ValueError("give a scenario file or --from-run RUN_DIR, one of them")
    if file is not None:
        return *read_scenario_file(file, measured=benched), None
    if benched:
        raise ValueError("--bench is for a scenario file; --from-run has the rates of the run")
    assert from_run is not None
    values, measured = scenario_of_run(from_run)
    scenario, cluster = read_scenario(values)
    return with_control_plane(scenario, measured), cluster, measured


def with_control_plane(scenario: Scenario, measured: Measured) -> Scenario:
    """With what a step took beyond both sides' work as `snapshot_s`.

    If the simulated learner hardly waits, then the real one did not wait for generation but for the
    control plane. It would do so on another split too.
    """
    outcome = simulate(scenario)
    rest_s = measured.step_s - outcome.step_s
    if rest_s < LEAST_REST * measured.step_s or outcome.learner["train"] < LEARNER_BOUND:
        return scenario
    return replace(scenario, snapshot_s=rest_s)
