"""The loss against hand-computed numbers and naive loops, and the options that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_async.algorithm import (
    LossInputs,
    LossOptions,
    microbatch_loss,
    policy_loss,
    proximal_from,
    step_metrics,
    summarise,
)

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}


def logs(*ratios: float) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def drawn(num_tokens: int, *, seed: int) -> dict[str, Any]:
    """Random logprobs whose ratios often leave the clip range.

    Four interleaved sequences; one token in four is masked.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(num_tokens, generator=generator, dtype=torch.float64) for _ in range(4)]
    proximal = -1.5 + 0.5 * normal[0]
    return {
        "current_logprobs": proximal + 0.3 * normal[1],
        "proximal_logprobs": proximal,
        "behaviour_logprobs": proximal + 0.4 * normal[2],
        "advantages": normal[3],
        "mask": torch.rand(num_tokens, generator=generator) > 0.25,
        "sequence_ids": torch.randint(-2, 2, (num_tokens,), generator=generator),
    }


def loss_and_gradient(given: dict[str, Any], **options: Any) -> tuple[float, list[float]]:
    current = given["current_logprobs"].clone().requires_grad_()
    loss, _ = policy_loss(
        current,
        **{name: value for name, value in given.items() if name != "current_logprobs"},
        **CLIP,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, current)
    return loss.item(), gradient.tolist()


def on_policy(behaviour_ratios: Tensor, **others: Any) -> dict[str, Any]:
    """u = 1, A = 1: the loss is −mean(w) and its gradient −w / T."""
    zeros = torch.zeros_like(behaviour_ratios)
    ones = torch.ones_like(behaviour_ratios)
    return {
        "current_logprobs": zeros,
        "proximal_logprobs": zeros,
        "behaviour_logprobs": -behaviour_ratios,
        "advantages": ones,
        "mask": ones,
    } | others


