"""On a GPU: the learner's utilisation, memory and speed.

Measures model FLOPs utilisation (MFU), peak memory beside the predicted one, and tokens/s; for
short rows beside Hugging Face. Random weights in the shapes of Qwen2.5-0.5B, 1.5B and 7B and of
Qwen3-0.6B, bfloat16 activations, float32 masters. FLOPs are those of the model: 6 per weight and
token for matrices, and causal attention. What is computed again is not counted. The first form of
recomputation that fits the device is used. A case that does not fit is left out, and says so.
`verdict` compares with the goal of MFU 0.45 and with published figures, and names the hardware.
`kernels` has the step with each value of `learner.kernels` beside torch's, `head` the head alone.
`--quick` is the CPU form: tiny shapes in float32, without MFU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import SHAPE, hardware
from gpu_verdict import PRIME_RL, Published, verdict
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
    token_logprobs,
)
from dapo_async.model.config import Recompute
from dapo_async.model.cost import train_flops
from dapo_async.model.kernels import Kernels
from dapo_async.model.parameters import parameter_shapes
from dapo_async.types import Group

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
}


def shape(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    """A Hugging Face config."""
    return {
        **QWEN,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **others,
    }


QWEN3 = shape(
    1024,
    3072,
    28,
    16,
    model_type="qwen3",
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=65_536,
)
QWEN_7B = shape(
    3584, 18_944, 28, 28, vocab_size=152_064, num_key_value_heads=4, tie_word_embeddings=False
)


@dataclass(frozen=True, slots=True)
class Case:
    """A model and the rollouts of one step, which are one microbatch."""

    shape: dict[str, Any]
    length: int  # tokens of a row, its prompt included
    num_rollouts: int
    beside_hugging_face: bool = False
    offload: bool = False  # the moments of the optimizer are on the host
    published: Published | None = None  # of the same model and length

    @property
    def tokens(self) -> int:
        return self.num_rollouts * self.length

    @property
    def targets(self) -> int:
        return self.num_rollouts * (self.length - PROMPT_TOKENS)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_dict(self.shape)


PROMPT_TOKENS = 64
CASES = {
    "Qwen2.5-0.5B, 4 × 2,048": Case(shape(896, 4864, 24, 14), 2048, 4, True),
    "Qwen2.5-1.5B, 4 × 2,048": Case(shape(1536, 8960, 28, 12), 2048, 4, True),
    "Qwen2.5-7B, 4 × 2,048": Case(QWEN_7B, 2048, 4, offload=True),
    "Qwen3-0.6B, 2 × 16,384": Case(QWEN3, 16_384, 2, published=PRIME_RL[16_384]),
    "Qwen3-0.6B, 2 × 65,536": Case(QWEN3, 65_536, 2, published=PRIME_RL[65_536]),
}
TINY = {**SHAPE, "model_type": "qwen2", "rms_norm_eps": 1e-6}
QUICK = {"tiny, 4 × 96": Case(TINY, 96, 4, True), "tiny, 2 × 160": Case(TINY, 160, 2)}
FORMS: tuple[Recompute, ...] = ("none", "mlp", "all")
DEVICE_SHARE = 0.92  # of its memory that the prediction may fill: nothing else runs there
# Dense bfloat16, from the data sheets.
PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}
HOST, TIMEOUT_S, ALONE = "127.0.0.1", 600.0, Mesh()
KNOBS: dict[str, Any] = {"lr": 1e-6, "warmup_steps": 0}


def random_decoder(case: Case, device: str, *, mesh: Mesh = ALONE) -> Decoder:
    decoder = build_decoder(
        case.model,
        mesh=mesh,
        device=device,
        dtype=torch.float32,
        activations=activations_on(device),
    )
    for parameter in map(shard_of, decoder.parameters()):
        parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return decoder


def activations_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def mesh_of_one(device: str) -> Mesh:
    """A mesh of one rank, with the FSDP, DTensors and collectives of a rank among others."""
    store = open_store(HOST, timeout_s=TIMEOUT_S)
    return build_mesh(
        store, rank=0, dp=1, tp=1, host=HOST, device=torch.device(device), timeout_s=TIMEOUT_S
    )


def one_group(case: Case) -> list[Group]:
    """Rollouts that fill one microbatch; half of them are correct."""
    lengths = np.full(case.num_rollouts, case.length - PROMPT_TOKENS)
    vocabulary = case.model.vocab_size
    return [made_up_group(0, lengths, prompt_tokens=PROMPT_TOKENS, vocabulary=vocabulary)]


def step_flops(case: Case) -> int:
    """Forward and backward of one step; see `model/cost.py`."""
    responses = [case.length - PROMPT_TOKENS] * case.num_rollouts
    return train_flops(case.model, [(PROMPT_TOKENS, responses)])


def predicted(case: Case, recompute: Recompute, device: str) -> int:
    """Bytes on the device at the peak of a step."""
    memory = predict_memory(
        case.model,
        num_tokens=PROMPT_TOKENS + case.targets,  # the rows share their prompt
        num_attended=case.tokens,
        num_targets=case.targets,
        activations=activations_on(device),
        recompute=recompute,
        offload_optimizer=case.offload,
        cuda=device == "cuda",
    )
    return memory.on_device - memory.snapshot


def fitting(case: Case, device: str) -> Recompute | None:
    """The fastest form of recomputation whose step fits the device."""
    if device != "cuda":
        return "none"
    budget = DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return next((form for form in FORMS if predicted(case, form, device) <= budget), None)


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


def hugging_face_step(case: Case, device: str) -> Callable[[], None]:
    """The same tokens as a batch without padding, with torch's SDPA and the same optimizer."""
    activations = activations_on(device)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(**case.shape), attn_implementation="sdpa"
    ).to(device, torch.float32)
    optimizer = ShardedAdamW(model, lr=1e-6, weight_decay=0.1, betas=(0.9, 0.999))
    ids = torch.randint(0, case.model.vocab_size, (case.num_rollouts, case.length), device=device)

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
    case: Case,
    device: str,
    recompute: Recompute,
    *,
    rounds: int,
    mesh: Mesh = ALONE,
    kernels: Kernels = "torch",
) -> tuple[float, float | None]:
    """Seconds of a step, and on a GPU the GB of its peak."""
    held = free_memory(device)
    groups, decoder = one_group(case), random_decoder(case, device, mesh=mesh)
    rank = LearnerRank(
        decoder,
        algorithm=AlgorithmConfig(proximal="current"),
        learner=LearnerConfig(
            **KNOBS,
            microbatch_tokens=case.tokens,
            recompute=recompute,
            offload_optimizer=case.offload,
            kernels=kernels,
        ),
        mesh=mesh,
    )

    def step() -> None:
        assert rank.step(groups).totals["skipped"] == 0
        assert not rank.num_halvings, "the passes were halved, because the device lacks memory"

    took_s = seconds(step, device, rounds=rounds)
    if device != "cuda":
        return took_s, None
    return took_s, (torch.cuda.max_memory_allocated() - held) / 1e9


