"""Packages below the data need torch, numpy, safetensors, transformers and nothing else.

Algorithm, model, replay, learner and the native engine run on a GPU machine without Ray.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

ALLOWED = ("torch", "numpy", "safetensors", "transformers")
ONE_STEP = """
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async import algorithm, learner, model, replay, rollout
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.types import Group, Prompt, Rollout

sizes = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
with tempfile.TemporaryDirectory() as folder:
    AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).save_pretrained(folder)
    decoder, trained = (model.load_decoder(Path(folder)) for _ in range(2))
engine = TorchEngine(decoder, num_slots=4, max_len=16, weight_update="recompute")
rank = learner.LearnerRank(
    trained, algorithm=AlgorithmConfig(), learner=LearnerConfig()
)
prompt = Prompt(0, "", np.arange(3, dtype=np.int32), "")
sampling = rollout.SamplingParams(max_tokens=8, temperature=1.0, stop_token_ids=(), seed=0)
engine.submit(rollout.GroupRequest(0, prompt.token_ids, 4, sampling))
finished = []
while not finished:
    finished = engine.step()
((_, completions),) = finished
rollouts = tuple(
    Rollout(completion, "", float(place % 2), float(place % 2), None)
    for place, completion in enumerate(completions)
)
metrics = rank.step([Group(0, prompt, rollouts, "first", 1.0)]).flat()
assert metrics["loss_tokens"] == 32 and metrics["behaviour_log_ratio_max"] < 1e-5, metrics
print("trained", replay.ReplayBuffer.__name__, algorithm.policy_loss.__name__)
"""


def requirements(name: str, seen: set[str]) -> Iterator[str]:
    """The distribution and everything that it needs."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        return
    seen.add(key)
    try:
        needed = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield name
    for line in needed:
        if "extra ==" not in line:
            yield from requirements(re.match(r"[\w.-]+", line)[0], seen)  # type: ignore[index]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose path has only the allowed distributions."""
    folder, seen = tmp_path_factory.mktemp("few"), set[str]()
    for name in (each for allowed in ALLOWED for each in requirements(allowed, seen)):
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(
                    Path(str(file.locate())).parents[len(file.parts) - 1] / top
                )
    return {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_step_on_the_native_engines_rollouts_needs_nothing_else(few: dict[str, str]) -> None:
    done = run(few, "-c", ONE_STEP)
    assert done.stdout == "trained ReplayBuffer policy_loss\n", done.stderr


@pytest.mark.parametrize("module", ["aiohttp", "omegaconf", "ray", "mlflow", "psutil", "scipy"])
def test_every_other_library_can_not_be_imported(few: dict[str, str], module: str) -> None:
    assert "ModuleNotFoundError" in run(few, "-c", f"import {module}").stderr


def test_the_benchmark_of_the_native_engine_needs_nothing_else(few: dict[str, str]) -> None:
    done = run(few, str(ROOT / "benchmarks" / "engine.py"), "--help")
    assert done.returncode == 0, done.stderr
