"""Several ranks against a loop in float64 that shares no code with them."""

from __future__ import annotations

from typing import Any

import pytest
from parallel_world import MIXTURE, check_against_float64

pytestmark = pytest.mark.gloo
DENSE: dict[str, Any] = {"learner": {"num_minibatches": 2, "microbatch_tokens": 20}}
REFERENCE: dict[str, Any] = {
    "learner": {"num_minibatches": 2, "zero_stage": 1},
    "algorithm": {"loss_mean": "sequence", "kl_coef": 0.5, "overlong_filtering": True},
    "model": {"tie_embeddings": False},
}
EXPERTS: dict[str, Any] = {"learner": {"microbatch_tokens": 20}, "model": MIXTURE}


@pytest.mark.parametrize("form", [DENSE, REFERENCE], ids=["dense", "KL term"])
@pytest.mark.parametrize(("dp", "cp", "tp"), [(2, 1, 2), (1, 2, 1), (2, 2, 1)])
def test_three_steps_of_ranks_equal_a_loop_in_float64(
    dp: int, cp: int, tp: int, form: dict[str, Any]
) -> None:
    check_against_float64(form, dp=dp, cp=cp, tp=tp)


@pytest.mark.parametrize(("dp", "cp", "tp"), [(1, 1, 2), (2, 1, 2), (1, 2, 2)])
def test_three_steps_with_divided_experts_equal_a_loop_in_float64(
    dp: int, cp: int, tp: int
) -> None:
    check_against_float64(EXPERTS, dp=dp, cp=cp, tp=tp)
