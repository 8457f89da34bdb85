"""What the cost model of the planner expects of a recipe, on GPUs that nobody has run it on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dapo_async.config import Config
from dapo_async.learner.memory_choice import MemoryChoice, choose_by_memory
from dapo_async.learner.options import needs_reference, needs_start_logprobs
from dapo_async.model import ModelConfig
from dapo_async.model.cost import train_flops
from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.cost_model import (
    Efficiency,
    Training,
    engine_speed,
    learner_speed,
    publish_times,
)
from dapo_async.planner.hardware import find_gpu
from dapo_async.planner.lengths import Lengths
from dapo_async.planner.planned_model import PlannedModel
from dapo_async.planner.scenario import Scenario

GB = 10**9
PROMPT_TOKENS = 200


def qwen2(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, positions: int
) -> ModelConfig:
    large = hidden > 2000
    return ModelConfig.from_dict(
        {
            "model_type": "qwen2",
            "vocab_size": 152_064 if large else 151_936,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": positions,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": not large,
        }
    )


# The sizes of the published config.json of each model.
SIZES = {
    "Qwen/Qwen2.5-0.5B-Instruct": qwen2(896, 4864, 24, 14, 2, 32_768),
    "Qwen/Qwen2.5-1.5B-Instruct": qwen2(1536, 8960, 28, 12, 2, 32_768),
    "Qwen/Qwen2.5-1.5B": qwen2(1536, 8960, 28, 12, 2, 131_072),
    "Qwen/Qwen2-7B-Instruct": qwen2(3584, 18_944, 28, 28, 4, 32_768),
    "Qwen/Qwen2.5-7B": qwen2(3584, 18_944, 28, 28, 4, 131_072),
    "Qwen/Qwen2.5-Math-7B": qwen2(3584, 18_944, 28, 28, 4, 4096),
    "Qwen/Qwen2.5-32B": qwen2(5120, 27_648, 64, 40, 8, 131_072),
    "Qwen/Qwen3-30B-A3B-Base": ModelConfig.from_dict(
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        }
    ),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one step, with every group kept."""

    choice: MemoryChoice  # of the learner
    train_s: float  # of the learner alone
    generate_s: float  # of the engines alone
    step_s: float
    mfu: float  # of the learner while it trains, by the FLOPs of forward and backward passes


def estimate(config: Config, *, gpu: str, memory_gb: float, response_tokens: int) -> Estimate:
    """Responses of so many tokens on average, after prompts of `PROMPT_TOKENS`."""
    sizes = SIZES[config.model.path.removeprefix("hub:")]
    if config.model.max_positions is not None:
        sizes = replace(sizes, max_positions=config.model.max_positions)
    model, efficiency = PlannedModel(sizes), Efficiency()
    device = replace(find_gpu(gpu), memory_bytes=memory_gb * GB)
    choice = choose_by_memory(config, sizes, device_bytes=int(memory_gb * GB))
    learner, replay, rollout = choice.learner, config.replay, config.rollout
    count = learner.num_minibatches
    assert learner.recompute != "auto"
    proximal = (1 - 1 / count) * needs_start_logprobs(config.algorithm)
    work = Training(
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=response_tokens,
        longest_tokens=rollout.max_response_tokens,
        group_size=replay.group_size,
        groups=replay.groups_per_step // count,
        microbatch_tokens=learner.fixed_microbatch_tokens,
        recompute=learner.recompute,
        zero_stage=learner.zero_stage,
        forwards=proximal + needs_reference(config.algorithm),
        several_minibatches=count > 1,
    )
    speed = learner_speed(
        model,
        device,
        work,
        gpus=learner.num_ranks,
        tensor_parallel=learner.tensor_parallel,
        context_parallel=learner.context_parallel,
        efficiency=efficiency,
    )
    disk = config.weights.transport == "disk"
    publish_s, pause_s = publish_times(model, disk=disk, efficiency=efficiency)
    scenario = Scenario(
        num_engines=rollout.num_workers,
        engine=engine_speed(
            model,
            device,
            gpus=rollout.tensor_parallel,
            slots=rollout.fixed_slots,
            efficiency=efficiency,
        ),
        learner=speed,
        lengths=Lengths(mean_tokens=response_tokens, max_tokens=rollout.max_response_tokens),
        prompt_tokens=PROMPT_TOKENS,
        group_size=replay.group_size,
        groups_per_step=replay.groups_per_step,
        num_minibatches=count,
        max_staleness=replay.max_staleness,
        publish_s=publish_s,
        pause_s=pause_s,
        colocated=config.model.is_shared,
    )
    forms = closed_forms(scenario)
    step_s = forms.step_s
    if config.model.is_shared:  # they take turns
        step_s = forms.generate_s + forms.train_s + publish_s
    flops = count * work.groups * train_flops(sizes, [work.siblings])
    mfu = flops / (learner.num_ranks * device.peak.flops_per_s * forms.train_s)
    return Estimate(choice, forms.train_s, forms.generate_s, step_s, mfu)
