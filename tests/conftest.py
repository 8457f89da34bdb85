"""One OMP thread per process: two spinning threads on two busy cores are 3 to 20 times slower. No test joins a Ray that it did not start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_ADDRESS"] = "local"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def seeded() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)
