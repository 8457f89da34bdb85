"""The predicted memory of a learner rank against its real storage on a CPU."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from gloo import on_ranks
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.model import (
    Mesh,
    ModelConfig,
    PackedAttention,
    begin_pass,
    build_decoder,
    fill,
    keep_gathered,
    own_targets,
    predict_memory,
    shard_of,
)
from dapo_async.model.config import Recompute
from dapo_async.model.parameters import parameter_shapes

SIZES = {
    "model_type": "qwen2",
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
FORMS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"model_type": "qwen3"},
    "llama, untied, without shared heads": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
    },
    "one head of keys": {"num_key_value_heads": 1},
    "mixture with a dense layer": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
}
PARAMETERS = parameter_shapes(ModelConfig.from_dict(SIZES))
LENGTHS = (60, 100, 150, 200)
WITHIN = 0.05


def kept_bytes(
    mesh: Mesh,
    values: dict[str, Any],
    activations: torch.dtype,
    recompute: Recompute,
    shared: tuple[range, ...] = (),
) -> int:
    """Storage that one forward pass keeps for the backward pass, without the weights."""
    decoder = build_decoder(ModelConfig.from_dict(values), mesh=mesh, activations=activations)
    decoder.recompute(recompute)
    attention = PackedAttention(LENGTHS, shared=shared)
    num_tokens = len(attention.positions)
    ids = torch.arange(num_tokens) % 500
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        some, predictors = torch.ones(num_tokens - 1), torch.arange(num_tokens - 1)
        logprobs, _ = decoder.score(
            ids,
            attention.positions,
            attention,
            predictors=predictors,
            targets=ids[1:],
            temperatures=some,
            own=own_targets(predictors, num_tokens, mesh.cp) if mesh.cp.size > 1 else None,
        )
    weights = {
        shard_of(parameter).untyped_storage().data_ptr() for parameter in decoder.parameters()
    }
    known = weights | {
        table.untyped_storage().data_ptr() for table in (decoder.rope_cos, decoder.rope_sin)
    }
    known |= {parameter.untyped_storage().data_ptr() for parameter in gathered_parameters(decoder)}
    assert logprobs.requires_grad
    return sum(
        tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known
    )


def gathered_parameters(decoder: torch.nn.Module) -> list[torch.Tensor]:
    """The weights that FSDP has gathered for the pass."""
    states: list[Any] = [
        getattr(module, "_get_fsdp_state")()  # noqa: B009
        for module in decoder.modules()
        if hasattr(module, "_get_fsdp_state")
    ]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group]
    return [
        shard_of(each._unsharded_param)
        for group in groups
        for each in group.fsdp_params
        if hasattr(each, "_unsharded_param")
    ]


@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_predicted_activations_are_what_a_forward_pass_keeps(
    form: str, activations: torch.dtype, recompute: Recompute
) -> None:
    values = {**SIZES, **FORMS[form]}
    memory = predict_memory(
        ModelConfig.from_dict(values),
        num_tokens=sum(LENGTHS),
        activations=activations,
        recompute=recompute,
    )
    # What is computed again does not keep its cast weights.
    again = {"none": " ", "mlp": ".mlp.", "all": ".layers."}[recompute]
    shapes = parameter_shapes(ModelConfig.from_dict(values))
    uncast = sum(math.prod(shape) for name, shape in shapes.items() if again in name)
    copies = memory.gathered - uncast * activations.itemsize * (memory.gathered > 0)
    assert memory.activations + copies == pytest.approx(
        kept_bytes(Mesh(), values, activations, recompute), rel=WITHIN
    )


@pytest.mark.parametrize("form", FORMS)
def test_predicted_activations_count_a_shared_prompt_once_outside_of_attention(form: str) -> None:
    values, prompt = {**SIZES, **FORMS[form]}, range(50)
    memory = predict_memory(
        ModelConfig.from_dict(values), num_tokens=sum(LENGTHS) - 150, num_attended=sum(LENGTHS)
    )
    shared = (range(0), prompt, prompt, prompt)
    kept = kept_bytes(Mesh(), values, torch.float32, "none", shared)
    assert memory.activations == pytest.approx(kept, rel=WITHIN)


@pytest.mark.gloo
@pytest.mark.parametrize("form", FORMS)
def test_predicted_activations_are_those_of_each_tensor_parallel_rank(form: str) -> None:
    values = {**SIZES, **FORMS[form]}
    memory = predict_memory(ModelConfig.from_dict(values), num_tokens=sum(LENGTHS), tp=2)
    kept = on_ranks(kept_bytes, values, torch.float32, "none", tp=2)
    if "num_experts" in values:  # the router decides how many tokens each rank's experts get
        kept = [sum(kept) / len(kept)]
    for each in kept:
        assert memory.activations == pytest.approx(each, rel=WITHIN)


@pytest.mark.gloo
@pytest.mark.parametrize("shares_prompt", [False, True])
def test_predicted_activations_halve_on_two_context_parallel_ranks(shares_prompt: bool) -> None:
    values = {**SIZES, **FORMS["qwen3"]}
    prompt = range(50 * shares_prompt)
    whole, half = (
        predict_memory(
            ModelConfig.from_dict(values),
            num_tokens=sum(LENGTHS) - 3 * len(prompt),
            num_attended=sum(LENGTHS),
            cp=cp,
        ).activations
        for cp in (1, 2)
    )
    assert half == pytest.approx(whole / 2, rel=0.05)
    shared = (range(0), prompt, prompt, prompt)
    for kept in on_ranks(kept_bytes, values, torch.float32, "none", shared, cp=2):
        assert half == pytest.approx(kept, rel=WITHIN)


def state_bytes(mesh: Mesh, offload: bool) -> tuple[int, int, int]:
    """Weights and gradients of a rank after an update, and what its optimizer and step keep."""
    decoder = build_decoder(ModelConfig.from_dict(SIZES), mesh=mesh)
    rank = LearnerRank(
        decoder,
        algorithm=AlgorithmConfig(kl_coef=0.1),
        learner=LearnerConfig(offload_optimizer=offload),
        mesh=mesh,
    )
    rank._start_weights.copy()
    assert rank._reference is not None
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(
        shard_of(parameter.grad).nbytes
        for parameter in decoder.parameters()
        if parameter.grad is not None
    )
    rank._optimizer.step(lr=0.1)
    return (
        sum(shard_of(each).nbytes for each in decoder.parameters()),
        gradients,
        sum(tensor.nbytes for *_, tensor in rank._optimizer.moments())
        + sum(each.nbytes for each in rank._start_weights.shards)
        + sum(each.nbytes for each in rank._reference.shards),
    )


@pytest.mark.gloo
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_predicted_weights_gradients_and_moments_are_those_of_each_rank(
    dp: int, tp: int, offload: bool
) -> None:
    memory = predict_memory(
        ModelConfig.from_dict(SIZES),
        num_tokens=10,
        dp=dp,
        tp=tp,
        offload_optimizer=offload,
        keeps_start_weights=True,
        keeps_reference=True,
    )
    beside = predict_memory(ModelConfig.from_dict(SIZES), num_tokens=10, dp=dp, tp=tp).host
    on_device = memory.moments + memory.start_weights + memory.reference
    kept = memory.host - beside + on_device
    assert (on_device == 0) == offload
    ranks = (
        [state_bytes(Mesh(), offload)]
        if dp * tp == 1
        else on_ranks(state_bytes, offload, dp=dp, tp=tp)
    )
    for held in ranks:
        assert held == pytest.approx((memory.weights, memory.gradients, kept), rel=WITHIN)


def between_passes(mesh: Mesh, zero_stage: int) -> int:
    """Gathered weights and unsummed gradients that a rank holds after a pass that is not the
    last."""
    config = ModelConfig.from_dict(SIZES)
    decoder = build_decoder(config, mesh=mesh, activations=torch.bfloat16)
    fill(decoder, lambda name, part: torch.zeros(parameter_shapes(config)[name])[part])
    keep_gathered(decoder, zero_stage=zero_stage)
    begin_pass(decoder, zero_stage=zero_stage, last=False)
    attention, some = PackedAttention([9]), torch.ones(8)
    ids = torch.arange(9)
    logprobs, _ = decoder.score(
        ids,
        attention.positions,
        attention,
        predictors=ids[:-1],
        targets=ids[1:],
        temperatures=some,
    )
    logprobs.sum().backward()
    kept: dict[int, int] = {}
    groups = [
        getattr(module, "_get_fsdp_state")()._fsdp_param_group  # noqa: B009
        for module in decoder.modules()
        if hasattr(module, "_get_fsdp_state")
    ]
    for each in (parameter for group in groups for parameter in group.fsdp_params):
        gathered = shard_of(each._unsharded_param) if hasattr(each, "_unsharded_param") else None
        gradients = [each.unsharded_accumulated_grad]
        if gathered is not None:
            gradients.append(each._unsharded_param.grad)
        for tensor in (gathered, *(shard_of(one) for one in gradients if one is not None)):
            if tensor is not None:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
    return sum(kept.values())


@pytest.mark.gloo
def test_predicted_memory_of_the_zero_stages_is_what_stays_between_two_passes() -> None:
    model = ModelConfig.from_dict(SIZES)
    shapes = parameter_shapes(model)
    layers = sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name)
    outside = sum(math.prod(shape) for name, shape in shapes.items() if ".layers." not in name)
    held = {stage: max(on_ranks(between_passes, stage, dp=2)) for stage in (1, 2, 3)}
    assert held[3] == pytest.approx(0, abs=1000)
    assert held[2] == pytest.approx(2 * layers + 4 * outside, rel=WITHIN)
    assert held[1] == pytest.approx(held[2] + 4 * (layers + outside), rel=WITHIN)
    three, two, one = (
        predict_memory(model, num_tokens=10, dp=2, activations=torch.bfloat16, zero_stage=stage)
        for stage in (3, 2, 1)
    )
    # Stage 3 has two layers at a time, and all stages the gradients outside of the layers.
    assert two.gathered - three.gathered == pytest.approx(2 * layers / 3, rel=WITHIN)
    assert one.gathered - two.gathered == 4 * layers


def exchanges(mesh: Mesh, zero_stage: int, passes: int) -> tuple[int, int]:
    """How often FSDP gathers weights and sums gradients in the passes of a minibatch."""
    decoder = build_decoder(ModelConfig.from_dict(SIZES), mesh=mesh)
    fill(decoder, lambda name, part: torch.ones(PARAMETERS[name])[part])
    keep_gathered(decoder, zero_stage=zero_stage)
    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(_fsdp_param_group, name)

        def call(*arguments: Any, **others: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **others)

        setattr(_fsdp_param_group, name, call)  # this process ends with the test

    counted("foreach_all_gather")
    counted("foreach_reduce")
    attention, some, ids = PackedAttention([9]), torch.ones(8), torch.arange(9)
    for number in range(passes):
        begin_pass(decoder, zero_stage=zero_stage, last=number == passes - 1)
        logprobs, _ = decoder.score(
            ids,
            attention.positions,
            attention,
            predictors=ids[:-1],
            targets=ids[1:],
            temperatures=some,
        )
        logprobs.sum().backward()
    return counts["foreach_all_gather"], counts["foreach_reduce"]


@pytest.mark.gloo
def test_each_zero_stage_exchanges_as_often_as_it_says() -> None:
    """Three layers, and what is outside of them, which stays gathered during a pass."""
    counts = {stage: on_ranks(exchanges, stage, 5, dp=2)[0] for stage in (3, 2, 1)}
    assert counts == {3: ((2 * 3 + 1) * 5, 4 * 5), 2: (4, 4 * 5), 1: (4, 4)}


def test_parts_that_scale_with_the_mesh_do_and_the_others_do_not() -> None:
    model = replace(ModelConfig.from_dict(SIZES), num_kv_heads=8)
    one, four = (
        predict_memory(model, num_tokens=512),
        predict_memory(model, num_tokens=512, dp=2, tp=2),
    )
    assert (
        one.weights / 4 < four.weights < one.weights / 3.9
    )  # norms are whole on each rank of the tensor-parallel axis
    units = 3 * sum(math.prod(shape) for shape in parameter_shapes(model).values()) * 4
    assert four.snapshot - units == pytest.approx(one.snapshot / 4, rel=0.02)
    assert four.written == one.written == one.snapshot
    assert four.host == pytest.approx(one.host / 4, rel=0.02)
    assert one.activations / 2 < four.activations < one.activations
    assert four.on_device < one.on_device
