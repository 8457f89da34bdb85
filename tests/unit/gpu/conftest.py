"""Each test here runs on the GPU if there is one, else in a small CPU form.

On a GPU machine: `python -m pytest tests/unit/gpu`. It needs torch with CUDA, transformers,
safetensors, numpy and pytest, and nothing else: no Ray, SGLang or OmegaConf. On a GPU all tests
together take at most eight minutes, or fail.
"""

from collections.abc import Generator
from contextlib import nullcontext

import pytest
import torch
from gpu_place import LARGE, SMALL, Place
from time_budget import TimeBudget

BUDGET = TimeBudget(together_s=360, each_s=120)


@pytest.fixture(scope="session")
def place() -> Place:
    return LARGE if torch.cuda.is_available() else SMALL


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with BUDGET.spent_by(item) if torch.cuda.is_available() else nullcontext():
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    BUDGET.check()
