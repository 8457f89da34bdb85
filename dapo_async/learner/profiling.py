"""A torch profiler trace of what a rank does: what is run inside comes in, a file for Perfetto or chrome://tracing goes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Writes the trace of this thread's operators (on CUDA also of the kernels) to `path`, a `.json.gz`."""
    activities = [
        ProfilerActivity.CPU,
        *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
    ]
    with profile(activities=activities, record_shapes=True) as trace:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
