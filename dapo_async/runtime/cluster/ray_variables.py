"""Checks the RAY_ variables of the user's environment in a child process.

Ray reads them when it is imported. If a value has the wrong type, Ray's C++ part ends the process
without a message, and its Python part raises. `preflight` calls `fault` before Ray is imported.
Imports no Ray.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Set by `environment.prepare`, by `submit`, by Ray at its import or by Ray for a job, so not by the
# user.
OWN_VARIABLES = {
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_CLIENT_MODE",
    "RAY_COLOR_PREFIX",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_JOB_STOP_WAIT_TIME_S",
    "RAY_RAYLET_PID",
    "RAY_USAGE_STATS_ENABLED",
}
TEXTS = {"RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"}  # Ray takes any text
# With these values they are `environment.prepare`'s.
PREPARED = {"RAY_worker_niceness": "0", "RAY_task_events_report_interval_ms": "0"}
# `ray.shutdown` imports ray.dag.
CHILD = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); import ray.dag"
CHILD_S = 60.0  # it takes under a second; if it takes longer, the check is skipped
SECRET = re.compile("token|password|secret|key", re.IGNORECASE)
LONGEST_VALUE, LONGEST_REASON = 60, 300


def given_variables() -> list[str]:
    """The names of the RAY_ variables that the user has set, sorted."""
    own = OWN_VARIABLES | {each for each in PREPARED if os.environ.get(each) == PREPARED[each]}
    return sorted({name for name in os.environ if name.startswith("RAY_")} - own)


def fault() -> str | None:
    """One line with a remedy if Ray can't be imported with the user's variables, else None.

    Starts a child process, which takes under a second, only if the user has set such variables.
    """
    suspects = [name for name in given_variables() if name not in TEXTS]
    if not suspects or (reason := _refusal(os.environ)) is None:
        return None
    for name in suspects:
        others = {*suspects} - {name}
        alone = {key: value for key, value in os.environ.items() if key not in others}
        if (own_reason := _refusal(alone)) is not None:
            return _line([name], own_reason)
    return _line(suspects, reason)


def _refusal(environment: Mapping[str, str]) -> str | None:
    """Why Ray can't be imported in this environment; None if it can."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return "Ray ends without a message, because the value has another type"
    raised = [line for line in child.stderr.splitlines() if line.strip()]
    if not raised:
        return f"Ray ends with exit code {child.returncode}"
    return raised[-1][:LONGEST_REASON].rstrip(".;")


def _line(names: Sequence[str], reason: str) -> str:
    shown = ", ".join(f"{name} ({_value(name)})" for name in names)
    which = "variable" if len(names) == 1 else "variables"
    it = "it" if len(names) == 1 else "them"
    return (
        f"Ray can't read the environment {which} {shown}: {reason}; set {it} to a value of the "
        f"right type, such as a whole number, or unset {it}"
    )


def _value(name: str) -> str:
    if SECRET.search(name):
        return "its value is not shown"
    return repr(os.environ[name][:LONGEST_VALUE])
