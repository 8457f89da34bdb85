"""What a run reads, checked in the driver before anything is written or started.

Model folder, data files, lengths, options of the loss; CPUs and GPUs of this machine. Called by `cli.py` for every `train`, dry runs included.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dapo_async.algorithm import check_loss_options
from dapo_async.config import Config
from dapo_async.data import check_fit, load_set, usable_tokenizer
from dapo_async.model import ModelConfig, check_weights
from dapo_async.reward import get_verifier
from dapo_async.rollout.sglang_server import require_sglang
from dapo_async.runtime.cluster import planned_actors


def check_inputs(config: Config) -> None:
    """Raises ValueError with rule, values and remedy for whatever the user has to change first."""
    algorithm, rollout = config.algorithm, config.rollout
    if "://***@" in (config.tracking.mlflow or ""):
        raise ValueError(
            f"tracking.mlflow ({config.tracking.mlflow}) lacks its password, which is never written down; give tracking.mlflow=URI again, or leave "
            "it out of the URI and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    check_loss_options(
        algorithm.objective,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        correction=algorithm.correction,
        correction_level=algorithm.correction_level,
        correction_cap=algorithm.correction_cap,
        correction_floor=algorithm.correction_floor,
        entropy_bonus=algorithm.entropy_bonus,
    )
    get_verifier(config.reward.verifier)
    if rollout.engine == "sglang" and not rollout.server_urls:
        require_sglang()
    if config.ray.address == "local":
        _check_machine(config)
    folder = Path(config.model.path)
    model = ModelConfig.from_folder(folder)
    check_weights(folder, model)
    model.check_split(config.learner.tensor_parallel)
    if not model.eos_token_ids:
        raise ValueError(f"model {config.model.path} has no eos_token_id in its config.json; a response could never stop: add it")
    tokenizer = usable_tokenizer(folder)
    for file in (config.data.train, config.data.heldout):
        check_fit(load_set(config, file, tokenizer), model, folder=folder, max_response_tokens=rollout.max_response_tokens)


def _check_machine(config: Config) -> None:
    """An own Ray has what it is told to have: only here is it compared with the machine, and with `ray.num_cpus`."""
    actors = list(planned_actors(config))
    devices, cpus = torch.cuda.device_count(), config.ray.num_cpus
    if (wanted := sum(actor.num_gpus for actor in actors)) > devices:
        shares = ", ".join(f"{actor.name} {actor.num_gpus:g}" for actor in actors)
        raise ValueError(
            f"the run reserves {wanted:g} GPUs ({shares}), this machine has {devices} CUDA devices; "
            "set learner.num_gpus=0, rollout.num_gpus=0 and evaluation.num_gpus=0, or ray.address to a cluster that has them"
        )
    if cpus is not None and (wanted := sum(actor.num_cpus for actor in actors)) > cpus:
        shares = ", ".join(f"{actor.name} {actor.num_cpus:g}" for actor in actors)
        raise ValueError(f"the run reserves {wanted:g} CPUs ({shares}), ray.num_cpus is {cpus}; raise it, or set ray.num_cpus=null")
