"""Rates of engines and learner from a model's `config.json` and the name of a GPU.

For a cluster that nobody has measured. A decode step reads the weights and the keys and values, or
is limited by its FLOPs; training is limited by its FLOPs. `Efficiency` has what hardware reaches of
its peaks: assumptions, each of which a measurement should replace (`dapo-async bench`).

In a mixture of experts a token uses `num_experts_per_tok` experts. For its FLOPs it is a dense
model with that many times the inner size of an expert. A decode step reads every expert that a
token of the batch chose. FLOPs and bytes are those of `dapo_async.model.cost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.model.config import ModelConfig
from dapo_async.model.cost import (
    head_flops,
    kv_bytes,
    token_flops,
    train_flops,
    weight_bytes,
)
from dapo_async.model.peak import Peak, known_peak
from dapo_async.model.special_tokens import read_json
from dapo_async.planner.engine import EngineSpeed
from dapo_async.planner.scenario import LearnerSpeed

HALF = 2  # bytes of a bfloat16 number
TRAINING_BYTES = 16  # per parameter: weight, gradient and two moments in float32
# Memory of a GPU in 10^9 bytes, by the start of its name.
MEMORY = {
    "GB200": 186,
    "B200": 180,
    "H200": 141,
    "H20": 96,
    "H800": 80,
    "H100": 80,
    "A100": 80,
    "L40S": 48,
}
MIXTURES = {"qwen3_moe": "qwen3", "mixtral": "llama"}  # and the family of their attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What is reached of the peaks."""

    bandwidth: float = 0.6  # of the memory bandwidth, in a decode step
    prefill: float = 0.5  # of the FLOPs, in a prefill or a large decode batch
    mfu: float = 0.35  # of the FLOPs, in training; published: 0.27 to 0.36 on H100 and H200
    step_s: float = 0.002  # of a decode step beside the GPU's work
    exchange_s: float = 2e-5  # of one exchange between the GPUs of an engine; two per layer
    memory: float = 0.88  # of a GPU's memory, for weights, keys and values of an engine
    training_memory: float = 0.7  # of a GPU's memory, for weights, gradients and moments

    def __post_init__(self) -> None:
        for name in ("bandwidth", "prefill", "mfu", "memory", "training_memory"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"model.{name} ({value:g}) must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks and memory of one device."""

    name: str
    peak: Peak
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A dense model, or what one token of a mixture of experts uses."""

    used: ModelConfig  # of a mixture: with the inner size of the experts that a token uses
    num_experts: int = 1
    experts_per_token: int = 1

    @property
    def expert_bytes(self) -> float:
        """One expert of all layers."""
        inner = self.used.intermediate_size / self.experts_per_token
        return 3 * HALF * self.used.num_layers * self.used.hidden_size * inner

    @property
    def weights_bytes(self) -> float:
        """All weights that an engine holds."""
        skipped = 0 if self.used.tie_embeddings else self.used.vocab_size * self.used.hidden_size
        unused = self.num_experts - self.experts_per_token
        return weight_bytes(self.used, num_bytes=HALF) + HALF * skipped + unused * self.expert_bytes

    @property
    def num_parameters(self) -> float:
        return self.weights_bytes / HALF

    def read_bytes(self, batch: int) -> float:
        """The weights that a decode step with `batch` sequences reads.

        If tokens choose their experts independently, 1 − (1 − k / E)^batch of the experts.
        """
        share = self.experts_per_token / self.num_experts
        chosen = self.num_experts * (1 - (1 - share) ** batch)
        extra = max(0.0, chosen - self.experts_per_token)
        return weight_bytes(self.used, num_bytes=HALF) + extra * self.expert_bytes


def find_gpu(name: str) -> Gpu:
    """The datasheet of a GPU. Raises ValueError for an unknown one."""
    peak = known_peak(name)
    memory = next((size for start, size in MEMORY.items() if name.upper().startswith(start)), None)
    if peak is None or memory is None:
        raise ValueError(f"model.gpu ({name!r}) is not known; give one of {', '.join(MEMORY)}")
    return Gpu(name, peak, memory * 1e9)


def read_model(path: Path) -> PlannedModel:
    """The model of a folder or of a `config.json`. Raises ValueError for another form."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model.path ({path}) has no config.json; give a model folder or the file")
    try:
        return model_of(read_json(file, "give the config.json of a Hugging Face model"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def model_of(values: Mapping[str, Any]) -> PlannedModel:
    """The model of the content of a `config.json`, dense or a mixture of experts."""
    family = MIXTURES.get(str(values.get("model_type")))
    if family is None:
        return PlannedModel(ModelConfig.from_dict(values))
    experts: Any = values.get("num_experts", values.get("num_local_experts"))
    chosen: Any = values.get("num_experts_per_tok")
    inner: Any = values.get("moe_intermediate_size", values.get("intermediate_size"))
    sizes = (experts, chosen, inner)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or experts < chosen:
        raise ValueError(
            f"num_experts, num_experts_per_tok and moe_intermediate_size {sizes} must be whole "
            "numbers above 0; copy the config.json of the base model"
        )
    if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
        raise ValueError(
            "layers without experts are not supported; use a model with experts in all"
        )
    dense = {**values, "model_type": family, "intermediate_size": chosen * inner}
    return PlannedModel(ModelConfig.from_dict(dense), experts, chosen)


def engine_speed(
    model: PlannedModel, gpu: Gpu, *, gpus: int, slots: int, efficiency: Efficiency
) -> EngineSpeed:
    """One engine on `gpus` GPUs. Raises ValueError if the weights leave no room for KV."""
    used = model.used
    if used.num_heads % gpus:
        raise ValueError(
            f"engine.gpus ({gpus}) must divide the model's {used.num_heads} attention heads"
        )
    copies = max(1, gpus // used.num_kv_heads)  # GPUs that share a key head hold it each
    token_bytes = copies * kv_bytes(used, num_bytes=HALF)
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
        fixed_s += 2 * used.num_layers * efficiency.exchange_s
    one = token_flops(used) + head_flops(used)
    step_s = tuple(
        fixed_s + max(model.read_bytes(max(1, batch)) / bandwidth, batch * one / flops)
        for batch in range(slots + 1)
    )
    return EngineSpeed(
        step_s=step_s,
        context_s=token_bytes / bandwidth,
        prefill_s=token_flops(used) / flops,
        kv_tokens=room // token_bytes,
    )


def learner_speed(
    model: PlannedModel,
    gpu: Gpu,
    *,
    gpus: int,
    prompt_tokens: int,
    response_tokens: int,
    group_size: int,
    efficiency: Efficiency,
) -> LearnerSpeed:
    """Seconds per token of prompts and responses on `gpus` GPUs, for responses of this mean."""
    flops = train_flops(model.used, [(prompt_tokens, [response_tokens] * group_size)])
    tokens = group_size * (prompt_tokens + response_tokens)
    peak = gpus * gpu.peak.flops_per_s * efficiency.mfu
    return LearnerSpeed(token_s=flops / tokens / peak)


def fewest_learner_gpus(model: PlannedModel, gpu: Gpu, efficiency: Efficiency) -> int:
    """GPUs that hold weights, gradients and moments, divided among all of them."""
    needed = TRAINING_BYTES * model.num_parameters
    return int(-(-needed // (gpu.memory_bytes * efficiency.training_memory)))
