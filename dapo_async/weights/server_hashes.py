"""Hashes of weights as an SGLang server computes them (`/weights_checker`), from the learner's own.

In: a snapshot's weights and the layout of a server. Out: per tensor-parallel rank the hash of each
of its tensors. With equal hashes the server holds the learner's bits. The learner computes them
beside its next step; `tensor_proof.py` compares. The formulas are those of SGLang 0.5.21
(`sglang/srt/utils/weight_checker.py` and `managers/mm_utils.py`):

    on a CPU  the first 8 bytes of SHA-256 over the tensor's bytes
    on CUDA   for each 32-bit word v at index i, with a mix f (MurmurHash3's last steps), for two
              seeds s and factors p: h = Σ f(v ^ ((i·p + s) ^ rotate(i))) over tiles of 8,192 words;
              the tiles' two halves, mixed with their size, add up to 64 bits; last splitmix64

A server joins query, key and value, and gate and up; it splits heads, inner sizes and vocabulary
over its ranks, and pads the vocabulary to a multiple of 64 with zeros. It stacks the experts of a
layer: `w13_weight` has gate and up of each, `w2_weight` down. They are divided over its groups of
expert parallelism, and the inner size of each over the ranks of a group. Some kernels for experts
have another order of rows; then the hashes differ for every expert, and none is compared.

A publish hashes an eighth of the weights (`drawn`), because a word takes 20 operations and whole
tensors have to be brought together. The form for CUDA is tested against a loop over the words; it
has not been compared with a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shlex
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dapo_async.model import ModelConfig
from dapo_async.weights.tensor_proof import ROUND

RankHashes = Mapping[str, str]  # by the server's name of the tensor
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
ROWS, COLUMNS = ("q_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")  # split over ranks
KEYS = ("k_proj", "v_proj")
EXPERTS = ".mlp.experts."
STACKED = {"gate_proj": "w13_weight", "up_proj": "w13_weight", "down_proj": "w2_weight"}
VOCABULARY, PADDING = ("embed_tokens", "lm_head"), 64
TILE = 8192  # words
SEED = 0x243F6A88
SEEDS = (SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
FACTORS, ROTATIONS = (0x27D4EB2D, 0x165667B1), (15, 13)
WORD, LONG = 2**32 - 1, 2**64 - 1
CHUNK_TILES = 512


def server_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The server's tensors, each with the Hugging Face names that it is joined from, in order."""
    joined = {part: (whole, parts) for whole, parts in JOINED.items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        module = name.split(".")[-2]
        if EXPERTS in name:  # in the order of the experts, each gate before up
            stem = name.partition(EXPERTS)[0]
            whole = f"{stem}{EXPERTS}{STACKED[module]}"
            found[whole] = (*found.get(whole, ()), name)
            continue
        whole, parts = joined.get(module, (module, (module,)))
        found[name.replace(f".{module}.", f".{whole}.")] = tuple(
            name.replace(f".{module}.", f".{part}.") for part in parts
        )
    return found


def drawn(sizes: Mapping[str, int], *, version: int) -> dict[str, tuple[str, ...]]:
    """As `server_names`: the tensors that are hashed when `version` is published.

    `sizes`: the bytes of each tensor, by Hugging Face name. The server's tensors are dealt into
    `ROUND` parts of nearly equal bytes. Versions 8r … 8r + 7 take one part each, in an order that
    is another one in each round: so a fault that comes back every second publish meets all parts.
    """
    tensors = server_names(sizes)
    bytes_of = {name: sum(sizes[part] for part in parts) for name, parts in tensors.items()}
    loads, part_of = [0] * ROUND, dict[str, int]()
    for name in sorted(tensors, key=lambda name: (-bytes_of[name], name)):
        part_of[name] = number = loads.index(min(loads))
        loads[number] += bytes_of[name]
    turn, place = divmod(version, ROUND)
    order = random.Random(turn).sample(range(ROUND), ROUND)
    return {name: parts for name, parts in tensors.items() if part_of[name] == order[place]}


def server_hashes(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    tensor_parallel: int,
    expert_parallel: int = 1,
    cuda: bool,
) -> tuple[RankHashes, ...]:
    """Per rank of a server: the hashes of its tensors that consist of `weights`, by name.

    `weights` have Hugging Face names, experts one by one. `expert_parallel`: the groups of ranks
    that experts are divided over (SGLang's `--ep-size`).
    """
    hashed = cuda_hash if cuda else cpu_hash
    ranks: list[dict[str, str]] = [{} for _ in range(tensor_parallel)]
    for name, parts in server_names(weights).items():
        for rank, hashes in enumerate(ranks):
            held = (
                _of_rank(weights[part], part, config, rank, tensor_parallel, expert_parallel)
                for part in parts
            )
            pieces = [piece for piece in held if piece is not None]
            hashes[name] = f"{hashed(torch.cat(pieces)):016x}"
    return tuple(ranks)


def _of_rank(
    whole: Tensor, name: str, config: ModelConfig, rank: int, size: int, expert_parallel: int
) -> Tensor | None:
    """What a rank of a server holds of a tensor; None: nothing, of an expert of other ranks."""
    module = name.split(".")[-2]
    if EXPERTS in name:
        expert, size = int(name.split(".")[-3]), size // expert_parallel
        group, rank = divmod(rank, size)
        if expert // (config.num_experts // expert_parallel) != group:
            return None
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


def expert_parallel_of(server_flags: str) -> int:
    """Over how many groups of ranks servers with these flags divide their experts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--expert-parallel-size", "--ep-size", "--ep", type=int, default=1)
    known, _ = parser.parse_known_args(shlex.split(server_flags))
    return int(known.expert_parallel_size)


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
    count = len(words)
    size = (count * 4) & WORD
    total = torch.zeros((), dtype=torch.int64, device=words.device)  # modulo 2^64
    for first in range(0, count, CHUNK_TILES * TILE):
        chunk = words[first : first + CHUNK_TILES * TILE].to(torch.int64) & WORD
        index = torch.arange(first, first + len(chunk), device=chunk.device)
        high, low = (_mix(_tile_sums(chunk, index, number) ^ size) for number in range(2))
        total += ((high << 32) | low).sum()
    return _last_mix(int(total) & LONG) if count else 0


def _tile_sums(words: Tensor, index: Tensor, number: int) -> Tensor:
    """The sum of the mixed words of each tile, modulo 2^32."""
    rotation = ROTATIONS[number]
    rotated = ((index << rotation) | ((index & WORD) >> (32 - rotation))) & WORD
    place = ((index * FACTORS[number] + SEEDS[number]) & WORD) ^ rotated
    mixed = _mix(words ^ place)
    mixed = torch.nn.functional.pad(mixed, (0, -len(mixed) % TILE))
    return mixed.view(-1, TILE).sum(1) & WORD


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
