"""A torch profiler trace of a step, as a file for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Traces this thread's operators, and on CUDA the kernels, into `path`, a `.json.gz`."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as trace:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
