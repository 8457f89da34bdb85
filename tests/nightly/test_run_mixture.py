"""Whole runs with a mixture of experts, a tiny Qwen3-MoE: native engine and SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import CONFIGS
from run_support import (
    TINY,
    Finished,
    check_checkpoint,
    check_conservation,
    check_token_flow,
    finished,
)
from tiny_mixture import SIZES, hugging_face

TOKENIZER = CONFIGS / "base" / "quickstart"
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture with the quickstart's tokenizer."""
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("mixture")
    dense = AutoConfig.from_pretrained(TOKENIZER)
    sizes = {"vocab_size": dense.vocab_size, "eos_token_id": dense.eos_token_id}
    hugging_face(folder, **sizes, max_position_embeddings=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


def check(run: Finished, base: Path) -> None:
    assert run.exit_code == 0, run.output
    summary = run.summary
    assert (summary["status"], summary["steps"]) == ("done", STEPS)
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    assert summary["engine_restarts"] == 0
    experts, per_token = SIZES["num_experts"], SIZES["num_experts_per_tok"]
    for row in run.metrics:
        # Each token has this many experts: at most so many times the mean load.
        assert 1.0 <= row["expert_load_max"] <= experts / per_token, row["expert_load_max"]
    check_checkpoint(run.checkpoint, differs_from=base)


@pytest.mark.ray
@pytest.mark.parametrize("routing_replay", ["false", "true"])
def test_a_run_of_two_ranks_that_divide_the_experts(
    base: Path, routing_replay: str, tmp_path: Path
) -> None:
    more = (
        f"model.path={base}",
        "learner.tensor_parallel=2",
        "learner.lr=1e-3",
        f"learner.routing_replay={routing_replay}",
    )
    run = finished(tmp_path / "run", *TINY, *more)
    check(run, base)
    # Learner and engine have the same weights and the same precision.
    assert max(row["mismatch_k3"] for row in run.metrics if row["staleness_max"] == 0) < 1e-6


@pytest.mark.sglang
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_a_run_whose_engine_is_an_sglang_server(base: Path, transport: str, tmp_path: Path) -> None:
    more = (
        f"model.path={base}",
        "rollout.engine=sglang",
        "rollout.num_slots=32",
        "model.num_cpus=0.5",
        "deadlines.start_s=600",
        "learner.lr=1e-3",
        f"weights.transport={transport}",
    )
    run = finished(tmp_path / "run", *TINY, *more, timeout_s=900.0)
    check(run, base)
    assert max(row["mismatch_k3"] for row in run.metrics if row["staleness_max"] == 0) < 1e-4
