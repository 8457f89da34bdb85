"""Where and with what a benchmark ran: device, versions, commit, digest of the config."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dapo_async.config import Config
from dapo_async.config.schema import values_of
from dapo_async.model import ModelConfig

PACKAGES = ("dapo_async", "torch", "ray", "sglang")
# Knobs that name places or data. They do not change what a benchmark measures.
PLACES = ("run_dir", "model.path", "data.train", "data.heldout", "tracking.mlflow", "ray.address")


def about(config: Config, model: ModelConfig) -> dict[str, Any]:
    """What a result says of itself besides its figures; it names no path of this machine."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "device": device(config),
        "load": round(os.getloadavg()[0], 2),
        "config_sha256": config_digest(config, model),
    }


def commit() -> str | None:
    """The git commit of the checkout that runs; None without one."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # an installed package, maybe within another repository
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def device(config: Config) -> dict[str, Any]:
    """The hardware, as far as it decides the speed."""
    cpu: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": max(1, int(config.model.num_cpus)),
    }
    if config.model.torch_device == "cuda" and torch.cuda.is_available():
        return {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), **cpu}
    return cpu


def config_digest(config: Config, model: ModelConfig) -> str:
    """SHA-256 of the shape of the model and of every knob that may change a figure."""
    knobs = {name: value for name, value in values_of(config) if name not in PLACES}
    content = json.dumps([knobs, repr(model)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
