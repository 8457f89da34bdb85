"""A mixture of experts over ranks: three steps, as one rank makes them, in float32."""

from __future__ import annotations

from typing import Any

import pytest
from gloo import on_ranks
from parallel_world import MIXTURE, check_ranks_agree, three_steps

from dapo_async.algorithm import summarise
from dapo_async.model import Mesh

pytestmark = pytest.mark.gloo
FORMS: tuple[dict[str, Any], ...] = (
    {"learner": {"microbatch_tokens": 20, "recompute": "mlp"}},
    {"learner": {"recompute": "all", "zero_stage": 1}, "algorithm": {"kl_coef": 0.5}},
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("dp", "cp", "tp"), [(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 3)])
def test_three_steps_with_divided_experts_equal_those_of_one_rank(
    dp: int, cp: int, tp: int, form: dict[str, Any]
) -> None:
    model = MIXTURE if tp == 2 else {**MIXTURE, "num_heads": 3, "num_kv_heads": 1}
    whole = {**form, "model": model}
    alone, ranks = three_steps(Mesh(), whole), on_ranks(three_steps, whole, dp=dp, cp=cp, tp=tp)
    check_ranks_agree(ranks, per_batch=cp * tp)
    for step in range(3):
        per_dp = [rank.steps[step] for rank in ranks[:: cp * tp]]
        ours, theirs = summarise(alone.steps[step]), summarise(sum(per_dp[1:], start=per_dp[0]))
        # AdamW passes the rounding of the gradients of seldom used experts on to later steps.
        tolerance = 1e-2 if step else 2e-5
        for name in ("loss", "entropy", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=tolerance, abs=tolerance), name
