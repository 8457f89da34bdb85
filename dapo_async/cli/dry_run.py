"""What `dapo-async train --dry-run` prints of a run: actors, devices, memory, credits, steps.

In: a checked config. Out: lines. The sizes of a model on the Hugging Face hub come from its
config.json alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dapo_async.config import Config, parse_source
from dapo_async.utils.machine import machine_bytes

if TYPE_CHECKING:  # torch takes seconds to import
    from dapo_async.learner.memory_choice import MemoryChoice
    from dapo_async.model import ModelConfig, RankMemory
    from dapo_async.rollout.memory import EngineMemory

MIB, GIB = 2**20, 2**30
# Memory of common GPUs in GB: T4, 4090, A100, L40S, A100 and H100, H20, H200, B200.
GPU_SIZES_GB = (16, 24, 40, 48, 80, 96, 141, 180)
ASSUMED_BYTES = 80 * 10**9  # of a GPU, where this machine has none
USABLE = 0.9  # of a device: the rest is for the CUDA context, buffers of NCCL, and fragments


class Device(NamedTuple):
    """Whose memory the sizes are compared with."""

    name: str
    num_bytes: int


def dry_run_lines(config: Config, root: Path, *, first_step: int) -> Iterator[str]:
    """All lines after those about model and data."""
    from dapo_async.runtime.cluster.planned_actors import planned_actors

    replay, rollout = config.replay, config.rollout
    local = config.ray.address == "local"
    where = "a new Ray on this machine" if local else f"the Ray cluster at {config.ray.address}"
    actors = list(planned_actors(config))
    yield f"would write {root}"
    yield f"would start {len(actors)} actors, one process each, on {where}, and this driver:"
    for actor in actors:
        yield f"  {actor.name:<10} {actor.num_cpus:g} CPU {actor.num_gpus:g} GPU  {actor.detail}"
    yield from _sides(config)
    yield _credits(config)
    yield from _memory(config)
    yield (
        f"would train {config.train.num_steps - first_step} steps of "
        f"{replay.groups_per_step * replay.group_size} rollouts of at most "
        f"{rollout.max_response_tokens} tokens"
    )


def _sides(config: Config) -> Iterator[str]:
    """The devices of each side."""
    learner, rollout = config.learner, config.rollout
    if config.model.is_shared:
        what = "GPUs" if config.model.device == "cuda" else "shares of the CPU"
        yield (
            f"learner and engines take turns on the same {what}: {rollout.num_workers} x one rank "
            "and one engine; who waits has its weights in host memory"
        )
        return
    if config.model.device != "cuda":
        return
    ranks = learner.num_ranks
    slices = f"context_parallel {cp} x " if (cp := learner.context_parallel) > 1 else ""
    engines = rollout.num_workers * rollout.tensor_parallel
    evaluator = int(config.gpus_of_evaluator)
    more = f", {evaluator} for the evaluator" if evaluator else ""
    yield (
        f"{ranks + engines + evaluator} GPUs: {ranks} for the learner "
        f"(data_parallel {learner.data_parallel} x {slices}tensor_parallel "
        f"{learner.tensor_parallel}), "
        f"{engines} for rollout ({rollout.num_workers} engines x tensor_parallel "
        f"{rollout.tensor_parallel}){more}"
    )


def _credits(config: Config) -> str:
    """Whether the credits can keep every slot busy."""
    from dapo_async.runtime.slot_advice import slot_advice

    if (advice := slot_advice(config)) is not None:
        return advice
    replay, rollout = config.replay, config.rollout
    allowed = (replay.max_staleness + 1) * replay.groups_per_step * replay.group_size
    if rollout.adapts_slots:
        return f"enough credits: up to {allowed} sequences in flight; engines find their slots"
    slots = rollout.num_workers * rollout.fixed_slots
    return (
        f"enough credits: up to {allowed} sequences in flight for the {slots} slots of all engines"
    )


def _memory(config: Config) -> Iterator[str]:
    """Memory of a learner rank and of an engine, and what is left of their device."""
    try:
        model = _model(config)
    except ValueError as error:
        yield f"memory is not known: {error}"
        return
    choice, engine = _choice(config, model), _engine_memory(config, model)
    rank = choice.memory
    yield _choice_line(config, choice)
    parts = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in rank.parts().items())
    yield (
        f"each learner rank would need up to {rank.on_device / MIB:,.0f} MiB on its device and "
        f"{(rank.written + rank.host) / MIB:,.0f} MiB in host memory (MiB per part: {parts})"
    )
    yield _engine_line(config, model, engine)
    if config.model.is_shared and config.model.device == "cuda":
        yield (
            f"host memory of each pair of rank and engine: {_size(rank.asleep)} while the engine "
            f"generates, {_size(engine.weights)} while the rank trains (both stay reserved)"
        )
    if config.model.torch_device == "cuda":
        yield from _left_on_gpus(config, rank, engine)
    else:
        yield _left_on_cpu(config, rank, engine)


def _model(config: Config) -> ModelConfig:
    from dapo_async.model import ModelConfig
    from dapo_async.model.download import model_shape

    source = parse_source(config.model.path)
    if source.hub is None:
        return ModelConfig.from_folder(Path(config.model.path))
    model, wanted = model_shape(source.hub, revision=source.revision), config.model.max_positions
    return model if wanted is None else replace(model, max_positions=wanted)


def _choice(config: Config, model: ModelConfig) -> MemoryChoice:
    """What a learner rank would use: on this machine's GPU, else on a GPU of 80 GB or this CPU."""
    from dapo_async.learner.memory_choice import choose_by_memory

    if config.model.torch_device == "cuda":
        device = _own_gpu()
        num_bytes = ASSUMED_BYTES if device is None else device.num_bytes
    else:
        num_bytes = machine_bytes()
    return choose_by_memory(config, model, device_bytes=num_bytes)