def test_entropy_bonus_rewards_the_mean_entropy_of_the_tokens_in_the_loss() -> None:
    given = on_policy(logs(1, 1, 1)) | {
        "advantages": torch.zeros(3, dtype=torch.float64),
        "mask": torch.tensor([1, 0, 1]),
    }
    entropies = torch.tensor([1.0, math.nan, 0.5], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(**given, **CLIP, entropies=entropies, entropy_bonus=0.1)
    (gradient,) = torch.autograd.grad(loss, entropies)
    assert loss.item() == pytest.approx(-0.1 * 1.5 / 2)
    assert gradient.tolist() == pytest.approx([-0.05, 0.0, -0.05])
    with pytest.raises(ValueError, match="entropy_bonus needs entropies"):
        policy_loss(**given, **CLIP, entropy_bonus=0.1)
    with pytest.raises(ValueError, match=r"entropy_bonus \(-1\) must not be negative"):
        policy_loss(**given, **CLIP, entropies=entropies, entropy_bonus=-1)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_equals_a_loop_over_tokens_in_double_precision(estimator: str) -> None:
    given = drawn(30, seed=4)
    random = torch.Generator().manual_seed(9)
    reference = given["current_logprobs"].detach() + torch.randn(30, generator=random).double()
    reference[given["mask"] == 0] = math.nan
    shares = torch.rand(30, generator=random).double()
    options = {"token_weights": shares, "num_tokens": 40.0}
    plain, gradient = loss_and_gradient(given, **options)
    loss, with_kl = loss_and_gradient(
        given, **options, reference_logprobs=reference, kl_coef=0.3, kl_estimator=estimator
    )
    expected = 0.0
    for token in torch.nonzero(given["mask"]).flatten().tolist():
        gap = float(given["current_logprobs"][token]) - float(reference[token])
        value, slope = {
            "k1": (gap, 1.0),
            "k2": (gap**2 / 2, gap),
            "k3": (math.exp(-gap) - 1 + gap, 1 - math.exp(-gap)),
        }[estimator]
        share = 0.3 * float(shares[token]) / 40
        expected += share * value
        assert with_kl[token] - gradient[token] == pytest.approx(share * slope, abs=1e-15)
    assert loss - plain == pytest.approx(expected, abs=1e-14)


def test_a_kl_term_without_its_reference_or_with_a_wrong_option_is_refused() -> None:
    given = on_policy(logs(1, 1))
    with pytest.raises(ValueError, match="kl_coef needs reference_logprobs"):
        policy_loss(**given, **CLIP, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl_coef \(-0.1\) must not be negative"):
        policy_loss(**given, **CLIP, kl_coef=-0.1)
    with pytest.raises(
        ValueError, match=r"kl_estimator \('k4'\) is unknown; set one of k1, k2, k3"
    ):
        policy_loss(**given, **CLIP, kl_estimator="k4")


def test_the_clip_bounds_gains_and_the_dual_clip_bounds_losses() -> None:
    # u = 1.5 and 0.5 with A = 2: min(3, 2.56) and min(1, 1.6).
    # u = 0.5 and 8 with A = −1: −0.8 and −8, or −3 under the dual clip.
    given = on_policy(logs(1, 1, 1, 1)) | {
        "current_logprobs": logs(1.5, 0.5, 0.5, 8.0),
        "advantages": torch.tensor([2.0, 2.0, -1.0, -1.0], dtype=torch.float64),
    }
    loss, gradient = loss_and_gradient(given)
    assert loss == pytest.approx(-(2.56 + 1.0 - 0.8 - 8.0) / 4)
    assert gradient == pytest.approx([0.0, -0.25, 0.0, 2.0])
    loss, gradient = loss_and_gradient(given, dual_clip=3.0)
    assert loss == pytest.approx(-(2.56 + 1.0 - 0.8 - 3.0) / 4)
    assert gradient == pytest.approx([0.0, -0.25, 0.0, 0.0])
    _, diagnostics = policy_loss(**given, **CLIP, dual_clip=3.0)
    assert [
        diagnostics[f"{rule}_tokens"].item() for rule in ("clip_low", "clip_high", "dual_clip")
    ] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "weights", "touched"),
    [
        ({"correction": "none"}, [1, 1, 1, 1], {}),
        ({}, [2, 1, 0.25, 0.5], {"weight_truncated_fraction": 0.25}),
        (
            {"correction_floor": 0.4},
            [2, 1, 0.4, 0.5],
            {"weight_truncated_fraction": 0.25, "weight_floored_fraction": 0.25},
        ),
        (
            {"correction_cap": None, "correction_floor": 0.4},
            [4, 1, 0.4, 0.5],
            {"weight_floored_fraction": 0.25},
        ),
        ({"correction_cap": None}, [4, 1, 0.25, 0.5], {}),
        ({"correction": "mask"}, [0, 1, 0.25, 0.5], {"weight_rejected_fraction": 0.25}),
        (
            {"correction": "mask", "correction_cap": 4.1, "correction_floor": 0.5},
            [4, 1, 0, 0.5],
            {"weight_rejected_fraction": 0.25},
        ),
        # Sequence 7 has the ratios 4 and 0.25: product 1, geometric mean 1.
        # Sequence −1 has the ratios 1 and 0.5: product 0.5, geometric mean 0.7071.
        ({"correction_level": "sequence"}, [1, 0.5, 1, 0.5], {}),
        (
            {"correction_level": "sequence", "correction_cap": 0.75},
            [0.75, 0.5, 0.75, 0.5],
            {"weight_truncated_fraction": 0.5},
        ),
        ({"correction_level": "sequence_mean"}, [1, 0.70710678, 1, 0.70710678], {}),
        (
            {"correction_level": "sequence_mean", "correction_floor": 0.8},
            [1, 0.8, 1, 0.8],
            {"weight_floored_fraction": 0.5},
        ),
        (
            {"correction": "mask", "correction_level": "sequence", "correction_floor": 0.6},
            [1, 0, 1, 0],
            {"weight_rejected_fraction": 0.5},
        ),
        (
            {"correction": "mask", "correction_level": "sequence_mean", "correction_floor": 0.6},
            [1, 0.70710678, 1, 0.70710678],
            {},
        ),
        # Token truncation, and rejection of sequence −1 as a whole.
        (
            {"sequence_band": (0.8, None)},
            [2, 0, 0.25, 0],
            {"weight_truncated_fraction": 0.25, "sequence_rejected_fraction": 0.5},
        ),
        ({"correction": "none", "sequence_band": (0.7, 1.0)}, [1, 1, 1, 1], {}),
    ],
    ids=str,
)
def test_each_correction_gives_the_weights_computed_by_hand(
    options: dict[str, Any], weights: list[float], touched: dict[str, float]
) -> None:
    given = on_policy(logs(4, 1, 0.25, 0.5), sequence_ids=torch.tensor([7, -1, 7, -1]))
    loss, gradient = loss_and_gradient(given, **options)
    assert loss == pytest.approx(-sum(weights) / 4)
    assert gradient == pytest.approx([-weight / 4 for weight in weights])
    _, diagnostics = policy_loss(**given, **CLIP, **options)
    metrics = step_metrics(diagnostics).flat()
    rules = (
        "weight_truncated_fraction",
        "weight_floored_fraction",
        "weight_rejected_fraction",
        "sequence_rejected_fraction",
        "dropped_fraction",
    )
    assert {rule: metrics[rule] for rule in rules if metrics[rule]} == touched


