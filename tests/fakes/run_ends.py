"""The end of a real run after a blow, and what all ends have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from run_support import (
    RAY_AGENTS,
    Finished,
    Live,
    check_checkpoint,
    check_conservation,
    check_token_flow,
)

END_S = 20.0  # from a death to the end of the run
LONG = ("train.num_steps=5000", "train.checkpoint_every_steps=2")


def end_after(live: Live, blow: Callable[[], None], *, within_s: float = END_S) -> Finished:
    """Strikes when the run trains; returns its end, after which nothing of it may live."""
    live.wait_for(r"^step +5/")
    live.wait_for_checkpoint()
    names = " ".join(live.processes().values())
    for expected in (
        "raylet",
        "gcs_server",
        "ReplayActor",
        "LearnerActor",
        "RolloutActor",
        *RAY_AGENTS,
    ):
        assert expected in names, f"the search for processes does not see {expected}: {names}"
    began_s = time.monotonic()
    blow()
    run = live.finish(timeout_s=within_s)
    print(
        f"the run ended {time.monotonic() - began_s:.1f} s after the blow: {run.summary['reason']}"
    )
    live.seconds_until_nothing_is_left(timeout_s=within_s - (time.monotonic() - began_s))
    return run


def check_end(run: Finished, *, exit_code: int, status: str) -> Path:
    """What every end has in common; returns the checkpoint."""
    summary = run.summary
    assert run.exit_code == exit_code, run.output
    assert summary["status"] == status
    assert "Traceback" not in run.output, run.output
    assert summary["steps"] == len(run.metrics) >= 5
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    assert summary["groups"]["evicted"] == 0
    assert (run.root / "timeline.json").exists()
    checkpoint = run.checkpoint
    check_checkpoint(checkpoint)
    return checkpoint
