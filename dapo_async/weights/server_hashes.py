"""Hashes of weights as an SGLang server computes them (`/weights_checker`), from the learner's own.

In: a snapshot's weights and the layout of a server. Out: per tensor-parallel rank the hash of each
of its tensors. With equal hashes the server holds the learner's bits. The learner computes them
beside its next step; the handshake compares. The formulas are those of SGLang 0.5.21
(`sglang/srt/utils/weight_checker.py` and `managers/mm_utils.py`):

    on a CPU  the first 8 bytes of SHA-256 over the tensor's bytes
    on CUDA   for each 32-bit word v at index i, with a mix f (MurmurHash3's last steps), for two
              seeds s and factors p: h = Σ f(v ^ ((i·p + s) ^ rotate(i))) over tiles of 8,192 words;
              the tiles' two halves, mixed with their size, add up to 64 bits; last splitmix64

A server joins query, key and value, and gate and up; it splits heads, inner sizes and vocabulary
over its ranks, and pads the vocabulary to a multiple of 64 with zeros. Experts are left out: their
layout depends on the server's kernel, and the probe sees them. The form for CUDA is tested
against a loop over the words; it has not been compared with a GPU.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dapo_async.model import ModelConfig

RankHashes = Mapping[str, str]  # by the server's name of the tensor
# Of the weights that are hashed per publish, chosen anew each time: a word takes 20 operations.
HASHED_BYTES = 2**30
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
ROWS, COLUMNS = ("q_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")  # split over ranks
KEYS = ("k_proj", "v_proj")
EXPERTS = ".mlp.experts."
VOCABULARY, PADDING = ("embed_tokens", "lm_head"), 64
TILE = 8192  # words
SEED = 0x243F6A88
SEEDS = (SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
FACTORS, ROTATIONS = (0x27D4EB2D, 0x165667B1), (15, 13)
WORD, LONG = 2**32 - 1, 2**64 - 1
CHUNK_TILES = 64


def server_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The server's tensors, each with the Hugging Face names that it is joined from."""
    joined = {part: (whole, parts) for whole, parts in JOINED.items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        if EXPERTS in name:
            continue
        module = name.split(".")[-2]
        whole, parts = joined.get(module, (module, (module,)))
        found[name.replace(f".{module}.", f".{whole}.")] = tuple(
            name.replace(f".{module}.", f".{part}.") for part in parts
        )
    return found


def chosen_tensors(
    sizes: Mapping[str, int], *, most_bytes: int = HASHED_BYTES, seed: str | None = None
) -> dict[str, tuple[str, ...]]:
    """As `server_names`, of as many tensors as `most_bytes` hold and at least one, drawn at random.

    `sizes`: the bytes of each tensor. Equal seeds draw alike; None: anew each time.
    """
    tensors = [*server_names([*sizes]).items()]
    (random.SystemRandom() if seed is None else random.Random(seed)).shuffle(tensors)
    chosen: dict[str, tuple[str, ...]] = {}
    left = most_bytes
    for name, parts in tensors:
        left -= sum(sizes[part] for part in parts)
        if left >= 0 or not chosen:
            chosen[name] = parts
    return chosen


def server_hashes(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    tensor_parallel: int,
    cuda: bool,
    most_bytes: int = HASHED_BYTES,
) -> tuple[RankHashes, ...]:
    """Per rank of a server: the hashes of tensors, drawn at random until `most_bytes` are full."""
    hashed = cuda_hash if cuda else cpu_hash
    ranks: list[dict[str, str]] = [{} for _ in range(tensor_parallel)]
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    for name, parts in chosen_tensors(sizes, most_bytes=most_bytes).items():
        for rank, hashes in enumerate(ranks):
            pieces = [
                _of_rank(weights[part], part.split(".")[-2], config, rank, tensor_parallel)
                for part in parts
            ]
            hashes[name] = f"{hashed(torch.cat(pieces)):016x}"
    return tuple(ranks)


def _of_rank(whole: Tensor, module: str, config: ModelConfig, rank: int, size: int) -> Tensor:
    """What a rank of a server holds of a tensor."""
    if module in COLUMNS:
        return whole.chunk(size, dim=1)[rank]
    if module in ROWS:
        return whole.chunk(size)[rank]
    if module in KEYS:
        heads = min(size, config.num_kv_heads)  # more ranks than heads: several hold the same one
        return whole.chunk(heads)[rank * heads // size]
    if module in VOCABULARY:
        padded = -(-len(whole) // PADDING) * PADDING
        if padded % size:
            padded = -(-len(whole) // (PADDING * size)) * PADDING * size
        zeros = whole.new_zeros((padded - len(whole), *whole.shape[1:]))
        return torch.cat((whole, zeros)).chunk(size)[rank]
    return whole


def cpu_hash(tensor: Tensor) -> int:
    """As a server on a CPU computes it."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return int.from_bytes(hashlib.sha256(data.tobytes()).digest()[:8], "big")


@torch.no_grad()
def cuda_hash(tensor: Tensor) -> int:
    """As a server on CUDA computes it, on the device of `tensor`."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % 4))
    words = data.view(torch.int32)
    count, total = len(words), 0
    for first in range(0, count, CHUNK_TILES * TILE):
        chunk = words[first : first + CHUNK_TILES * TILE].to(torch.int64) & WORD
        index = torch.arange(first, first + len(chunk), device=chunk.device)
        high, low = (_tile_sums(chunk, index, number) for number in range(2))
        size = (count * 4) & WORD
        total += sum((one << 32) | other for one, other in _mixed(high, low, size))
    return _last_mix(total & LONG) if count else 0


def _tile_sums(words: Tensor, index: Tensor, number: int) -> Tensor:
    """The sum of the mixed words of each tile, modulo 2^32."""
    rotation = ROTATIONS[number]
    rotated = ((index << rotation) | ((index & WORD) >> (32 - rotation))) & WORD
    place = ((index * FACTORS[number] + SEEDS[number]) & WORD) ^ rotated
    mixed = _mix(words ^ place)
    mixed = torch.nn.functional.pad(mixed, (0, -len(mixed) % TILE))
    return mixed.view(-1, TILE).sum(1) & WORD


def _mixed(high: Tensor, low: Tensor, size: int) -> Iterator[tuple[int, int]]:
    return zip(_mix(high ^ size).tolist(), _mix(low ^ size).tolist(), strict=True)


def _mix(x: Tensor) -> Tensor:
    """The last steps of MurmurHash3 on unsigned 32-bit numbers in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def _last_mix(x: int) -> int:
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & LONG
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & LONG
    return x ^ (x >> 31)
