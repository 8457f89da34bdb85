"""Settings and fixtures of all tests.

One OMP thread per process: two spinning threads on two busy cores are 3 to 20 times slower.
No test joins a Ray that it did not start.
"""

import asyncio
import importlib.util
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_ADDRESS"] = "local"

import pytest
import torch
from run_support import Finished, finished
from sglang_world import World, start_world

torch.set_num_threads(1)


@pytest.fixture
def seeded() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of the main job for all tests that read its files; every group is recorded."""
    root = tmp_path_factory.mktemp("quickstart") / "run"
    return finished(root, "train.record=true", timeout_s=500.0)


@pytest.fixture(scope="session")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A real SGLang server of the family in the parameter, one for the whole session."""
    started = start_world(request.param, tmp_path_factory.mktemp(request.param))
    yield started
    asyncio.run(started.server.close())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests against the real SGLang need it installed; the gate installs it."""
    if importlib.util.find_spec("sglang") is None:
        missing = pytest.mark.skip(
            reason="SGLang is not installed: bash cluster/sglang_cpu/install.sh"
        )
        for item in items:
            if item.get_closest_marker("sglang"):
                item.add_marker(missing)
