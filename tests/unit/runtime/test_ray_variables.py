"""A RAY_ variable that Ray can't read is refused before Ray is imported."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Never

import pytest
from paths import QUICKSTART

from dapo_async.cli.main import main
from dapo_async.runtime.cluster import ray_variables
from dapo_async.runtime.cluster.environment import prepare


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any RAY_ variable of the user."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    prepare("10.0.0.1:6379")


def never(*_: Any, **__: Any) -> Never:
    raise AssertionError("no child is needed")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("RAY_raylet_start_wait_time_s", "abc", "Ray ends without a message"),
        ("RAY_raylet_start_wait_time_s", "1.5", "Ray ends without a message"),
        ("RAY_raylet_start_wait_time_s", "", "Ray ends without a message"),
        ("RAY_worker_niceness", "x", "Ray ends without a message"),
        ("RAY_memory_usage_threshold", "90%", "Ray ends without a message"),
        ("RAY_NUM_REDIS_GET_RETRIES", "many", "ValueError: invalid literal for int()"),
        ("RAY_CGRAPH_get_timeout", "10 s", "ValueError: invalid literal for int()"),
    ],
)
def test_variable_that_ray_cannot_read_is_named_with_its_value(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv(name, value)
    line = ray_variables.fault()
    assert line is not None
    assert line.startswith(f"Ray can't read the environment variable {name} ({value!r}): {reason}")
    assert line.endswith("such as a whole number, or unset it")
    assert "\n" not in line


def test_variables_that_ray_can_read_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("RAY_worker_niceness", "5"),
        ("RAY_raylet_start_wait_time_s", "60"),
        ("RAY_event_stats", "false"),
        ("RAY_no_such_variable", "abc"),
    ):
        monkeypatch.setenv(name, value)
    assert ray_variables.fault() is None


def test_child_starts_only_for_variables_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", never)
    for name in ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "/x")
    assert ray_variables.fault() is None
    monkeypatch.setenv("RAY_worker_niceness", "5")
    with pytest.raises(AssertionError, match="no child is needed"):
        ray_variables.fault()


def test_value_of_a_secret_variable_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_REDIS_PASSWORD", "hunter2")
    monkeypatch.setattr(ray_variables, "_refusal", lambda environment: "a reason")
    line = ray_variables.fault()
    assert line is not None
    assert "RAY_REDIS_PASSWORD (its value is not shown)" in line


def test_wrong_variable_ends_train_with_exit_code_2_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "abc")
    words = ["train", str(QUICKSTART), f"run_dir={tmp_path / 'runs' / 'run'}", "ray.address=local"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "RAY_raylet_start_wait_time_s ('abc')" in line
    assert not list(tmp_path.iterdir())
