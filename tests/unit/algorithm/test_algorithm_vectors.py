"""Loss, gradient, advantages and diagnostics against public implementations on the same inputs.

The reference vectors are from verl 0.9.1 and AReaL 4aef98d.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from paths import SHARED
from torch import Tensor

from dapo_async.algorithm import group_advantages, policy_loss, step_metrics, summarise

VECTORS = SHARED / "reference" / "loss_vectors.json"
BATCHES: list[dict[str, Any]] = (
    json.loads(VECTORS.read_text())["batches"] if VECTORS.exists() else []
)
CASES = [
    pytest.param(batch, case, id=f"{batch['seed']}-{case['name']}")
    for batch in BATCHES
    for case in batch["cases"]
]

pytestmark = pytest.mark.skipif(
    not BATCHES,
    reason="shared/reference/loss_vectors.json is not beside the checkout",
)


def packed(rows: list[list[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    lengths = torch.tensor(batch["lengths"])
    return {
        "proximal_logprobs": packed(batch["proximal_logprobs"]),
        "behaviour_logprobs": packed(batch["behaviour_logprobs"]),
        "advantages": torch.tensor(batch["advantages_std"], dtype=torch.float64).repeat_interleave(
            lengths
        ),
        "mask": torch.ones(int(lengths.sum())),
        "sequence_ids": torch.arange(len(lengths)).repeat_interleave(lengths),
    }


@pytest.mark.parametrize(("batch", "case"), CASES)
def test_loss_and_gradient_equal_the_reference(batch: dict[str, Any], case: dict[str, Any]) -> None:
    params = {
        name: value
        for name, value in case["params"].items()
        if name not in ("proximal", "denominator")
    }
    given = inputs(batch)
    if case["params"].get("proximal") == "behaviour":
        given["proximal_logprobs"] = given["behaviour_logprobs"]
    current = packed(batch["current_logprobs"]).requires_grad_()
    loss, _ = policy_loss(current, **given, **params)
    (gradient,) = torch.autograd.grad(loss, current)
    torch.testing.assert_close(
        loss.detach(), torch.tensor(case["loss"], dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(gradient, packed(case["grad"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: str(batch["seed"]))
def test_diagnostics_equal_the_reference(batch: dict[str, Any]) -> None:
    _, diagnostics = policy_loss(
        packed(batch["current_logprobs"]), **inputs(batch), clip_low=0.2, clip_high=0.28
    )
    means = summarise(step_metrics(diagnostics))
    ours = {
        "behaviour_kl_k1": "behaviour_kl_k1",
        "behaviour_kl_k3": "behaviour_kl_k3",
        "chi2_token": "behaviour_chi2",
        "ess_token": "behaviour_ess",
    }
    assert {name: means[ours[name]] for name in batch["diagnostics"]} == pytest.approx(
        batch["diagnostics"], abs=1e-9
    )


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: str(batch["seed"]))
def test_advantages_equal_the_reference(batch: dict[str, Any]) -> None:
    rewards, group_ids = (
        torch.tensor(batch["rewards"], dtype=torch.float64),
        torch.tensor(batch["group_ids"]),
    )
    assert group_advantages(rewards, group_ids).tolist() == pytest.approx(
        batch["advantages_std"], abs=1e-9
    )
    assert group_advantages(rewards, group_ids, normalize_std=False).tolist() == pytest.approx(
        batch["advantages_no_std"], abs=1e-12
    )
