"""The peak of memory of a device; on a CPU that of this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # Linux sets the peak of resident memory to the present one


class PeakMemory:
    """Call `reset`, work, then `peak_bytes`."""

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        self._cuda = device == "cuda"
        self.is_known = self._cuda or os.access(RESET, os.W_OK)

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.is_known:
            RESET.write_text(RESET_PEAK)

    def wait(self) -> None:
        """Returns when the device has finished its work."""
        if self._cuda:
            torch.cuda.synchronize()

    def peak_bytes(self) -> float:
        """Since `reset`. On CUDA what torch has allocated, else the resident memory."""
        if self._cuda:
            return float(torch.cuda.max_memory_allocated())
        if not self.is_known:
            return 0.0
        line = next(each for each in STATUS.read_text().splitlines() if each.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
