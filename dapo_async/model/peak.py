"""What a device can do at most: dense bfloat16 FLOPs and bytes of memory per second.

GPUs are known by their name. Sources: NVIDIA's datasheets of A100 (2021), H100 (2023), H200 (2024),
L40S (2023), HGX B200 and GB200 NVL72 (2024). Their figures "with sparsity" are halved. H800 has
the compute and the memory of H100; only its NVLink is slower. H20: 148 TFLOPs and 4.0 TB/s, as
published with its announcement. Of any other device the peak is measured.

Called once per process by the learner and the rollout actors, never within a step.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TERA = 1e12
SMI_S = 10.0  # nvidia-smi answers within this time


@dataclass(frozen=True, slots=True)
class Peak:
    """Of one device."""

    flops_per_s: float  # dense products
    bytes_per_s: float  # reads of its memory
    measured: bool = False  # else from a datasheet


# Pattern of the device's name → dense bfloat16 TFLOPs, TB/s. The first match counts.
GPUS = (
    (r"GB200", 2500.0, 8.0),
    (r"B200", 2250.0, 8.0),
    (r"H200", 989.4, 4.8),
    (r"H20", 148.0, 4.0),
    (r"H[18]00 NVL", 835.5, 3.9),
    (r"H[18]00 PCIe", 756.5, 2.0),
    (r"H[18]00", 989.4, 3.35),
    (r"A100.*PCIE?.*40GB", 312.0, 1.555),
    (r"A100.*SXM.*40GB", 312.0, 1.555),
    (r"A100.*80GB PCIe", 312.0, 1.935),
    (r"A100", 312.0, 2.039),
    (r"L40S", 362.0, 0.864),
)
SIZE = 768  # of the measured product, [SIZE, SIZE] @ [SIZE, SIZE]
COPY_NUMBERS = 2**24  # float32: beyond the caches
REPEATS = 3  # the fastest counts


def known_peak(name: str) -> Peak | None:
    """The datasheet's figures of a GPU by its CUDA name, None for an unknown one."""
    for pattern, tflops, terabytes in GPUS:
        if re.search(rf"(?<![A-Z0-9]){pattern}(?![A-Z0-9])", name, re.IGNORECASE):
            return Peak(tflops * TERA, terabytes * TERA)
    return None


@functools.cache
def device_peak(device: str) -> Peak:
    """Of "cpu", with the threads that torch uses, or of "cuda:0".

    An unknown device is measured, in about 0.1 s on a CPU.
    """
    import torch

    if device.startswith("cuda"):
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
        dtype = torch.bfloat16
    else:
        dtype = torch.float32
    return _measured(device, dtype)


def gpu_of_process() -> Peak | None:
    """Of the first GPU that this process may use, without a CUDA context on it; None if unknown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", visible]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return known_peak(answer.stdout)


def _measured(device: str, dtype: torch.dtype) -> Peak:
    """The fastest of a few matrix products and copies. A copy reads and writes each byte once."""
    import torch

    factor = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    source = torch.ones(COPY_NUMBERS, device=device)
    target = torch.empty_like(source)

    def fastest_s(work: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS):
            if source.is_cuda:
                torch.cuda.synchronize(device)
            start_s = time.perf_counter()
            work()
            if source.is_cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start_s)
        return min(times)

    product_s = fastest_s(lambda: factor @ factor)
    copy_s = fastest_s(lambda: target.copy_(source))
    num_bytes = 2 * source.numel() * source.element_size()
    return Peak(2 * SIZE**3 / product_s, num_bytes / copy_s, measured=True)
