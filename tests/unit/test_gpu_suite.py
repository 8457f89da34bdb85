"""`python -m pytest tests/unit/gpu` on a GPU machine: few libraries, and an end after 8 minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from blocked_imports import run_without
from paths import ROOT

# A machine with a GPU has torch, transformers, safetensors, numpy, triton and pytest.
MISSING = (
    "ray",
    "sglang",
    "omegaconf",
    "aiohttp",
    "psutil",
    "hypothesis",
    "mlflow",
    "datasets",
    "pyarrow",
    "matplotlib",
    "flash_attn",
    "flash_attn_interface",
    "pytest_timeout",
    "xdist",
)
SUITE = """
import os
os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
os.environ.pop("PYTEST_ADDOPTS", None)
import pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", "tests/unit/gpu"])
import gpu  # benchmarks/gpu.py
raise SystemExit(code)
"""


def test_the_tests_for_a_gpu_pass_in_their_cpu_form_without_other_libraries() -> None:
    done = run_without(MISSING, SUITE, timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "error" not in summary


def test_every_test_marked_gpu_is_in_the_folder_that_a_gpu_machine_runs() -> None:
    marked = [
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("*.py")
        if "mark.gpu" in path.read_text() and path != Path(__file__)
    ]
    assert {path.parent for path in marked} == {Path("tests/unit/gpu")}
    files = {path.name for path in (ROOT / "tests/unit/gpu").glob("test_*.py")}
    assert {path.name for path in marked} == files


CONFTEST = """
import pytest
from time_budget import TimeBudget

BUDGET = TimeBudget(together_s={together_s}, each_s={each_s})

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with BUDGET.spent_by(item):
        return (yield)

def pytest_runtest_setup(item):
    BUDGET.check()
"""
TESTS = """
import time

def test_first():
    time.sleep({first_s})

def test_second():
    pass
"""


@pytest.mark.parametrize(
    ("limits", "first_s", "expected"),
    [
        ({"together_s": 60, "each_s": 60}, 0, "2 passed"),
        ({"together_s": 0.1, "each_s": 60}, 0.3, "more than the 0.1 s that all of them may take"),
        ({"together_s": 60, "each_s": 0.5}, 60, "test_first takes longer than 0.5 s"),
    ],
)
def test_a_suite_that_takes_too_long_ends_and_says_so(
    limits: dict[str, float], first_s: float, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(**limits))
    (tmp_path / "test_some.py").write_text(TESTS.format(first_s=first_s))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "tests" / "fakes"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode == 0) == (expected == "2 passed")
    assert expected in done.stdout + done.stderr
