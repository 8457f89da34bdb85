"""Tiny decoders and engines, and a naive reference to compare them with."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.model import Decoder, ModelConfig, PackedAttention
from dapo_async.rollout import GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.sampling import keyed_uniforms
from dapo_async.types import Completion

# Tied embeddings or not.
FAMILIES = {"qwen2": True, "qwen3": False, "llama": False, "qwen3_moe": False}


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    # Of the family with experts.
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def tiny_decoder(family: str = "qwen2", seed: int = 1, std: float = 0.25, **sizes: Any) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(
        ModelConfig.from_dict(
            {**SIZES, **sizes, "model_type": family, "tie_word_embeddings": FAMILIES[family]}
        )
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def tiny_engine(
    family: str = "qwen2", *, num_slots: int = 4, max_len: int = 64, **options: Any
) -> TorchEngine:
    return TorchEngine(tiny_decoder(family), num_slots=num_slots, max_len=max_len, **options)


def group(
    group_id: int,
    prompt: Iterable[int],
    *,
    siblings: int = 1,
    max_tokens: int = 6,
    temperature: float = 1.0,
    stop: tuple[int, ...] = (),
    seed: int = 0,
    **truncation: Any,
) -> GroupRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop_token_ids=stop, seed=seed, **truncation
    )
    return GroupRequest(group_id, np.array(list(prompt), dtype=np.int32), siblings, sampling)


def run(engine: TorchEngine, *requests: GroupRequest) -> dict[int, tuple[Completion, ...]]:
    """Runs all requests to their end; returns completions per group id."""
    for request in requests:
        engine.submit(request)
    finished: dict[int, tuple[Completion, ...]] = {}
    while engine.has_work:
        finished.update(engine.step())
    return finished


@torch.no_grad()
def packed_logprobs(
    decoder: Decoder,
    prompt: Iterable[int],
    response: Iterable[int],
    temperature: float = 1.0,
) -> Tensor:
    """Full-vocabulary logprobs of each response position, `[T, V]`, by one fresh packed forward."""
    prompt = list(prompt)
    ids = torch.tensor([*prompt, *response])
    attention = PackedAttention([len(ids)])
    logits = decoder.logits(decoder(ids, attention.positions, attention)) / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


@torch.no_grad()
def naive_tokens(decoder: Decoder, request: GroupRequest, sibling: int) -> list[int]:
    """Draws each token by a fresh forward pass and a plain inversion of the distribution."""
    sampling = request.sampling
    response: list[int] = []
    uniforms = keyed_uniforms(
        sampling.seed,
        group_id=request.group_id,
        siblings=range(sibling, sibling + 1),
        num_tokens=sampling.max_tokens,
    )[0]
    for uniform in uniforms.tolist():
        probabilities = (
            packed_logprobs(decoder, request.prompt_ids, [*response, 0], sampling.temperature)[-1]
            .double()
            .exp()
        )
        token, below = 0, float(probabilities[0])
        while below <= uniform:
            token += 1
            below += float(probabilities[token])
        response.append(token)
        if token in sampling.stop_token_ids:
            break
    return response


def chosen(logprobs: Tensor, completion: Completion) -> NDArray[np.float32]:
    ids = torch.from_numpy(completion.token_ids).long()[:, None]
    values: NDArray[np.float32] = logprobs.gather(-1, ids).squeeze(-1).numpy()
    return values
