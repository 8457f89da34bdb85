"""What `gpu.py` has measured, beside the goal and published figures of another project.

Pure, without torch. Rates of one GPU are compared on the GPU of the published figure only, shares
of the peak (MFU) on any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GOAL_MFU = 0.45  # of a model of at least `GOAL_PARAMETERS`
GOAL_PARAMETERS = 1.5e9


@dataclass(frozen=True, slots=True)
class Published:
    """A learner's rate on one GPU, with the model FLOPs counted as in `model/cost.py`."""

    source: str
    hardware: str
    tokens_per_s: float
    mfu: float


# prime-rl's published benchmark of Qwen3-0.6B on one H100, by tokens of a row.
PRIME_RL = {
    16_384: Published("prime-rl, Qwen3-0.6B at 16,384 tokens", "H100", 11_900, 0.11),
    65_536: Published("prime-rl, Qwen3-0.6B at 65,536 tokens", "H100", 10_150, 0.27),
}


def verdict(
    measured: Mapping[str, Any],
    *,
    hardware: str,
    num_parameters: float,
    published: Published | None,
) -> dict[str, Any]:
    """Lines for people, by what is compared.

    Each begins with `ahead`, `behind`, `reached`, `missed` or `no verdict`.

    `measured` has `tokens_per_s` and `mfu` (None where the peak of `hardware` is not known).
    """
    mfu, lines = measured.get("mfu"), {}
    of_mfu = "MFU unknown" if mfu is None else f"MFU {mfu:.2f}"
    if num_parameters >= GOAL_PARAMETERS:
        word = "no verdict" if mfu is None else "reached" if mfu >= GOAL_MFU else "missed"
        lines["goal"] = f"{word}: {of_mfu} on {hardware}, the goal is {GOAL_MFU}"
    if published is not None:
        same = published.hardware in hardware
        own, theirs = (
            (measured["tokens_per_s"], published.tokens_per_s) if same else (mfu, published.mfu)
        )
        word = "no verdict" if own is None else "ahead" if own > theirs else "behind"
        basis = "by tokens/s" if same else "by MFU, for the GPUs differ"
        lines["published"] = (
            f"{word} {basis}: {measured['tokens_per_s']:,.0f} tokens/s, {of_mfu} on {hardware}; "
            f"{published.source}: {published.tokens_per_s:,.0f} tokens/s, MFU {published.mfu} on "
            f"one {published.hardware}"
        )
    return lines
