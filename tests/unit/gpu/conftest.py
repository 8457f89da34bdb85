"""Each test here runs on the GPU if there is one, else in a small CPU form.

On a GPU machine: `python -m pytest -m gpu tests/unit`. Ray, SGLang and OmegaConf are not needed.
"""

import pytest
import torch
from gpu_place import LARGE, SMALL, Place


@pytest.fixture(scope="session")
def place() -> Place:
    return LARGE if torch.cuda.is_available() else SMALL