def test_a_band_bounds_the_ratio_itself_and_not_its_inverse() -> None:
    _, gradient = loss_and_gradient(
        on_policy(logs(1.6, 0.65)), correction="mask", correction_cap=1.4, correction_floor=0.6
    )
    assert gradient == pytest.approx([0.0, -0.325])


def test_masked_tokens_do_not_enter_the_ratio_of_their_sequence() -> None:
    """The ratio 4 alone has the geometric mean 4; with the masked token it would be 1."""
    given = on_policy(logs(4, 0.25), sequence_ids=torch.tensor([0, 0])) | {
        "mask": torch.tensor([1, 0])
    }
    loss, gradient = loss_and_gradient(given, correction_level="sequence_mean", correction_cap=3.0)
    assert loss == pytest.approx(-3.0)
    assert gradient == pytest.approx([-3.0, 0.0])


@pytest.mark.parametrize("objective", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_values_of_masked_tokens_change_neither_loss_gradient_nor_diagnostics(
    objective: str, garbage: float
) -> None:
    given = drawn(40, seed=1)
    dirty = {name: value.clone() for name, value in given.items()}
    for name in ("current_logprobs", "proximal_logprobs", "behaviour_logprobs", "advantages"):
        dirty[name][~given["mask"]] = garbage
    options: dict[str, Any] = {"objective": objective, "correction_level": "sequence"}
    assert loss_and_gradient(dirty, **options) == loss_and_gradient(given, **options)
    clean_sums, dirty_sums = (
        policy_loss(**inputs, **CLIP, **options)[1] for inputs in (given, dirty)
    )
    assert step_metrics(dirty_sums) == step_metrics(clean_sums)


@pytest.mark.parametrize("objective", ["dapo", "gspo", "cispo"])
def test_a_filler_microbatch_has_loss_zero_and_gradient_zero(objective: str) -> None:
    given = drawn(5, seed=2) | {"mask": torch.zeros(5)}
    assert loss_and_gradient(given, objective=objective) == (0.0, [0.0] * 5)
    assert loss_and_gradient(given, objective=objective, num_tokens=100) == (0.0, [0.0] * 5)
    empty = {name: value[:0] for name, value in given.items()}
    assert loss_and_gradient(empty, objective=objective, num_tokens=torch.tensor(0.0)) == (0.0, [])
    nothing = {
        "loss_tokens": 0.0,
        "behaviour_weight_max": 0.0,
        "behaviour_log_ratio_max": 0.0,
        "current_log_ratio_max": 0.0,
    }
    for filler in (given, empty):
        assert (
            summarise(step_metrics(policy_loss(**filler, **CLIP, objective=objective)[1]))
            == nothing
        )


def naive(given: dict[str, Any], objective: str) -> tuple[float, list[float]]:
    """gspo and cispo from their formulas, one token at a time, with the gradient by hand.

    The behaviour weight is truncated at 2 (gspo: the product over the sequence).
    """
    current, proximal, behaviour, advantage = (
        given[name].tolist()
        for name in ("current_logprobs", "proximal_logprobs", "behaviour_logprobs", "advantages")
    )
    live = [t for t, unmasked in enumerate(given["mask"].tolist()) if unmasked]
    names = given["sequence_ids"].tolist()
    loss, gradient = 0.0, [0.0] * len(current)
    for t in live:
        siblings = [s for s in live if names[s] == names[t]]
        a = advantage[t]
        if objective == "gspo":
            w = min(math.exp(sum(proximal[s] - behaviour[s] for s in siblings)), 2.0)
            ratio = math.exp(sum(current[s] - proximal[s] for s in siblings) / len(siblings))
            clipped = min(max(ratio, 0.8), 1.28)
            loss -= w * min(ratio * a, clipped * a) / len(live)
            gradient[t] = -w * ratio * a / len(live) if ratio * a <= clipped * a else 0.0
        else:
            w = min(math.exp(proximal[t] - behaviour[t]), 2.0)
            coefficient = min(max(math.exp(current[t] - proximal[t]), 0.8), 1.28)
            loss -= w * coefficient * a * current[t] / len(live)
            gradient[t] = -w * coefficient * a / len(live)
    return loss, gradient


@pytest.mark.parametrize("objective", ["gspo", "cispo"])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_gspo_and_cispo_equal_a_naive_loop(objective: str, seed: int) -> None:
    given = drawn(30, seed=seed)
    given["current_logprobs"] += (
        0.4 * given["sequence_ids"]
    )  # some sequences leave gspo's clip range
    loss, gradient = loss_and_gradient(given, objective=objective)
    expected_loss, expected_gradient = naive(given, objective)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert gradient == pytest.approx(expected_gradient, abs=1e-12)
    if objective == "gspo":
        assert any(
            value == 0
            for value, unmasked in zip(gradient, given["mask"].tolist(), strict=True)
            if unmasked
        ), "no sequence was clipped"


def test_a_token_dropped_by_keep_stays_in_the_denominator() -> None:
    given = on_policy(logs(1, 1, 1, 1), keep=torch.tensor([True, False, True, True]))
    loss, gradient = loss_and_gradient(given)
    assert loss == pytest.approx(-0.75)
    assert gradient == pytest.approx([-0.25, 0.0, -0.25, -0.25])
    assert policy_loss(**given, **CLIP)[1]["dropped_tokens"].item() == 1


def test_log_ratios_are_clamped_to_twenty() -> None:
    given = on_policy(torch.tensor([1000.0])) | {
        "current_logprobs": torch.tensor([50.0]),
        "advantages": torch.tensor([-1.0]),
    }
    loss, gradient = loss_and_gradient(given, correction_cap=None)
    assert loss == pytest.approx(math.exp(40.0))
    assert gradient == [0.0]
    assert policy_loss(**given, **CLIP)[1]["behaviour_log_ratio_max"].item() == 1000.0


@pytest.mark.parametrize("correction", ["truncate", "mask", "none"])
def test_a_broken_logprob_in_an_unmasked_token_is_never_hidden(correction: str) -> None:
    given = on_policy(logs(1, 1)) | {"current_logprobs": torch.tensor([0.0, math.nan])}
    assert math.isnan(loss_and_gradient(given, correction=correction)[0])
    if correction != "none":
        assert math.isnan(
            loss_and_gradient(on_policy(torch.tensor([0.0, math.nan])), correction=correction)[0]
        )


def test_half_precision_logprobs_are_computed_in_float32() -> None:
    given = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in drawn(20, seed=6).items()
    }
    wide = {
        name: value.float() if value.is_floating_point() else value for name, value in given.items()
    }
    loss, _ = policy_loss(**given, **CLIP)
    assert loss.dtype == torch.float32
    assert loss.item() == policy_loss(**wide, **CLIP)[0].item()


