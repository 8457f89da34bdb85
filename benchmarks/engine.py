"""Tokens per second of the native engine against Hugging Face `generate`.

Both run in one process, in alternation, on the same random Qwen2 of 0.85 M parameters: prompts of
32 tokens, 64 new tokens, temperature 1. Hugging Face runs whole batches with the faster of its
caches. The engine runs as many slots in its steady state: a finished slot is refilled at the next
decode step, and every token has its behaviour logprob and weight version. Prefill counts on both
sides. Each prompt is answered 8 times (siblings share a prefill, as in training) or once. With
4 slots it is answered 4 times.

The rates are tokens per second of wall time. On a machine with other work the ratio of CPU seconds
per token is the better figure; it is given too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async.bench.about import commit, cpu_name
from dapo_async.model import load_decoder
from dapo_async.rollout import GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine

PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 32, 64, 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def prompts(batch: int, *, seed: int = 0) -> np.ndarray:
    return (
        np.random.default_rng(seed).integers(0, VOCABULARY, (batch, PROMPT_TOKENS)).astype(np.int32)
    )


# Runs one round: the number of generated tokens.
Contender = Callable[[], int]


def hugging_face(model: Any, batch: int, cache: str | None) -> Contender:
    """A round is one batch to its end."""
    ids = torch.from_numpy(prompts(batch)).long()

    def generate() -> int:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=0,
                cache_implementation=cache,
            )
        assert out.shape == (batch, PROMPT_TOKENS + NEW_TOKENS)
        return batch * NEW_TOKENS

    return generate


def own_engine(folder: Path, batch: int, group_size: int) -> Contender:
    """A round is as many decode steps as a response has tokens."""
    engine = TorchEngine(load_decoder(folder), num_slots=batch, max_len=PROMPT_TOKENS + NEW_TOKENS)
    texts = prompts(4096)

    def requests() -> Iterator[GroupRequest]:
        for key in count():
            # The first requests end one after the other, so that slots end evenly over time.
            first = key * group_size
            new_tokens = 1 + first * NEW_TOKENS // batch if first < batch else NEW_TOKENS
            sampling = SamplingParams(
                max_tokens=new_tokens, temperature=1.0, stop_token_ids=(), seed=0
            )
            yield GroupRequest(key, texts[key % len(texts)], group_size, sampling)

    stream = requests()
    for _ in range(batch // group_size):
        engine.submit(next(stream))

    def decode() -> int:
        tokens = 0
        for _ in range(NEW_TOKENS):
            for _ in engine.step():
                engine.submit(next(stream))
            tokens += engine.num_drawn
        return tokens

    return decode


def measured(contender: Contender) -> tuple[float, float]:
    """Tokens per second of wall time, and per CPU second, of one round."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    tokens = contender()
    return (
        tokens / (time.perf_counter() - start_s),
        tokens / (time.process_time() - start_cpu_s),
    )


def compare(folder: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Medians over `rounds` rounds in alternation, after one round of warm-up.

    A ratio is the median of the ratios of each round.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    contenders = {
        "hugging_face_dynamic": hugging_face(model, batch, None),
        "engine_groups_of_8": own_engine(folder, batch, min(8, batch)),
        "engine_single": own_engine(folder, batch, 1),
        "hugging_face_static": hugging_face(model, batch, "static"),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_index in range(rounds + 1):
        for name, contender in contenders.items():
            rate = measured(contender)
            if round_index:
                rates[name].append(rate)
    medians = {
        name: statistics.median(wall for wall, _ in values) for name, values in rates.items()
    }
    baseline = max(("hugging_face_dynamic", "hugging_face_static"), key=medians.__getitem__)

    def ratio(name: str, clock: int = 0) -> float:
        pairs = zip(rates[name], rates[baseline], strict=True)
        return round(statistics.median(own[clock] / theirs[clock] for own, theirs in pairs), 3)

    return {
        "batch": batch,
        "rounds": rounds,
        "tokens_per_s": {name: round(value) for name, value in medians.items()},
        "baseline": baseline,
        "ratio_groups_of_8": ratio("engine_groups_of_8"),
        "ratio_single": ratio("engine_single"),
        "cpu_ratio_groups_of_8": ratio("engine_groups_of_8", clock=1),
        "cpu_ratio_single": ratio("engine_single", clock=1),
    }


def hardware() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def show(results: list[dict[str, Any]]) -> None:
    """Tokens per second, and the ratios to Hugging Face, as a table."""
    rate_columns = ("HF dynamic", "HF static", "groups of 8", "single")
    columns = (*rate_columns, "groups/HF", "single/HF", "CPU: groups", "CPU: single")
    print(f"{'batch':>6}" + "".join(f"{column:>12}" for column in columns))
    for result in results:
        rates = result["tokens_per_s"]
        names = (
            "hugging_face_dynamic",
            "hugging_face_static",
            "engine_groups_of_8",
            "engine_single",
        )
        cells = [f"{rates[name]:>12}" for name in names]
        ratios = ("ratio_groups_of_8", "ratio_single", "cpu_ratio_groups_of_8", "cpu_ratio_single")
        cells += [f"{result[name]:>12.2f}" for name in ratios]
        print(f"{result['batch']:>6}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument(
        "--quick", action="store_true", help="one batch and one round, instead of five of each"
    )
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE))
        model.save_pretrained(folder)
        batches, rounds = ((64,), 1) if options.quick else ((4, 8, 16, 64, 256), 5)
        results = [compare(Path(folder), batch, rounds) for batch in batches]
    report = {
        "benchmark": "engine",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "results": results,
    }
    show(results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
