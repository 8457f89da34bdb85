"""Settings and fixtures of all tests.

One OMP thread per process: two spinning threads on two busy cores are 3 to 20 times slower.
No test joins a Ray that it did not start.
This file imports no heavy library: three processes load it before they run the first unit test.
"""

import importlib.util
import os
from typing import TYPE_CHECKING

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_ADDRESS"] = "local"

import pytest

if TYPE_CHECKING:
    import torch


@pytest.fixture
def seeded() -> "torch.Generator":
    import torch

    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """On a GPU machine pytest may have no plugins; `pyproject.toml` has an option of one."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds of a test, with pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): with pytest-timeout")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests against the real SGLang need it installed; the gate installs it."""
    if importlib.util.find_spec("sglang") is None:
        missing = pytest.mark.skip(
            reason="SGLang is not installed: bash cluster/sglang_cpu/install.sh"
        )
        for item in items:
            if item.get_closest_marker("sglang"):
                item.add_marker(missing)