@pytest.mark.parametrize("correction", ["truncate", "none"])
def test_the_current_policy_as_its_own_proximal_gives_the_policy_gradient(correction: str) -> None:
    """No gradient flows through the proximal logprobs, so it neither cancels nor changes."""
    current = torch.tensor([0.0, 2.0], requires_grad=True)
    given = on_policy(torch.zeros(2)) | {
        "current_logprobs": current,
        "proximal_logprobs": current,
        "advantages": torch.tensor([1.0, -3.0]),
    }
    (gradient,) = torch.autograd.grad(
        policy_loss(**given, **CLIP, correction=correction)[0], current
    )
    assert gradient.tolist() == ([-0.5, 3.0] if correction == "truncate" else [-0.5, 1.5])


def test_each_proximal_mode_gives_its_logprobs() -> None:
    current, behaviour = torch.tensor([-1.0] * 5, requires_grad=True), torch.tensor([-3.0] * 5)
    common: dict[str, Any] = {"current_logprobs": current, "behaviour_logprobs": behaviour}
    assert proximal_from("current", **common).tolist() == [-1.0] * 5
    assert proximal_from("behaviour", **common).tolist() == [-3.0] * 5
    assert (
        proximal_from("recompute", **common, recomputed_logprobs=torch.full((5,), -2.0)).tolist()
        == [-2.0] * 5
    )
    # α = 0 at staleness 0 (and below) and 1, then 1/2, 3/4.
    versions = torch.tensor([9, 8, 7, 6, 4])
    interpolated = proximal_from(
        "interpolate", **common, learner_version=8, behaviour_versions=versions
    )
    assert interpolated.tolist() == [-3.0, -3.0, -3.0, -2.0, -1.5]
    assert not interpolated.requires_grad


