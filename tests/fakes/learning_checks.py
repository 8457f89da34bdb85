"""What a run that learned looks like."""

from __future__ import annotations

from typing import Any


def check_learning(summary: dict[str, Any]) -> None:
    """From guessing to solving, by longer answers."""
    assert summary["status"] == "done"
    assert summary["initial_accuracy"] < 0.35
    assert summary["final_accuracy"] >= 0.9, (
        f"accuracy {summary['initial_accuracy']} -> {summary['final_accuracy']}"
    )
    assert summary["final_response_tokens"] >= 2 * summary["initial_response_tokens"]
