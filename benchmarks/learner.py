"""The learner's step against Hugging Face's model; the head against whole logits.

- Steps: the same rollouts (different lengths, or all of one length), the same AdamW, clipping and
  microbatches, one thread. The forms alternate. Hugging Face pads each microbatch of rollouts of
  similar length; the learner packs them, and also computes entropies and all its diagnostics.
  With one minibatch `recompute` makes no second forward pass, so both forms cost the same. A ratio
  is the median of the ratios of the rounds. The learner computes the prompt of siblings once. On a
  machine with other work the ratio of CPU seconds is the better figure; it is given too.
- Head: forward and backward pass at V = 151,936, T = 4,096, D = 256, each in a new process.
  `extra_mb` is the growth of its peak memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import SHAPE, VOCABULARY, hardware
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async.bench.about import commit
from dapo_async.bench.made_up import made_up_group
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.learner.batch_plan import share_minibatch
from dapo_async.learner.batching import TrainingSequence, pack, training_sequences
from dapo_async.learner.optimizer import BETAS, ShardedAdamW
from dapo_async.model import load_decoder, token_logprobs
from dapo_async.types import Group, GroupFacts

SHAPES = {
    "0.9 M": (SHAPE, 8),
    "5 M": ({**SHAPE, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}, 4),
    "50 M": (
        {
            **SHAPE,
            "hidden_size": 640,
            "intermediate_size": 1920,
            "num_hidden_layers": 10,
            "num_attention_heads": 10,
        },
        1,
    ),
}  # and groups of rollouts per step
GROUP_SIZE, PROMPT_TOKENS, SHORTEST, LONGEST = 8, 32, 16, 160
LENGTHS = ("even", "different")
KNOBS = LearnerConfig(lr=1e-5, warmup_steps=0, microbatch_tokens=4096)
HEAD = {"vocabulary": 151_936, "tokens": 4096, "size": 256}
QUICK_HEAD = {"vocabulary": 20_000, "tokens": 512, "size": 64}


def rollouts(num_groups: int, *, even: bool) -> list[Group]:
    """`even`: all of one length, about the mean of the other form, so that no form pads."""
    lengths = np.random.default_rng(0).integers(SHORTEST, LONGEST, (num_groups, GROUP_SIZE))
    if even:
        lengths[:] = (SHORTEST + LONGEST) // 2
    return [
        made_up_group(index, row, prompt_tokens=PROMPT_TOKENS, vocabulary=VOCABULARY)
        for index, row in enumerate(lengths)
    ]


def own_step(folder: Path, groups: list[Group], proximal: Any) -> Callable[[], None]:
    rank = LearnerRank(
        load_decoder(folder), algorithm=AlgorithmConfig(proximal=proximal), learner=KNOBS
    )

    def step() -> None:
        assert rank.step(groups).totals["skipped"] == 0

    return step


def neighbours(
    sequences: Sequence[TrainingSequence], max_tokens: int
) -> Iterator[list[TrainingSequence]]:
    """Sequences that follow each other, at most `max_tokens` at a time."""
    part: list[TrainingSequence] = []
    for each in sequences:
        if part and sum(other.num_tokens for other in part) + each.num_tokens > max_tokens:
            yield part
            part = []
        part.append(each)
    yield part


def hugging_face_step(folder: Path, groups: list[Group]) -> Callable[[], None]:
    """Right padding; the clipped policy gradient over all response tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = ShardedAdamW(model, lr=KNOBS.lr, weight_decay=KNOBS.weight_decay, betas=BETAS)
    (share,) = share_minibatch(
        [GroupFacts.of(group) for group in groups],
        num_ranks=1,
        max_tokens=KNOBS.fixed_microbatch_tokens,
        pair_cost=0.0,
    )
    sequences = training_sequences(
        groups, share.groups, normalize_std=True, overlong_filtering=False
    )
    by_length = sorted(sequences, key=lambda each: each.num_tokens)
    # Each rollout is a group of its own: rollouts of similar length share a microbatch.
    alone = [replace(each, group=number) for number, each in enumerate(by_length)]
    batches = [pack(part) for part in neighbours(alone, KNOBS.fixed_microbatch_tokens)]
    num_tokens = sum(len(batch.targets) for batch in batches)

    def logprobs_of(batch: Any) -> Tensor:
        lengths = [length + 1 for length in batch.lengths]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        live = torch.zeros_like(ids)
        starts = batch.token_ids.split(batch.lengths)
        responses = batch.targets.split([length - PROMPT_TOKENS for length in lengths])
        for row, (start, response) in enumerate(zip(starts, responses, strict=True)):
            whole = torch.cat((start, response[-1:]))
            ids[row, : len(whole)], live[row, : len(whole)] = whole, 1
        logits = model(input_ids=ids, attention_mask=live).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return torch.cat(
            [logprobs[row, PROMPT_TOKENS - 1 : length - 1] for row, length in enumerate(lengths)]
        )

    def step() -> None:
        for batch in batches:
            logprobs = logprobs_of(batch)
            ratio = (logprobs - logprobs.detach()).exp()
            gain = torch.minimum(
                ratio * batch.advantages, ratio.clamp(0.8, 1.28) * batch.advantages
            )
            (-gain.sum() / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), KNOBS.grad_clip)
        optimizer.step(lr=KNOBS.lr)
        optimizer.zero_grad()

    return step


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start_s, time.process_time() - start_cpu_s


