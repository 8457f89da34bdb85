"""A cluster that answers and can't be joined is one line with a remedy and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Never

import pytest
import ray
from paths import QUICKSTART
from ray._private.utils import check_version_info, compute_version_info

from dapo_async.cli.main import main
from dapo_async.runtime.cluster import address
from dapo_async.runtime.cluster.connect import _not_joined

ADDRESS = "127.0.0.1:6379"
RAY, PYTHON = compute_version_info()[:2]
MINOR = PYTHON.rpartition(".")[0]


def mismatch(ray_there: str, python_there: str) -> RuntimeError:
    """The error of Ray for a driver that joins a cluster of these versions."""
    cluster = {"ray_version": ray_there, "python_version": python_there}
    with pytest.raises(RuntimeError) as error:
        check_version_info(cluster, ADDRESS, python_version_match_level="patch")
    return error.value


@pytest.mark.parametrize(
    ("there", "remedy"),
    [
        (("2.9.0", PYTHON), f"install Ray 2.9.0 and Python {PYTHON} here, as in the cluster"),
        (("2.9.0", "3.9.1"), "install Ray 2.9.0 and Python 3.9.1 here, as in the cluster"),
        ((RAY, "3.9.1"), "use Python 3.9.1 here, as in the cluster"),
        (
            (RAY, f"{MINOR}.99"),
            f"use Python {MINOR}.99 here, as in the cluster, or set "
            "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor",
        ),
    ],
)
def test_cluster_of_other_versions_is_refused_with_both(
    there: tuple[str, str], remedy: str
) -> None:
    line = _not_joined(ADDRESS, mismatch(*there))
    assert line.startswith(f"ray.address ({ADDRESS}) can't be joined: Version mismatch: ")
    assert f"Ray: {there[0]} Python: {there[1]}" in line
    assert f"Ray: {RAY} Python: {PYTHON}" in line
    assert line.endswith(f"; {remedy}, or set ray.address=local")
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        mismatch("2.9.0", "3.9.1"),
        ConnectionError("Could not read from GCS"),
        AssertionError("The node is gone"),
        Exception("another error"),
        SystemExit(1),
    ],
)
def test_error_of_joining_ends_train_with_exit_code_2_and_leaves_nothing(
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(**_: Any) -> Never:
        raise error

    monkeypatch.setattr(address, "_probe", lambda *_: True)
    monkeypatch.setattr(ray, "init", refuse)
    root = tmp_path / "runs" / "run"
    words = ["train", str(QUICKSTART), f"run_dir={root}", f"ray.address={ADDRESS}"]
    assert main([*words, "tracking.sinks=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dapo-async: ray.address ({ADDRESS}) can't be joined: ")
    assert line.endswith(", or set ray.address=local")
    assert not list(tmp_path.iterdir())