def _choice_line(config: Config, choice: MemoryChoice) -> str:
    assumed = config.model.torch_device == "cuda" and _own_gpu() is None
    where = f" (on a GPU of {ASSUMED_BYTES / 1e9:g} GB)" if assumed else ""
    return f"learner{where}: {choice.line}"


def _max_len(config: Config, model: ModelConfig) -> int:
    """Of one sequence: prompt and response."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return min(longest, model.max_positions)


def _engine_memory(config: Config, model: ModelConfig) -> EngineMemory:
    import torch

    from dapo_async.rollout.memory import predict_engine_memory

    rollout = config.rollout
    return predict_engine_memory(
        model,
        num_slots=rollout.fixed_slots,
        max_len=_max_len(config, model),
        num_bytes=getattr(torch, config.model.dtype).itemsize,
        tensor_parallel=rollout.tensor_parallel,
    )


def _engine_line(config: Config, model: ModelConfig, memory: EngineMemory) -> str:
    rollout = config.rollout
    per_gpu = " on each of its GPUs" if rollout.tensor_parallel > 1 else ""
    need = (
        f"each engine would hold {_size(memory.weights)} of weights{per_gpu}, and "
        f"{_size(memory.kv_per_sequence)} of keys and values per sequence of "
        f"{_max_len(config, model)} tokens"
    )
    if rollout.adapts_slots:
        return f"{need}; it runs as many sequences as its memory and speed allow (num_slots auto)"
    need += f", {_size(memory.kv_all_slots)} for {rollout.fixed_slots} of them"
    if rollout.engine == "torch":
        return need
    return f"{need}; with less, the SGLang server queues requests (--mem-fraction-static)"


def _left_on_gpus(config: Config, rank: RankMemory, engine: EngineMemory) -> Iterator[str]:
    """What is left of this machine's GPU, or which GPU would be large enough."""
    if config.rollout.adapts_slots:  # it takes what is there: one sequence must fit
        what, wanted = "an engine with one sequence", engine.weights + engine.kv_per_sequence
    else:
        what, wanted = "an engine with all slots", engine.weights + engine.kv_all_slots
    device = _own_gpu()
    needs = {"a learner rank": rank.on_device, what: wanted}
    if config.model.is_shared:
        larger = "the learner's turn" if rank.on_device >= wanted else "the engine's turn"
        needs = {f"{larger}, which needs more than the other's": max(rank.on_device, wanted)}
    for what, num_bytes in needs.items():
        if device is None:
            sizes = [size for size in GPU_SIZES_GB if num_bytes <= USABLE * size * 1e9]
            fits = f"a GPU with {sizes[0]} GB or more" if sizes else "no GPU: use more of them"
            yield f"{what} would need {fits} (this machine has none to compare with)"
        else:
            yield f"{what}: {_left(num_bytes, device)}"
    if device is not None:
        room = int(USABLE * device.num_bytes) - engine.weights
        count = max(0, room // engine.kv_per_sequence)
        yield f"an engine has room for {count} sequences of the longest length on {device.name}"


def _left(num_bytes: int, device: Device) -> str:
    left = int(USABLE * device.num_bytes) - num_bytes
    usable = f"{_size(int(USABLE * device.num_bytes))} usable on {device.name}"
    if left < 0:
        return f"{_size(-left)} too much for the {usable}: see docs/tuning.md#memory"
    return f"{_size(left)} left of the {usable}"


def _left_on_cpu(config: Config, rank: RankMemory, engine: EngineMemory) -> str:
    """Of this machine, if both sides run on it."""
    import psutil

    engines = config.rollout.num_workers
    ranks = config.learner.num_ranks * (rank.on_device + rank.host) + rank.written
    wanted = ranks + engines * (engine.weights + engine.kv_all_slots)
    free = psutil.virtual_memory().available
    both = f"learner and engines together would need {_size(wanted)}"
    if config.ray.address != "local":
        return f"{both}, on all nodes of the cluster"
    if wanted > free:
        return f"{both}, this machine has {_size(free)} free: see docs/tuning.md#memory"
    return f"{both} of the {_size(free)} that are free here, besides about 0.5 GiB per process"


def _own_gpu() -> Device | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Device(properties.name, properties.total_memory)


def _size(num_bytes: int) -> str:
    """`1536` as `1.5 KiB`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"
