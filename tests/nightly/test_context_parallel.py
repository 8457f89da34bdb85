"""Context-parallel ranks against a single one: every form of training in three layouts.

The gate has two forms in one layout (`test_parallel.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gloo import on_ranks
from parallel_world import (
    CONFIG,
    EXTRAS,
    FORMS,
    check_decoder,
    check_three_steps,
    equal,
    go_on,
    start_logprobs,
)
from rank_layouts import RANKS
from run_support import TINY, check_conservation, command, finished

from dapo_async.model import Mesh

pytestmark = pytest.mark.gloo
LAYOUTS = ((1, 2, 1), (2, 2, 1), (1, 2, 2))  # dp, cp, tp
# Query heads, key-value heads, cp, tp: heads that do not divide, and fewer key-value heads than
# ranks.
HEADS = ((3, 1, 2, 1), (3, 3, 2, 1), (5, 1, 3, 1), (6, 2, 4, 1), (6, 3, 2, 1), (6, 2, 2, 2))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("dp", "cp", "tp"), LAYOUTS)
def test_a_slice_of_the_tokens_has_the_logprobs_and_gradients_of_the_whole(
    dp: int, cp: int, tp: int, extra: str
) -> None:
    check_decoder(replace(CONFIG, **EXTRAS[extra]), dp=dp, cp=cp, tp=tp)


@pytest.mark.parametrize(("heads", "kv_heads", "cp", "tp"), HEADS)
def test_any_number_of_heads_can_be_exchanged(heads: int, kv_heads: int, cp: int, tp: int) -> None:
    check_decoder(replace(CONFIG, num_heads=heads, num_kv_heads=kv_heads), cp=cp, tp=tp)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("dp", "cp", "tp"), LAYOUTS)
def test_three_steps_of_ranks_with_slices_equal_those_of_one_rank(
    dp: int, cp: int, tp: int, form: dict[str, Any]
) -> None:
    check_three_steps(form, dp=dp, cp=cp, tp=tp)


def test_ranks_whose_slice_is_all_padding_take_part() -> None:
    """Passes of one rollout have as few as two tokens, for four ranks."""
    form = {"learner": {"microbatch_tokens": 1, "zero_stage": 2}, "model": {"num_heads": 4}}
    check_three_steps(form, cp=4)


@pytest.mark.parametrize(("dp", "cp", "tp"), LAYOUTS)
def test_proximal_logprobs_of_slices_are_those_of_the_start_of_the_step(
    dp: int, cp: int, tp: int
) -> None:
    for count, same, unchanged in on_ranks(start_logprobs, dp=dp, cp=cp, tp=tp):
        assert (count > 0, same, unchanged) == (True, True, True)


def test_a_state_loads_with_another_number_of_slices(tmp_path: Path) -> None:
    on_ranks(go_on, tmp_path / "1x2x1", None, cp=2)
    given = tmp_path / "1x2x1" / "before"
    metrics, _ = go_on(Mesh(), tmp_path / "alone", given)
    (theirs, _), *_ = on_ranks(go_on, tmp_path / "2x2x1", given, dp=2, cp=2)
    on_ranks(go_on, tmp_path / "1x2x2", tmp_path / "2x2x1" / "before", cp=2, tp=2)
    for size in ("alone", "2x2x1", "1x2x2"):
        assert equal(tmp_path / size / "before", given), size
    assert theirs.sums["grad_norm"][0] == pytest.approx(metrics.sums["grad_norm"][0], rel=1e-3)


@pytest.mark.ray
def test_a_run_with_slices_equals_one_rank_which_resumes_its_checkpoint(tmp_path: Path) -> None:
    layout = ("learner.context_parallel=2", "learner.num_minibatches=2", "algorithm.kl_coef=0.01")
    run = finished(
        tmp_path / "run", *TINY, *RANKS, *layout, "train.record=true", "train.num_steps=4"
    )
    assert run.exit_code == 0, run.output
    check_conservation(run.summary["groups"])
    assert run.summary["handshake"]["passed"] >= 4, "each publish had all shards, whole"
    for row in run.metrics:
        assert row["tokens"] == row["response_tokens"] * row["rollouts"], "counted once"
    said = command("rerun", str(run.root))
    assert said.returncode == 0, said.stdout + said.stderr
    assert "all 4 steps are equal, to 0.05 of each number" in said.stdout
    alone = finished(
        tmp_path / "run", "learner.context_parallel=1", "train.num_steps=6", config=None
    )
    assert alone.exit_code == 0, alone.output
    assert [row["step"] for row in alone.metrics] == list(range(6))
