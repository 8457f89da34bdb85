"""On a GPU: the learner's utilisation, memory and speed.

Measures model FLOPs utilisation and memory at 8 k packed tokens, and tokens/s beside Hugging Face.
Random weights in the shapes of Qwen2.5-0.5B and 1.5B, bfloat16 activations, float32 masters. FLOPs
are those of the model: 6 per weight and token for matrices, and causal attention. Recomputation
(logits of the head, activation checkpointing) is not counted. `--quick` is the CPU form: a tiny
shape in float32, without utilisation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import SHAPE, hardware
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async.bench.about import commit
from dapo_async.bench.made_up import made_up_group
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.learner.optimizer import ShardedAdamW
from dapo_async.model import (
    Decoder,
    Mesh,
    ModelConfig,
    build_decoder,
    build_mesh,
    open_store,
    predict_memory,
    shard_of,
)
from dapo_async.types import Group

QWEN = {
    "vocab_size": 151_936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5 B": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5 B": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}
# Dense bfloat16, from the data sheets.
PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}
HOST, TIMEOUT_S, ALONE = "127.0.0.1", 600.0, Mesh()
LENGTH, NUM_ROLLOUTS, PROMPT_TOKENS = 2048, 4, 64
KNOBS: dict[str, Any] = {"lr": 1e-6, "warmup_steps": 0}


def model_config(shape: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict({"model_type": "qwen2", "rms_norm_eps": 1e-6, **shape})


def random_decoder(
    shape: dict[str, Any],
    device: str,
    *,
    dtype: torch.dtype,
    activations: torch.dtype | None = None,
    mesh: Mesh = ALONE,
) -> Decoder:
    decoder = build_decoder(
        model_config(shape), mesh=mesh, device=device, dtype=dtype, activations=activations
    )
    for parameter in map(shard_of, decoder.parameters()):
        parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return decoder


def mesh_of_one(device: str) -> Mesh:
    """A mesh of one rank, with the FSDP, DTensors and collectives of a rank among others."""
    store = open_store(HOST, timeout_s=TIMEOUT_S)
    return build_mesh(
        store, rank=0, dp=1, tp=1, host=HOST, device=torch.device(device), timeout_s=TIMEOUT_S
    )


def one_group(length: int, vocabulary: int) -> list[Group]:
    """Rollouts that fill one microbatch; half of them are correct."""
    lengths = np.full(NUM_ROLLOUTS, length - PROMPT_TOKENS)
    return [made_up_group(0, lengths, prompt_tokens=PROMPT_TOKENS, vocabulary=vocabulary)]


def step_flops(shape: dict[str, Any], length: int) -> float:
    """Forward and backward of one step: matrices, head and causal attention."""
    config = model_config(shape)
    with torch.device("meta"):
        matrices = sum(
            each.numel()
            for name, each in Decoder(config).named_parameters()
            if each.ndim > 1 and "embed" not in name
        )
    tokens, targets = NUM_ROLLOUTS * length, NUM_ROLLOUTS * (length - PROMPT_TOKENS)
    head = config.vocab_size * config.hidden_size * targets
    # Scores and values, half of them masked.
    attention = config.num_layers * config.num_heads * config.head_dim * tokens * length
    return 6.0 * (matrices * tokens + head + attention)


def seconds(work: Callable[[], None], device: str, *, rounds: int) -> float:
    """Median of `rounds`, after two to warm up."""
    taken = []
    for _ in range(rounds + 2):
        began_s = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began_s)
    return statistics.median(taken[2:])


def hugging_face_step(
    shape: dict[str, Any], device: str, activations: torch.dtype, length: int
) -> Callable[[], None]:
    """The same tokens as a batch without padding, with torch's SDPA and the same optimizer."""
    model = AutoModelForCausalLM.from_config(Qwen2Config(**shape), attn_implementation="sdpa").to(
        device, torch.float32
    )
    optimizer = ShardedAdamW(model, lr=1e-6, weight_decay=0.1, betas=(0.9, 0.999))
    ids = torch.randint(0, shape["vocab_size"], (NUM_ROLLOUTS, length), device=device)

    def loss() -> Tensor:
        with torch.autocast(device, dtype=activations, enabled=activations is not torch.float32):
            logits = model(input_ids=ids).logits[:, PROMPT_TOKENS - 1 : -1]
        chosen = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, PROMPT_TOKENS:].flatten(), reduction="none"
        )
        return -((-chosen + chosen.detach()).exp().mean())

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(lr=1e-6)
        optimizer.zero_grad()

    return step


def own_step(
    shape: dict[str, Any], device: str, *, length: int, rounds: int, mesh: Mesh = ALONE
) -> tuple[float, dict[str, Any]]:
    """Seconds of a step, and the predicted and measured memory."""
    activations = torch.bfloat16 if device == "cuda" else torch.float32
    tokens, groups = NUM_ROLLOUTS * length, one_group(length, shape["vocab_size"])
    decoder = random_decoder(shape, device, dtype=torch.float32, activations=activations, mesh=mesh)
    rank = LearnerRank(
        decoder,
        algorithm=AlgorithmConfig(proximal="current"),
        learner=LearnerConfig(**KNOBS, microbatch_tokens=tokens),
        mesh=mesh,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        assert rank.step(groups).totals["skipped"] == 0

    took_s = seconds(step, device, rounds=rounds)
    targets = NUM_ROLLOUTS * (length - PROMPT_TOKENS)
    memory = predict_memory(
        decoder.config,
        num_tokens=tokens,
        num_targets=targets,
        activations=activations,
        cuda=device == "cuda",
    )
    report: dict[str, Any] = {"predicted_gb": round((memory.on_device - memory.snapshot) / 1e9, 3)}
    if device == "cuda":
        report["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return took_s, report


def learner(
    shape: dict[str, Any], device: str, *, length: int, rounds: int, mesh: Mesh
) -> dict[str, Any]:
    took_s, report = own_step(shape, device, length=length, rounds=rounds)
    among_others_s, _ = own_step(shape, device, length=length, rounds=rounds, mesh=mesh)
    report["mesh_of_one_over_alone"] = round(took_s / among_others_s, 2)
    activations = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = NUM_ROLLOUTS * length
    if device == "cuda":
        peak = next(
            (flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()),
            None,
        )
        report["mfu"] = (
            None if peak is None else round(step_flops(shape, length) / took_s / peak, 3)
        )
    theirs_s = seconds(hugging_face_step(shape, device, activations, length), device, rounds=rounds)
    ours = {
        "tokens_per_s": round(tokens / took_s),
        "hugging_face_tokens_per_s": round(tokens / theirs_s),
    }
    return report | ours | {"over_hugging_face": round(theirs_s / took_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="on the CPU with a tiny shape: shows that it works, measures nothing",
    )
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device; --quick runs the CPU form")
    device, shapes = ("cpu", {"tiny": SHAPE}) if options.quick else ("cuda", SHAPES)
    length, rounds = (96, 1) if options.quick else (LENGTH, 5)
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "quick": options.quick,
    }
    report["hardware"] = torch.cuda.get_device_name() if device == "cuda" else hardware()
    mesh = mesh_of_one("cuda:0" if device == "cuda" else "cpu")
    report["learner"] = {
        name: learner(shape, device, length=length, rounds=rounds, mesh=mesh)
        for name, shape in shapes.items()
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
