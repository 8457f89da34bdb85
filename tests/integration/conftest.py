"""Fixtures of the tests with real runs and real servers; each is made once per session."""

import asyncio
from collections.abc import Iterator

import pytest
from run_support import Finished, finished
from sglang_world import World, start_world


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
