"""What a run reads, checked in the driver before anything is written or started.

Model folder, data files, lengths, options of the loss; CPUs and GPUs of this machine. Called by `cli.py` for every `train`, dry runs included.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from dapo_async.algorithm import check_loss_options
from dapo_async.config import Config
from dapo_async.data import PromptSet, Tokenizer, load_prompts, load_tokenizer
from dapo_async.model import ModelConfig, check_weights
from dapo_async.replay import custom_filter
from dapo_async.reward import choose_verifiers, named_sources
from dapo_async.runtime.cluster import planned_actors


def load_set(config: Config, file: str, tokenizer: Tokenizer) -> PromptSet:
    """The prompts of `data.train` or `data.heldout` with the knobs of `data`."""
    data = config.data
    return load_prompts(
        Path(file),
        tokenizer=tokenizer,
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        source_key=data.source_key,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
    )


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
    choose_verifiers(config.reward.verifier, config.reward.by_source, timeout_s=config.reward.timeout_s)
    if config.replay.filter is not None:
        custom_filter(config.replay.filter)
    if rollout.engine == "sglang" and not rollout.server_urls and importlib.util.find_spec("sglang") is None:
        raise ValueError(
            "rollout.engine=sglang needs SGLang, which is not installed; pip install 'dapo-async[sglang]' on a GPU machine, run "
            "cluster/sglang_cpu/install.sh on a CPU machine, or name running servers in rollout.servers"
        )
    if config.ray.address == "local":
        _check_machine(config)
    folder = Path(config.model.path)
    model = ModelConfig.from_folder(folder)
    check_weights(folder, model)
    model.check_split(config.learner.tensor_parallel)
    if not model.eos_token_ids:
        raise ValueError(f"model {config.model.path} has no eos_token_id in its config.json; a response could never stop: add it")
    tokenizer = _load_tokenizer(folder)
    sources: set[str] = set()
    for file in (config.data.train, config.data.heldout):
        prompts = load_set(config, file, tokenizer).prompts
        sources.update(prompt.source for prompt in prompts)
        largest = max(int(prompt.token_ids.max(initial=0)) for prompt in prompts)
        if largest >= model.vocab_size:
            raise ValueError(
                f"the tokenizer of {folder} gives token {largest} for a prompt of {file}, the model knows {model.vocab_size} tokens (vocab_size); "
                "take tokenizer and weights from one model"
            )
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if longest + rollout.max_response_tokens > model.max_positions:
            raise ValueError(
                f"the longest prompt of {file} ({longest} tokens) and rollout.max_response_tokens ({rollout.max_response_tokens}) must not pass "
                f"the model's {model.max_positions} positions; lower rollout.max_response_tokens or data.max_prompt_tokens"
            )

    if unknown := [source for source in named_sources(config.reward.by_source) if source not in sources]:
        raise ValueError(
            f"reward.by_source names {unknown[0]}, which no row has in its column {config.data.source_key} (data.source_key); the rows have "
            f"{', '.join(sorted(filter(None, sources))) or 'no such column'}: correct the name"
        )


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


def _load_tokenizer(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(folder)
    except Exception as error:  # a broken file raises whatever the tokenizers library likes, a plain Exception among it
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of {folder} can't be loaded: {reason}; copy tokenizer.json and its companions of the base model") from error
