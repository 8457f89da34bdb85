"""What benchmarks/gpu.py says about its figures."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_verdict import GOAL_MFU, PRIME_RL, Published, verdict

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
SHORT = PRIME_RL[16_384]


def judged(
    tokens_per_s: float,
    mfu: float | None,
    *,
    hardware: str = H100,
    billions: float = 0.6,
    published: Published | None = SHORT,
) -> dict[str, Any]:
    measured = {"tokens_per_s": tokens_per_s, "mfu": mfu}
    size = billions * 1e9
    return verdict(measured, hardware=hardware, num_parameters=size, published=published)


def test_figures_of_the_peer_are_the_published_ones() -> None:
    figures = {
        length: (each.tokens_per_s, each.mfu, each.hardware) for length, each in PRIME_RL.items()
    }
    assert figures == {16_384: (11_900, 0.11, "H100"), 65_536: (10_150, 0.27, "H100")}


@pytest.mark.parametrize(
    ("tokens_per_s", "mfu", "hardware", "begins"),
    [
        (11_901, 0.01, H100, "ahead by tokens/s: 11,901 tokens/s, MFU 0.01 on NVIDIA H100"),
        (11_900, 0.99, H100, "behind by tokens/s: "),
        (20_000, 0.11, H200, "behind by MFU, for the GPUs differ: 20,000 tokens/s"),
        (1_000, 0.12, H200, "ahead by MFU, for the GPUs differ: "),
        (20_000, None, "Some GPU", "no verdict by MFU, for the GPUs differ: 20,000 tokens/s, MFU "),
    ],
)
def test_rates_are_compared_on_the_same_gpu_and_shares_of_the_peak_on_others(
    tokens_per_s: float, mfu: float | None, hardware: str, begins: str
) -> None:
    line = judged(tokens_per_s, mfu, hardware=hardware)["published"]
    assert line.startswith(begins)
    assert line.endswith(
        "prime-rl, Qwen3-0.6B at 16,384 tokens: 11,900 tokens/s, MFU 0.11 on one H100"
    )


def test_the_goal_is_for_models_from_a_billion_and_a_half() -> None:
    lines = [judged(1, mfu, billions=1.54, published=None) for mfu in (GOAL_MFU, 0.44, None)]
    assert [line["goal"].partition(":")[0] for line in lines] == ["reached", "missed", "no verdict"]
    assert lines[1]["goal"] == f"missed: MFU 0.44 on {H100}, the goal is 0.45"
    assert "goal" not in judged(1, 0.5)
