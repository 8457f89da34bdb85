"""Real SGLang servers for the tests marked `sglang`: one per model family for the whole session.

Between tests a server is not restarted; it gets its base weights again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dapo_async.model import open_store, read_weights
from dapo_async.rollout import GroupRequest, SamplingParams, WeightUpdate
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.rollout.sglang.server import ServerOptions, SGLangServer
from dapo_async.rollout.slot_control import SlotControl
from dapo_async.utils.state_clock import StateClock
from dapo_async.weights import Manifest, WeightGroup
from dapo_async.weights.collective import GROUP_NAME

VOCABULARY = 97
NUM_SLOTS = 16
MAX_LEN = 512
INCARNATION = "test"
BUCKET_BYTES = 200_000  # several buckets
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
MIXTURE = "qwen3_moe"
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
PROBE = np.arange(5, 17, dtype=np.int32)
Load = Callable[[str, bool], Awaitable[None]]  # see SGLangEngine.update


def make_model(family: str, folder: Path, *, seed: int) -> PreTrainedModel:
    """A random model of the family, saved to `folder`; its distributions are not near uniform."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SIZES, "tie_word_embeddings": False, "dtype": "float32"}
    config = Qwen3MoeConfig(**sizes, **EXPERTS) if family == MIXTURE else CONFIGS[family](**sizes)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.lm_head.weight.mul_(4.0)
    model.save_pretrained(folder)
    ready: PreTrainedModel = model.eval()
    return ready


@torch.no_grad()
def forward_logprobs(
    model: PreTrainedModel,
    prompt: Sequence[int] | NDArray[np.int32],
    response: NDArray[np.int32],
    temperature: float = 1.0,
) -> NDArray[np.float32]:
    """log-softmax(logits / temperature) of each response token, by one forward pass."""
    ids = torch.as_tensor(np.concatenate([prompt, response]), dtype=torch.long)
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].float() / temperature
    chosen: Tensor = logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])
    return chosen.squeeze(-1).numpy()


def request(
    group_id: int,
    prompt: Sequence[int],
    *,
    siblings: int = 1,
    max_tokens: int = 40,
    temperature: float = 1.0,
    stop_token_ids: tuple[int, ...] = (),
) -> GroupRequest:
    """Runs to `max_tokens` without `stop_token_ids`: the models have no stop token of their own."""
    sampled = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop_token_ids=stop_token_ids, seed=0
    )
    return GroupRequest(group_id, np.asarray(prompt, dtype=np.int32), siblings, sampled)


@dataclass(frozen=True, slots=True)
class World:
    """A server and two models: `base`, which it was started with, and `other`."""

    server: SGLangServer
    folder: Path
    base: PreTrainedModel
    other: PreTrainedModel
    other_folder: Path

    def client(self, url: str | None = None, *, silence_s: float = 120.0) -> SGLangClient:
        """A client of the server, or of a proxy for it at `url`."""
        return SGLangClient(
            url or self.server.url, api_key=self.server.api_key, silence_s=silence_s
        )

    @asynccontextmanager
    async def engine(
        self, weight_update: WeightUpdate = "recompute"
    ) -> AsyncIterator[SGLangEngine]:
        """An engine on the server that serves the base weights as version 0."""
        client = self.client(silence_s=30.0)
        engine = make_engine(client, weight_update)
        try:
            await client.resume()  # the test before may have paused it
            await engine.update(from_disk(client, self.folder), version=0, probe_ids=PROBE)
            yield engine
        finally:
            await engine.close()


def make_engine(
    client: SGLangClient,
    weight_update: WeightUpdate = "recompute",
    *,
    num_slots: int = NUM_SLOTS,
    control: SlotControl | None = None,
) -> SGLangEngine:
    return SGLangEngine(
        client,
        StateClock("test"),
        num_slots=num_slots,
        weight_update=weight_update,
        incarnation=INCARNATION,
        control=control,
    )


def from_disk(client: SGLangClient, folder: Path) -> Load:
    """Loads the weights in `folder`."""

    async def load(weight_version: str, flush: bool) -> None:
        await client.update_from_disk(str(folder), weight_version=weight_version, flush=flush)

    return load


@asynccontextmanager
async def broadcasting(
    client: SGLangClient, folder: Path, *, breaks_off: bool = False
) -> AsyncIterator[Load]:
    """Yields a load by broadcast of the weights in `folder`; this process is the learner.

    `breaks_off`: the learner closes its group after the first bucket.
    """
    store = open_store("127.0.0.1", timeout_s=30.0)
    joining = asyncio.create_task(
        client.join_group(
            ("127.0.0.1", store.port), name=GROUP_NAME, first_rank=1, world_size=2, backend="gloo"
        )
    )
    group = await asyncio.to_thread(
        WeightGroup, store, rank=0, world_size=2, host="127.0.0.1", device="cpu", timeout_s=30.0
    )
    await joining
    weights: dict[str, Tensor] = read_weights(folder)
    manifest = Manifest.of(weights)
    buckets = list(manifest.buckets(BUCKET_BYTES))
    assert len(buckets) > 1

    def send() -> None:
        nonlocal group
        first = Manifest(tuple(buckets[0]))
        group.send(weights, first if breaks_off else manifest, bucket_bytes=BUCKET_BYTES)
        if breaks_off:
            del group

    async def load(weight_version: str, flush: bool) -> None:
        sending = asyncio.create_task(asyncio.to_thread(send))
        headers = [(GROUP_NAME, [spec.header for spec in bucket]) for bucket in buckets]
        await client.receive(headers, weight_version=weight_version, flush=flush)
        await sending

    try:
        yield load
    finally:
        await client.leave_group(GROUP_NAME)


def start_world(
    family: str,
    root: Path,
    *flags: str,
    num_slots: int = NUM_SLOTS,
    tensor_parallel: int = 1,
    host: str = "127.0.0.1",
) -> World:
    """`flags`: more arguments of the server."""
    folder, other_folder = root / "base", root / "other"
    base, other = make_model(family, folder, seed=1), make_model(family, other_folder, seed=2)
    options = ServerOptions(
        model=folder,
        dtype="float32",
        device="cpu",
        tensor_parallel=tensor_parallel,
        num_slots=num_slots,
        max_len=MAX_LEN,
        host=host,
        seed=0,
        log=root / "server.log",
        extra=flags,
    )
    server = SGLangServer(options)
    asyncio.run(server.start(timeout_s=240.0))
    return World(server, folder, base, other, other_folder)