def steps(name: str, *, rounds: int, even: bool) -> dict[str, Any]:
    shape, num_groups = SHAPES[name]
    groups = rollouts(num_groups, even=even)
    num_tokens = sum(group.num_tokens for group in groups)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape))
        model.save_pretrained(folder)
        works = {
            "hugging_face": hugging_face_step(Path(folder), groups),
            "current": own_step(Path(folder), groups, "current"),
            "recompute": own_step(Path(folder), groups, "recompute"),
        }
    taken = [{each: seconds(work) for each, work in works.items()} for _ in range(rounds + 1)][1:]

    def ratio(slow: str, fast: str, *, clock: int = 0) -> float:
        return round(statistics.median(row[slow][clock] / row[fast][clock] for row in taken), 3)

    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": num_tokens,
        "tokens_per_s": {
            each: round(num_tokens / statistics.median(row[each][0] for row in taken))
            for each in works
        },
        "current_over_hugging_face": ratio("hugging_face", "current"),
        "current_over_hugging_face_cpu": ratio("hugging_face", "current", clock=1),
        "recompute_over_current": ratio("current", "recompute"),
        "load": round(os.getloadavg()[0], 1),
    }


def head(form: str, sizes: dict[str, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(sizes["tokens"], sizes["size"], requires_grad=True)
    weight = (torch.randn(sizes["vocabulary"], sizes["size"]) * 0.02).requires_grad_()
    targets = torch.randint(0, sizes["vocabulary"], (sizes["tokens"],))
    temperature = torch.ones(sizes["tokens"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_s = time.perf_counter()
    if form == "chunked":
        logprobs, entropies = token_logprobs(hidden, weight, targets, temperature)
    else:
        table = ((hidden @ weight.t()) / temperature[:, None]).log_softmax(-1)
        logprobs = table.gather(-1, targets[:, None]).squeeze(-1)
        entropies = -(table.exp() * table).sum(-1)
    (logprobs.sum() + 0.1 * entropies.sum()).backward()
    took_s = time.perf_counter() - start_s
    assert weight.grad is not None
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    return {
        "seconds": round(took_s, 2),
        "extra_mb": round(extra * 1024 / 1e6),
        "of_it_gradients_mb": round(4e-6 * (weight.numel() + hidden.numel())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the small model alone on one kind of rollouts, once, and a small head",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    names, kinds = (list(SHAPES)[:1], LENGTHS[:1]) if options.quick else (list(SHAPES), LENGTHS)
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as alone:
        heads = {
            form: alone.submit(head, form, QUICK_HEAD if options.quick else HEAD).result()
            for form in ("chunked", "naive")
        }
    report = {
        "benchmark": "learner",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "steps": {
            f"{name}, {lengths}": steps(
                name, rounds=1 if options.quick else 7, even=lengths == "even"
            )
            for name in names
            for lengths in kinds
        },
        "head": heads,
    }
    print(json.dumps({"steps": report["steps"], "head": heads}, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