def test_a_proximal_mode_without_its_input_is_refused() -> None:
    common: dict[str, Any] = {
        "current_logprobs": torch.zeros(2),
        "behaviour_logprobs": torch.zeros(2),
    }
    with pytest.raises(ValueError, match="recompute needs recomputed_logprobs"):
        proximal_from("recompute", **common)
    with pytest.raises(
        ValueError, match="interpolate needs learner_version and behaviour_versions"
    ):
        proximal_from("interpolate", **common, learner_version=3)
    with pytest.raises(ValueError, match="recompute, current, interpolate, behaviour"):
        proximal_from("decoupled", **common)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "grpo"}, r"objective \('grpo'\) is unknown; set one of dapo, gspo, cispo"),
        (
            {"correction": "clip"},
            r"correction \('clip'\) is unknown; set one of truncate, mask, none",
        ),
        (
            {"correction_level": "group"},
            r"correction_level \('group'\) is unknown; set one of token, sequence, sequence_mean",
        ),
        (
            {"objective": "gspo", "correction_level": "token"},
            "gspo does not take correction_level token; set it to sequence or sequence_mean",
        ),
        ({"clip_low": 0.0}, r"clip_low \(0\.0\)"),
        ({"clip_low": 1.2}, r"clip_low \(1\.2\)"),
        ({"clip_high": -0.28}, r"clip_high \(-0\.28\)"),
        ({"clip_high": math.nan}, r"clip_high \(nan\)"),
        ({"dual_clip": 1.0}, r"dual_clip \(1\.0\) must be greater than 1"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "no meaning for objective cispo"),
        ({"correction_cap": 0.0}, r"correction_cap \(0\.0\)"),
        ({"correction_floor": -0.1}, r"correction_floor \(-0\.1\)"),
        (
            {"correction_cap": 2.0, "correction_floor": 3.0},
            r"correction_cap \(2\.0\) must not be below correction_floor \(3\.0\)",
        ),
        ({"sequence_band": (1.1, 2.0)}, r"sequence_band \(1\.1, 2\.0\) must enclose 1"),
        ({"sequence_band": (None, 0.9)}, r"sequence_band \(None, 0\.9\) must enclose 1"),
        ({"sequence_band": (math.nan, None)}, r"sequence_band \(nan, None\) must enclose 1"),
    ],
    ids=str,
)
def test_an_unsupported_option_is_refused_with_its_value(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(**on_policy(logs(1, 1)), **(CLIP | options))
    with pytest.raises(ValueError, match=message):
        LossOptions(**(CLIP | options))


def test_the_public_function_is_the_loss_of_its_options_and_inputs() -> None:
    given = drawn(30, seed=8)
    options: dict[str, Any] = {"dual_clip": 3.0, "correction": "mask"}
    loss, diagnostics = policy_loss(**given, **CLIP, **options, num_tokens=100)
    same, same_diagnostics = microbatch_loss(
        LossInputs(**given), LossOptions(**CLIP, **options), num_tokens=100
    )
    assert loss.item() == same.item()
    assert step_metrics(diagnostics) == step_metrics(same_diagnostics)


def test_sequence_forms_without_sequence_ids_and_wrong_shapes_are_refused() -> None:
    given = on_policy(logs(1, 1))
    forms: list[dict[str, Any]] = [
        {"objective": "gspo"},
        {"objective": "gspo", "correction": "none"},
        {"correction_level": "sequence_mean"},
        {"sequence_band": (0.9, 1.1)},
    ]
    for options in forms:
        with pytest.raises(ValueError, match="needs sequence_ids"):
            policy_loss(**given, **CLIP, **options)
    with pytest.raises(
        ValueError,
        match=r"advantages \(1, 2\) must have the shape \[T\] of current_logprobs \(2,\)",
    ):
        policy_loss(**(given | {"advantages": torch.ones(1, 2)}), **CLIP)
    with pytest.raises(ValueError, match=r"num_tokens \(-1\)"):
        policy_loss(**given, **CLIP, num_tokens=-1)
