"""Tiny decoders and engines, and the naive reference that they are held against."""

import numpy as np
import torch

from dapo_async.model import Decoder, ModelConfig, PackedAttention
from dapo_async.rollout import GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.sampling import keyed_uniforms

FAMILIES = {"qwen2": True, "qwen3": False, "llama": False}  # tied embeddings or not


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
}


def tiny_decoder(family="qwen2", seed=1, std=0.25, **sizes):
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


def tiny_engine(family="qwen2", *, num_slots=4, max_len=64, **options):
    return TorchEngine(tiny_decoder(family), num_slots=num_slots, max_len=max_len, **options)


def group(
    group_id, prompt, *, siblings=1, max_tokens=6, temperature=1.0, stop=(), seed=0, **truncation
):
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop_token_ids=stop, seed=seed, **truncation
    )
    return GroupRequest(group_id, np.array(list(prompt), dtype=np.int32), siblings, sampling)


def run(engine, *requests):
    """All requests to their end: completions per group id."""
    for request in requests:
        engine.submit(request)
    finished = {}
    while engine.has_work:
        finished.update(engine.step())
    return finished


@torch.no_grad()
def packed_logprobs(decoder, prompt, response, temperature=1.0):
    """Full-vocabulary logprobs of each response position, `[T, V]`, by one fresh packed forward."""
    ids = torch.tensor([*prompt, *response])
    attention = PackedAttention([len(ids)])
    logits = decoder.logits(decoder(ids, attention.positions, attention)) / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


@torch.no_grad()
def naive_tokens(decoder, request, sibling):
    """Each token by a fresh forward over everything before it and a plain inversion of the distribution."""
    sampling, response = request.sampling, []
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


def chosen(logprobs, completion):
    return (
        logprobs.gather(-1, torch.from_numpy(completion.token_ids).long()[:, None])
        .squeeze(-1)
        .numpy()
    )
