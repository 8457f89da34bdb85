"""Rates of engines and learner from a model's `config.json` and the name of a GPU.

For a cluster that nobody has measured. A decode step reads the weights and the keys and values, or
is limited by its FLOPs. Training is limited by its FLOPs, with those of what is computed again, or
by the exchange of parameters.
`Efficiency` has what hardware reaches of its peaks: assumptions, each of which a measurement should
replace (`dapo-async bench`). FLOPs and bytes are those of `dapo_async.model.cost`. `rates.py` calls
this module.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from dapo_async.model.config import ModelConfig, Recompute
from dapo_async.model.cost import (
    BACKWARD,
    MOST_ATTENDED,
    head_flops,
    kv_bytes,
    recomputed_flops,
    token_flops,
    train_flops,
)
from dapo_async.model.head_split import HeadSplit
from dapo_async.planner.engine import EngineSpeed
from dapo_async.planner.hardware import Gpu
from dapo_async.planner.planned_model import HALF, PlannedModel
from dapo_async.planner.scenario import LearnerSpeed

FLOAT32 = 4
STATE_BYTES = 16  # per parameter: weight, gradient and two moments in float32
MOST_LEARNER_GPUS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What is reached of the peaks."""

    bandwidth: float = 0.6  # of the memory bandwidth, in a decode step
    prefill: float = 0.5  # of the FLOPs, in a prefill or a large decode batch
    mfu: float = 0.35  # of the FLOPs, in training without waits for other GPUs
    step_s: float = 0.002  # of a decode step beside the GPU's work
    exchange_s: float = 2e-5  # of one exchange between the GPUs of an engine; two per layer
    memory: float = 0.88  # of a GPU's memory, for weights, keys and values of an engine
    training_memory: float = 0.85  # of a GPU's memory, for a learner rank; `auto` fills as much
    link: float = 0.6  # of the bandwidth between the GPUs of a node
    network: float = 0.5  # of the bandwidth of a GPU to GPUs of other nodes
    minibatch_s: float = 0.2  # of a minibatch beside the GPU's work
    # Of a publish. Both fit verl's published times of dense models from 7B to 72B.
    sync_layer_s: float = 0.14  # per layer: gathered from the ranks
    sync_gb_per_s: float = 8.4  # of a broadcast to the engines
    disk_gb_per_s: float = 2.0  # of the disk that learner and engines share, written or read

    def __post_init__(self) -> None:
        shares = ("bandwidth", "prefill", "mfu", "memory", "training_memory", "link", "network")
        for name in shares:
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"model.{name} ({value:g}) must be above 0 and at most 1")
        for name in ("sync_gb_per_s", "disk_gb_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} ({getattr(self, name):g}) must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The work of one minibatch, and how a rank does it."""

    prompt_tokens: int
    response_tokens: int  # the mean
    longest_tokens: int  # of a response
    group_size: int
    groups: int  # of a minibatch
    microbatch_tokens: int = 16_384
    # As the knobs of `learner`; auto: the fastest form whose ranks fit their GPUs.
    recompute: Recompute | Literal["auto"] = "auto"
    zero_stage: int | Literal["auto"] = "auto"
    # Forward passes without gradient beside each minibatch: proximal and reference logprobs.
    forwards: float = 0.0
    several_minibatches: bool = False  # of a step: a rank keeps the weights of its start

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of a minibatch."""
        return self.groups * self.group_size * (self.prompt_tokens + self.response_tokens)

    @property
    def siblings(self) -> tuple[int, list[int]]:
        """One group, as `model/cost.py` has it."""
        return self.prompt_tokens, [self.response_tokens] * self.group_size

    @property
    def largest_microbatch(self) -> int:
        return max(self.microbatch_tokens, self.prompt_tokens + self.longest_tokens)


def engine_speed(
    model: PlannedModel, gpu: Gpu, *, gpus: int, slots: int, efficiency: Efficiency
) -> EngineSpeed:
    """One engine on `gpus` GPUs. Raises ValueError if the weights leave no room for KV."""
    config = model.config
    if config.num_heads % gpus:
        raise ValueError(
            f"engine.gpus ({gpus}) must divide the model's {config.num_heads} attention heads"
        )
    copies = max(1, gpus // config.num_kv_heads)  # GPUs that share a key head hold it each
    token_bytes = copies * kv_bytes(config, num_bytes=HALF)
    room = gpus * gpu.memory_bytes * efficiency.memory - model.weights_bytes
    if room < token_bytes:
        raise ValueError(
            f"the weights ({model.weights_bytes / 1e9:.0f} GB) do not fit an engine of {gpus} "
            f"{gpu.name} with {gpus * gpu.memory_bytes * efficiency.memory / 1e9:.0f} GB; raise "
            "engine.gpus"
        )
    bandwidth = gpus * gpu.peak.bytes_per_s * efficiency.bandwidth
    flops = gpus * gpu.peak.flops_per_s * efficiency.prefill
    fixed_s = efficiency.step_s
    if gpus > 1:
        fixed_s += 2 * config.num_layers * efficiency.exchange_s
    one = token_flops(config) + head_flops(config)
    step_s = tuple(
        fixed_s + max(model.read_bytes(max(1, batch)) / bandwidth, batch * one / flops)
        for batch in range(slots + 1)
    )
    return EngineSpeed(
        step_s=step_s,
        context_s=token_bytes / bandwidth,
        prefill_s=token_flops(config) / flops,
        kv_tokens=room // token_bytes,
    )


def learner_speed(
    model: PlannedModel,
    gpu: Gpu,
    work: Training,
    *,
    gpus: int,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    efficiency: Efficiency,
) -> LearnerSpeed:
    """Seconds per token and per minibatch on `gpus` GPUs.

    A pass over one microbatch per group of ranks that share it takes the longer of its FLOPs and
    the exchange of parameters by FSDP, plus the exchange of tokens between tensor-parallel ranks
    and of heads between context-parallel ones. What is computed again and exchanged depends on
    `learner_form`. With more GPUs a minibatch has fewer passes, but each exchanges as much as
    before.
    """
    ranks, tokens = gpus // tensor_parallel, work.tokens
    form, stage = learner_form(
        model,
        gpu,
        work,
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        efficiency=efficiency,
    )
    flops = train_flops(model.config, [work.siblings]) * (1 + work.forwards / (1 + BACKWARD))
    flops += recomputed_flops(model.config, [work.siblings], form)
    compute_s = work.groups * flops / (gpus * gpu.peak.flops_per_s * efficiency.mfu)
    passes = math.ceil(tokens * context_parallel / ranks / work.microbatch_tokens)
    own = model.num_parameters / tensor_parallel
    # Weights in each pass forward and backward, or once; gradients in each pass, or once.
    gathers, sums = {3: (2 * passes, passes), 2: (1, passes), 1: (1, 1)}[stage]
    gathered = gathers + work.forwards * (passes if stage == 3 else 1)
    exchanged = (ranks - 1) / ranks * own * (gathered * HALF + sums * FLOAT32)
    link = gpu.link_bytes_per_s * efficiency.link
    network = gpu.network_bytes_per_s * efficiency.network
    between = link if gpus <= gpu.link_gpus else network
    inside = link if tensor_parallel * context_parallel <= gpu.link_gpus else network
    gather_s = exchanged / between
    share = (tensor_parallel - 1) / tensor_parallel
    # Per layer four exchanges forward and four backward.
    config = model.config
    moved = exchanged_heads(config, tensor_parallel, context_parallel) * tokens / ranks
    moved += 8 * config.num_layers * config.hidden_size * HALF * share * tokens / ranks
    optimizer_s = 2 * STATE_BYTES * model.num_parameters / gpus / gpu.peak.bytes_per_s
    return LearnerSpeed(
        token_s=(max(compute_s, gather_s) + moved / inside) / tokens,
        fixed_s=efficiency.minibatch_s + optimizer_s,
    )


def exchanged_heads(model: ModelConfig, tensor_parallel: int, context_parallel: int) -> float:
    """Bytes that a rank sends per token of its slice in a forward and a backward pass.

    Of each layer queries, keys and values to the ranks that have their heads, and the output of
    attention back.
    """
    heads, kv_heads = model.num_heads // tensor_parallel, model.num_kv_heads // tensor_parallel
    split = HeadSplit.of(heads, max(1, kv_heads), context_parallel)
    sent = 2 * (split.queries + split.keys) * model.head_dim * (context_parallel - 1)
    return 2 * model.num_layers * sent * HALF


def publish_times(
    model: PlannedModel, *, disk: bool, efficiency: Efficiency
) -> tuple[float, float]:
    """Seconds of a publish, and those of them in which an engine stands still.

    The layers are gathered one by one, then their bytes are sent.

    An engine stands still while it receives a broadcast or reads the files. Other engines receive
    or read at the same time. KV entries that are computed again are simulated, not added here.
    """
    gathered_s = efficiency.sync_layer_s * model.config.num_layers
    if disk:
        read_s = model.weights_bytes / (efficiency.disk_gb_per_s * 1e9)
        return gathered_s + 2 * read_s, read_s
    sent_s = model.weights_bytes / (efficiency.sync_gb_per_s * 1e9)
    return gathered_s + sent_s, sent_s


def learner_form(
    model: PlannedModel,
    gpu: Gpu,
    work: Training,
    *,
    gpus: int,
    tensor_parallel: int,
    context_parallel: int = 1,
    efficiency: Efficiency,
) -> tuple[Recompute, int]:
    """What a rank computes again, and its ZeRO stage: as given, or the fastest form that fits.

    If none fits, the one that needs the least memory. Raises ValueError if the layers cannot be
    split.
    """
    forms = _forms(work)
    budget = gpu.memory_bytes * efficiency.training_memory
    for form in forms[:-1]:
        needed = rank_bytes(
            model,
            work,
            gpus=gpus,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            form=form,
        )
        if needed <= budget:
            return form
    return forms[-1]


def _forms(work: Training) -> list[tuple[Recompute, int]]:
    from dapo_async.model.memory import forms_by_speed  # imports torch

    return forms_by_speed(work.recompute, work.zero_stage)


def rank_bytes(
    model: PlannedModel,
    work: Training,
    *,
    gpus: int,
    tensor_parallel: int,
    context_parallel: int = 1,
    form: tuple[Recompute, int] | None = None,
) -> float:
    """What a learner rank holds on its GPU, by `predict_memory`.

    `form`: of `learner_form`; None: the one that needs the least. Raises ValueError if the layers
    cannot be split.
    """
    ranks = gpus // tensor_parallel
    recompute, zero_stage = form or _forms(work)[-1]
    return _predicted(
        model.config,
        work.largest_microbatch,
        max(MOST_ATTENDED * work.microbatch_tokens, work.largest_microbatch),
        ranks // context_parallel,
        context_parallel,
        tensor_parallel,
        recompute,
        zero_stage,
        work.several_minibatches,
    )


@functools.cache
def _predicted(
    model: ModelConfig,
    num_tokens: int,
    num_attended: int,
    data_parallel: int,
    context_parallel: int,
    tensor_parallel: int,
    recompute: Recompute,
    zero_stage: int,
    keeps_start_weights: bool,
) -> float:
    import torch

    from dapo_async.model.memory import predict_memory  # imports torch

    model.check_split(tensor_parallel)
    return predict_memory(
        model,
        num_tokens=num_tokens,
        num_attended=num_attended,
        dp=data_parallel,
        cp=context_parallel,
        tp=tensor_parallel,
        activations=torch.bfloat16,
        recompute=recompute,
        zero_stage=zero_stage,
        keeps_start_weights=keeps_start_weights,
        cuda=True,
    ).on_device


def learner_fits(
    model: PlannedModel,
    gpu: Gpu,
    work: Training,
    *,
    gpus: int,
    tensor_parallel: int,
    context_parallel: int = 1,
    efficiency: Efficiency,
) -> bool:
    """Whether a rank fits its GPU in the form that needs the least memory."""
    if gpus % (tensor_parallel * context_parallel):
        return False
    needed = rank_bytes(
        model,
        work,
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
    )
    return needed <= gpu.memory_bytes * efficiency.training_memory


def fewest_learner_gpus(
    model: PlannedModel,
    gpu: Gpu,
    work: Training,
    *,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    efficiency: Efficiency,
) -> int:
    """The smallest multiple of `tensor_parallel` · `context_parallel` whose ranks fit their GPUs.

    Raises ValueError if no number does: then activations alone are too large.
    """

    unit = tensor_parallel * context_parallel

    def fits(groups: int) -> bool:
        return learner_fits(
            model,
            gpu,
            work,
            gpus=groups * unit,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            efficiency=efficiency,
        )

    high = 1
    while not fits(high):
        high *= 2
        if high * unit > MOST_LEARNER_GPUS:
            raise ValueError(
                f"a learner rank does not fit a {gpu.name} with microbatches of "
                f"{work.largest_microbatch} tokens on any number of GPUs; raise "
                "learner.context_parallel or learner.tensor_parallel, or lower lengths.max or "
                "model.microbatch_tokens"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * unit
