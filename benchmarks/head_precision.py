"""What a head in float32 does to the mismatch: an SGLang server in bfloat16, with and without it.

python benchmarks/head_precision.py [--json OUT] [--quick]

The learner sums its logits in float32. A server in bfloat16 rounds them, unless it is started with
`--enable-fp32-lm-head`, as a run starts it. The same prompts go to both servers; the learner's
decoder, in bfloat16 on the same weights, scores the responses. `mean` and `max` are of the absolute
difference of the logprobs in nats. The model is random, its logits are about as far apart as those
of a trained one.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import SHAPE
from sglang_engine import HOST, requests, sglang
from support.output import show, write_result
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async.model import load_decoder
from dapo_async.model.attention import PackedAttention
from dapo_async.model.decoder import Decoder
from dapo_async.rollout import GroupRequest
from dapo_async.rollout.sglang.server import FP32_HEAD, ServerOptions, SGLangServer

WIDE = {**SHAPE, "vocab_size": 32_000, "hidden_size": 256, "initializer_range": 0.15}
NEW_TOKENS, RESPONSES = 64, 32


@dataclass(frozen=True, slots=True)
class RoundedHead(ServerOptions):
    """A server that rounds its logits to bfloat16."""

    def command(self, port: int, group_port: int) -> list[str]:
        words = ServerOptions.command(self, port, group_port)
        return [word for word in words if word != FP32_HEAD]


def score(decoder: Decoder, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The learner's logprobs of a response, float32 `[N]`."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    attention = PackedAttention((len(ids),))
    first = len(prompt)
    with torch.no_grad():
        logprobs, _ = decoder.score(
            ids,
            attention.positions,
            attention,
            predictors=torch.arange(first - 1, len(ids) - 1),
            targets=ids[first:],
            temperatures=torch.ones(len(ids) - first),
        )
    return logprobs.numpy()


async def differences(
    server: SGLangServer, decoder: Decoder, batch: list[GroupRequest]
) -> np.ndarray:
    """Absolute differences between server and learner, one per token."""
    async with sglang(server, "recompute") as (engine, _):
        answers = await asyncio.gather(*(engine.generate(each) for each in batch))
    return np.concatenate(
        [
            np.abs(each.behaviour_logprobs - score(decoder, request.prompt_ids, each.token_ids))
            for request, completions in zip(batch, answers, strict=True)
            for each in completions
        ]
    )


def measure(folder: Path, log: Path, *, responses: int) -> list[dict[str, Any]]:
    decoder, rows = load_decoder(folder, dtype=torch.bfloat16), []
    batch = requests(responses, NEW_TOKENS)
    for name, kind in (("float32", ServerOptions), ("rounded to bfloat16", RoundedHead)):
        options = kind(
            model=folder,
            dtype="bfloat16",
            device="cpu",
            tensor_parallel=1,
            num_slots=64,
            max_len=128,
            host=HOST,
            seed=0,
            log=log,
        )
        server = SGLangServer(options)
        asyncio.run(server.start(timeout_s=300.0))
        try:
            apart = asyncio.run(differences(server, decoder, batch))
        finally:
            asyncio.run(server.close())
        rows.append(
            {
                "server's logits": name,
                "tokens": len(apart),
                "mean": round(float(apart.mean()), 5),
                "p99": round(float(np.quantile(apart, 0.99)), 5),
                "max": round(float(apart.max()), 5),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="four responses")
    options = parser.parse_args()
    if importlib.util.find_spec("sglang") is None:
        sys.exit("SGLang is not installed; run cluster/sglang_cpu/install.sh first")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        model = AutoModelForCausalLM.from_config(Qwen2Config(**WIDE)).bfloat16()
        model.save_pretrained(folder)
        rows = measure(folder, Path(root) / "log", responses=4 if options.quick else RESPONSES)
    show(rows)
    write_result(options.json, "head_precision", rows=rows)


if __name__ == "__main__":
    main()
