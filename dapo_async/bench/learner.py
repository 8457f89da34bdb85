"""The subject `learner`: steps of one learner rank, per microbatch size.

In: the config, and made-up or recorded groups. Out: seconds of a step, tokens/s and the peak of
memory. With several ranks in the config, one rank alone trains its share, without communication.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dapo_async.bench.made_up import ResponseLengths, made_up_group
from dapo_async.bench.memory import PeakMemory
from dapo_async.bench.session import Cell, Figures, Rounds
from dapo_async.config import Config
from dapo_async.learner import LearnerRank
from dapo_async.learner.rerun import recorded_steps
from dapo_async.model import ModelConfig, load_decoder
from dapo_async.model.peak import device_peak
from dapo_async.replay.group_io import read_groups
from dapo_async.types import Group

MICROBATCHES_PER_STEP = 4  # of the largest size, in a step of made-up groups


@dataclass(frozen=True, slots=True)
class LearnerBench:
    """See `BenchSubject`. `groups`: of one step, the same in every cell."""

    config: Config
    groups: Sequence[Group]
    label: str  # where the response lengths come from
    microbatch_tokens: Sequence[int]
    rounds: Rounds

    @property
    def cells(self) -> list[Cell]:
        """One row per microbatch size."""
        return [
            {
                "kind": "step",
                "microbatch tokens": tokens,
                "groups": len(self.groups),
                "lengths": self.label,
            }
            for tokens in self.microbatch_tokens
        ]

    @property
    def notes(self) -> list[str]:
        """See `BenchSubject`."""
        learner = self.config.learner
        ranks = learner.num_ranks
        tokens = sum(group.num_tokens for group in self.groups)
        lines = [f"a step trains {len(self.groups)} groups with {tokens:,} tokens"]
        if ranks > 1:
            lines.append(
                f"one rank with the whole model is measured; the run has {ranks} ranks, whose "
                "communication is not measured"
            )
        return lines

    @contextmanager
    def measuring(self) -> Iterator[Callable[[Cell], Figures]]:
        """Each cell has a learner of its own."""
        yield self._measure

    def _measure(self, cell: Cell) -> Figures:
        gc.collect()  # the learner of the cell before
        config, device = self.config, self.config.model.torch_device
        place = "cuda:0" if device == "cuda" else device
        decoder = load_decoder(
            Path(config.model.path),
            activations=getattr(torch, config.model.dtype),
            device=place,
        )
        rank = LearnerRank(
            decoder,
            algorithm=config.algorithm,
            learner=replace(config.learner, microbatch_tokens=int(cell["microbatch tokens"])),
        )
        memory, peak = PeakMemory(device), device_peak(place)

        def step() -> tuple[float, float, float]:
            """Seconds, MFU and peak of memory of one step."""
            memory.reset()
            began_s = time.perf_counter()
            metrics = rank.step(self.groups)
            memory.wait()
            took_s = time.perf_counter() - began_s
            if metrics.totals["non_finite"]:
                raise ValueError(
                    "the loss of a step was not finite, so its time says nothing; "
                    "lower learner.lr or check the model"
                )
            mfu = metrics.totals["train_flops"] / (took_s * peak.flops_per_s)
            return took_s, mfu, memory.peak_bytes()

        taken = self.rounds.of(step)
        tokens = sum(group.num_tokens for group in self.groups)
        return {
            "step_s": [took_s for took_s, _, _ in taken],
            "tokens_per_s": [tokens / took_s for took_s, _, _ in taken],
            "mfu": [mfu for _, mfu, _ in taken],
            "peak_bytes": [max(num_bytes for *_, num_bytes in taken)] if memory.is_known else [],
        }


def made_up_groups(
    config: Config,
    model: ModelConfig,
    lengths: ResponseLengths,
    *,
    prompt_tokens: int,
    microbatch_tokens: int,
    count: int | None = None,
) -> list[Group]:
    """Groups of one step: `count`, or as many as fill a few microbatches.

    At least one for each minibatch, and at most the share of one data-parallel rank.
    """
    random = np.random.default_rng(config.seed)
    share = max(1, config.replay.groups_per_step // config.learner.data_parallel)
    wanted, least = MICROBATCHES_PER_STEP * microbatch_tokens, config.learner.num_minibatches
    groups: list[Group] = []
    num_tokens = 0
    while len(groups) < count if count else (num_tokens < wanted or len(groups) < least):
        group = made_up_group(
            len(groups),
            lengths.draw(random, config.replay.group_size),
            prompt_tokens=prompt_tokens,
            vocabulary=model.vocab_size,
        )
        groups.append(group)
        num_tokens += group.num_tokens
        if not count and len(groups) >= max(share, least):
            break
    return groups


def recorded_groups(run_dir: Path, model: ModelConfig) -> list[Group]:
    """The last batch that a run has recorded (`train.record`). Raises ValueError without one, or
    when it is of another model."""
    folder = run_dir / "recorded"
    step = recorded_steps(folder)[-1]
    groups = read_groups(folder / f"step_{step:06d}.safetensors")
    largest = max(
        int(ids.max(initial=0))
        for group in groups
        for ids in (
            group.prompt.token_ids,
            *(rollout.completion.token_ids for rollout in group.rollouts),
        )
    )
    if largest >= model.vocab_size:
        raise ValueError(
            f"{folder} has token {largest}, but the model's vocabulary has {model.vocab_size}; "
            "give a run of the same model"
        )
    return groups
