"""One rank against a loop in float64 that shares no code with it."""

from __future__ import annotations

from typing import Any

import float64_learner
import pytest
from parallel_world import MIXTURE, check_against_float64

FORMS: dict[str, dict[str, Any]] = {
    "tied with biases": {"learner": {"microbatch_tokens": 20}},
    "two updates, norms of heads": {
        "learner": {"num_minibatches": 2},
        "algorithm": {"overlong_filtering": True},
        "model": {"family": "qwen3", "qkv_bias": False, "qk_norm": True},
    },
    "mean over responses, KL term, untied": {
        "learner": {"num_minibatches": 2, "recompute": "mlp"},
        "algorithm": {"loss_mean": "sequence", "kl_coef": 0.5, "clip_high": 0.2},
        "model": {"tie_embeddings": False, "num_kv_heads": 1},
    },
    "experts": {"learner": {"recompute": "all"}, "model": MIXTURE},
}


@pytest.mark.parametrize("form", FORMS)
def test_three_steps_of_a_rank_equal_a_loop_in_float64(form: str) -> None:
    check_against_float64(FORMS[form])


@pytest.mark.parametrize(
    ("function", "broken"),
    [
        ("rotated", lambda x, _: x),
        ("advantages", lambda group: [each.reward for each in group.rollouts]),
        ("BETA2", 0.998),
    ],
)
def test_another_formula_is_detected(
    function: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float64_learner, function, broken)
    with pytest.raises(AssertionError):
        check_against_float64(FORMS["tied with biases"])
