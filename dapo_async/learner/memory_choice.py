"""Chooses what of a learner is `auto`, from the predicted memory of a rank and that of its device.

In: a config, the sizes of its model, and the bytes of the device. Out: the section `learner`
without an `auto`, and the reason in one line. The learner actor calls it when it starts, and
`train --dry-run` prints the result.

The first choice that fits is taken, from the fastest to the slowest (`memory.forms_by_speed`).
Then, if nothing is computed again or exchanged twice on a GPU, a pass gets more tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dapo_async.config import Config, LearnerConfig
from dapo_async.learner.options import needs_reference, needs_start_logprobs
from dapo_async.model.config import ModelConfig
from dapo_async.model.cost import MOST_ATTENDED
from dapo_async.model.memory import RankMemory, forms_by_speed, predict_memory

# Of a GPU: the rest is for the CUDA context, buffers of NCCL, fragments, and for the prediction,
# which has not been measured on a GPU.
GPU_SHARE = 0.85
CPU_SHARE = 0.5  # of a machine's memory, for all learner ranks together
MORE_TOKENS = (65_536, 32_768)  # per pass, where memory is left; more make no product faster
LEAST_TOKENS = 1024
GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What a rank uses, and why."""

    learner: LearnerConfig  # nothing of it is `auto`
    memory: RankMemory
    budget: int  # bytes of the device that a rank may fill
    is_auto: bool

    @property
    def line(self) -> str:
        """For `--dry-run` and the start of a run."""
        learner, need = self.learner, self.memory.on_device
        several = learner.num_ranks > 1
        stage = f", zero_stage {learner.zero_stage}" if several else ""
        made = (
            f"recompute {learner.recompute}{stage}, microbatch_tokens {learner.microbatch_tokens}"
        )
        relation = "of" if need <= self.budget else "is more than"
        how = "chosen by memory" if self.is_auto else "given"
        return (
            f"{made} ({how}): {need / GIB:,.2f} GiB {relation} the {self.budget / GIB:,.2f} GiB "
            "that a learner rank should fill at most"
        )


def choose_by_memory(config: Config, model: ModelConfig, *, device_bytes: int) -> MemoryChoice:
    """Replaces each `auto` of the section `learner`; what the user has set stays.

    `device_bytes`: memory of the GPU of a rank, or of the machine that all ranks share.
    """
    budget = rank_budget(config, device_bytes)
    choices = _choices(config)
    first = next(choices)

    def fits(learner: LearnerConfig) -> bool:
        return predicted_memory(config, model, learner).on_device <= budget

    # If none fits, the last one needs the least.
    chosen = first
    for learner in (first, *choices):
        chosen = learner
        if fits(chosen):
            break
    # On a CPU the products of a large pass are no faster.
    may_grow = config.learner.microbatch_tokens == "auto" and config.model.torch_device == "cuda"
    if may_grow and chosen == first:
        larger = (replace(chosen, microbatch_tokens=tokens) for tokens in MORE_TOKENS)
        chosen = next(filter(fits, larger), chosen)
    given = config.learner
    return MemoryChoice(
        chosen,
        predicted_memory(config, model, chosen),
        budget,
        is_auto="auto" in (given.recompute, given.zero_stage, given.microbatch_tokens),
    )


def rank_budget(config: Config, device_bytes: int) -> int:
    """Bytes that one rank may fill of its device."""
    if config.model.torch_device == "cuda":
        return int(GPU_SHARE * device_bytes)  # also of a shared one: the engine sleeps meanwhile
    return int(CPU_SHARE * device_bytes / config.learner.num_ranks)


def predicted_memory(config: Config, model: ModelConfig, learner: LearnerConfig) -> RankMemory:
    """What a learner rank holds at most: the longest microbatch, all of it response."""
    cuda = config.model.torch_device == "cuda"
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    assert learner.recompute != "auto"
    assert learner.zero_stage != "auto"
    return predict_memory(
        model,
        num_tokens=max(learner.fixed_microbatch_tokens, longest),
        num_attended=max(MOST_ATTENDED * learner.fixed_microbatch_tokens, longest),
        dp=learner.data_parallel,
        cp=learner.context_parallel,
        tp=learner.tensor_parallel,
        activations=getattr(torch, config.model.dtype),
        recompute=learner.recompute,
        zero_stage=learner.zero_stage,
        offload_optimizer=learner.offload_optimizer and cuda,
        keeps_start_weights=learner.num_minibatches > 1 and needs_start_logprobs(config.algorithm),
        keeps_reference=needs_reference(config.algorithm),
        cuda=cuda,
    )


def _choices(config: Config) -> Iterator[LearnerConfig]:
    """From the fastest to the one that needs the least memory."""
    learner = config.learner
    forms = forms_by_speed(learner.recompute, learner.zero_stage)
    tokens = learner.fixed_microbatch_tokens
    while True:
        for form, stage in forms:
            yield replace(learner, recompute=form, zero_stage=stage, microbatch_tokens=tokens)
        tokens //= 2
        if learner.microbatch_tokens != "auto" or tokens < LEAST_TOKENS:
            return
        forms = forms[-1:]