def free_memory(device: str) -> int:
    """Frees what earlier cases have left, mostly in reference cycles; returns the bytes in use."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def learner(case: Case, device: str, *, rounds: int, mesh: Mesh) -> dict[str, Any]:
    recompute = fitting(case, device)
    if recompute is None:
        need = predicted(case, FORMS[-1], device) / 1e9
        return {"left_out": f"needs {need:.0f} GB, more than {DEVICE_SHARE:.0%} of the device"}
    took_s, peak_gb = own_step(case, device, recompute, rounds=rounds)
    report: dict[str, Any] = {
        "recompute": recompute,
        "tokens_per_s": round(case.tokens / took_s),
        "predicted_gb": round(predicted(case, recompute, device) / 1e9, 3),
    }
    if peak_gb is not None:
        device_name = torch.cuda.get_device_name()
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)
        report["peak_gb"] = round(peak_gb, 3)
        report["mfu"] = None if peak is None else round(step_flops(case) / took_s / peak, 3)
        report["verdict"] = verdict(
            report,
            hardware=device_name,
            num_parameters=sum(map(math.prod, parameter_shapes(case.model).values())),
            published=case.published,
        )
        others: tuple[Kernels, ...] = ("head", "all")
        report["kernels"] = {}
        for kernels in others:
            other_s, gb = own_step(case, device, recompute, rounds=rounds, kernels=kernels)
            report["kernels"][kernels] = {
                "over_torch": round(took_s / other_s, 3),
                "peak_gb": None if gb is None else round(gb, 3),
            }
    if case.beside_hugging_face:
        among_others_s, _ = own_step(case, device, recompute, rounds=rounds, mesh=mesh)
        free_memory(device)
        theirs_s = seconds(hugging_face_step(case, device), device, rounds=rounds)
        report |= {
            "mesh_of_one_over_alone": round(took_s / among_others_s, 2),
            "hugging_face_tokens_per_s": round(case.tokens / theirs_s),
            "over_hugging_face": round(theirs_s / took_s, 2),
        }
    return report


def head(device: str, *, rounds: int) -> dict[str, Any]:
    """Logprobs and entropies forward and backward: in torch, and on a GPU by the fused kernels."""
    tokens, vocabulary, hidden_size = (
        (8192, QWEN_7B["vocab_size"], QWEN_7B["hidden_size"]) if device == "cuda" else (64, 999, 16)
    )
    kind: dict[str, Any] = {"device": device, "dtype": activations_on(device)}
    hidden = torch.randn(tokens, hidden_size, **kind, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, **kind).mul_(0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    temperatures = torch.ones(tokens, device=device)
    report: dict[str, Any] = {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden_size}
    for name, fused in {"torch": False, "fused": True}.items():
        if fused and device != "cuda":
            report[name] = {"left_out": "needs a GPU"}
            continue
        held = free_memory(device)

        def both_passes(fused: bool = fused) -> None:
            logprobs, entropies = token_logprobs(hidden, weight, targets, temperatures, fused=fused)
            (logprobs + 0.01 * entropies).sum().backward()
            hidden.grad = weight.grad = None

        report[name] = {"ms": round(1000 * seconds(both_passes, device, rounds=rounds), 2)}
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() - held
            report[name]["peak_gib"] = round(peak / 2**30, 3)
    return report


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
    device, cases = ("cpu", QUICK) if options.quick else ("cuda", CASES)
    rounds = 1 if options.quick else 5
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "quick": options.quick,
    }
    report["hardware"] = torch.cuda.get_device_name() if device == "cuda" else hardware()
    mesh = mesh_of_one("cuda:0" if device == "cuda" else "cpu")
    report["head"] = head(device, rounds=rounds)
    print(f"head: {json.dumps(report['head'])}", flush=True)
    report["learner"] = {}
    for name, case in cases.items():
        try:
            row = learner(case, device, rounds=rounds, mesh=mesh)
        except torch.OutOfMemoryError as error:
            row = {"left_out": str(error)[:200]}
        report["learner"][name] = row
        print(f"{name}: {json.dumps(row)}", flush=True)
        if options.json:  # after each case: a later one may fail
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
