"""A mixture of experts over ranks: three steps, as one rank makes them, in float32."""

from __future__ import annotations

from typing import Any

import pytest
from parallel_world import MIXTURE, check_three_steps

pytestmark = pytest.mark.gloo
FORMS: tuple[dict[str, Any], ...] = (
    {"learner": {"num_minibatches": 2, "microbatch_tokens": 20, "recompute": "mlp"}},
    {"learner": {"recompute": "all", "zero_stage": 1}, "algorithm": {"kl_coef": 0.5}},
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("dp", "cp", "tp"), [(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 3)])
def test_three_steps_with_divided_experts_equal_those_of_one_rank(
    dp: int, cp: int, tp: int, form: dict[str, Any]
) -> None:
    model = MIXTURE if tp == 2 else {**MIXTURE, "num_heads": 3, "num_kv_heads": 1}
    check_three_steps({**form, "model": model}, dp=dp, cp=cp, tp=tp)
