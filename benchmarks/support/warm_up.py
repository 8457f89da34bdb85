"""The tasks of `against_trl.py`, and a checkpoint for each that solves it in part.

A problem is four digits. The answer is the sum of the last two, of which the chain and the fixed
task want the last digit. The responses differ in length:

    short   ####13<eos>                        3 or 4 tokens, 3.67 in the mean
    chain   2726…0201####3<eos>                counts down from the first two digits: 19 to 57
    fixed   ####3####3…                        192 tokens, no end token

The warm-up is next-token training on right responses. It ends when the model gives the whole right
response with the wanted probability, so that reinforcement learning has something left to learn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dapo_async.model import (
    Decoder,
    ModelConfig,
    PackedAttention,
    save_weights,
    token_logprobs,
)

sys.path.append(str(Path(__file__).resolve().parents[2]))

from configs.base.make_quickstart import (
    EOS,
    MARKER,
    TOKEN_ID,
    VOCABULARY,
    encode,
    write_tokenizer,
)

FIXED_TOKENS = 192
CHECK_EVERY, CHECKED = 5, 64  # steps; problems
BATCH_TOKENS = 2500
LR = 2e-3


@dataclass(frozen=True, slots=True)
class Task:
    """Its batch in groups, and the longest response in tokens."""

    name: str
    groups: int
    max_response_tokens: int

    def problem(self, rng: np.random.Generator) -> tuple[str, str, list[int]]:
        """A problem, its answer, and the tokens of the right response."""
        first = int(rng.integers(8, 28))
        one, other = (int(each) for each in rng.integers(2, 10, 2))
        answer = str(one + other) if self.name == "short" else str((one + other) % 10)
        text = f"{MARKER}{answer}"
        if self.name == "fixed":
            ids = encode(text) * (FIXED_TOKENS // 2)
        else:
            chain = "".join(f"{each:02}" for each in range(first, 0, -1))
            prefix = chain if self.name == "chain" else ""
            ids = [*encode(prefix + text), TOKEN_ID[EOS]]
        return f"{first:02}{one}{other}", answer, ids

    def problems(self, seed: int) -> Iterator[tuple[str, str, list[int]]]:
        rng = np.random.default_rng(seed)
        while True:
            yield self.problem(rng)


TASKS = {
    "chain": Task("chain", groups=8, max_response_tokens=64),
    "fixed": Task("fixed", groups=8, max_response_tokens=FIXED_TOKENS),
    "short": Task("short", groups=16, max_response_tokens=8),
}


def model_config(*, tiny: bool) -> dict[str, object]:
    """0.79 M parameters, or a tiny form."""
    hidden, layers = (32, 1) if tiny else (128, 4)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(VOCABULARY),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "eos_token_id": TOKEN_ID[EOS],
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def warm_checkpoint(
    task: Task, folder: Path, *, wanted: float, max_steps: int, tiny: bool
) -> tuple[int, float]:
    """Writes the Hugging Face folder; returns the steps and the probability of a right response."""
    torch.manual_seed(0)
    config = model_config(tiny=tiny)
    decoder = Decoder(ModelConfig.from_dict(config))
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LR, weight_decay=0.0)
    stream, probability, step = task.problems(seed=1), 0.0, 0
    while step < max_steps and probability < wanted:
        for _ in range(CHECK_EVERY):
            loss = -_response_logprobs(decoder, _batch(stream))[0].mean()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        step += CHECK_EVERY
        with torch.no_grad():
            checked = [next(stream) for _ in range(CHECKED)]
            logprobs, owners = _response_logprobs(decoder, checked)
            sums = torch.zeros(CHECKED).index_add(0, owners, logprobs)
            probability = float(sums.exp().mean())
    _write(decoder, folder, config)
    return step, probability


def write_problems(task: Task, path: Path, *, seed: int, count: int = 4096) -> None:
    """JSONL rows with repetitions: there are 1,280 problems."""
    rows = (
        {"prompt": text, "answer": answer}
        for (text, answer, _), _ in zip(task.problems(seed), range(count), strict=False)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _batch(stream: Iterator[tuple[str, str, list[int]]]) -> list[tuple[str, str, list[int]]]:
    chosen, tokens = [], 0
    while tokens < BATCH_TOKENS:
        chosen.append(next(stream))
        tokens += len(chosen[-1][2]) + 5
    return chosen


def _response_logprobs(
    decoder: Decoder, problems: list[tuple[str, str, list[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs of all response tokens `[T]`, and which problem each belongs to."""
    prompts = [encode(f"{text}=") for text, _, _ in problems]
    rows = [prompt + response for prompt, (_, _, response) in zip(prompts, problems, strict=True)]
    order = sorted(range(len(rows)), key=lambda each: len(rows[each]))
    ids = torch.tensor([token for each in order for token in rows[each]])
    owners = torch.tensor([each for each in order for _ in rows[each]])
    trained = torch.tensor(
        [place >= len(prompts[each]) for each in order for place in range(len(rows[each]))]
    )
    attention = PackedAttention([len(rows[each]) for each in order])
    hidden = decoder(ids, attention.positions, attention)
    targets = trained.nonzero()[:, 0]
    logprobs, _ = token_logprobs(
        hidden[targets - 1],
        decoder.head_weight,
        ids[targets],
        torch.ones(len(targets)),
        chunk_tokens=len(targets),
    )
    return logprobs, owners[targets]


def _write(decoder: Decoder, folder: Path, config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": TOKEN_ID[EOS], "do_sample": True, "temperature": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(folder)
    save_weights(decoder.state_dict(), folder)
