"""An SGLang server that hangs, in a whole run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from run_support import TINY, running
from sglang_run_support import SERVERS, hang, replaced, server_of

pytestmark = pytest.mark.sglang


def test_server_that_hangs_is_replaced_and_goes_with_a_killed_driver(tmp_path: Path) -> None:
    steps = (
        "train.num_steps=5000",
        "train.checkpoint_every_steps=500",
        "weights.transport=disk",
        "deadlines.answer_s=6",
    )
    with running(tmp_path / "run", *TINY, *SERVERS, *steps) as live:
        live.wait_for(r"^step +4/")
        session = replaced(live, "rollout-0", hang)
        os.kill(
            server_of(live.root, "rollout-0").pid, signal.SIGKILL
        )  # once more: the limit of restarts is not reached
        live.wait_for(r"restarting it in 1 s \(2 of 3\)$", timeout_s=60.0)
        os.kill(live.driver, signal.SIGKILL)
        assert not psutil.wait_procs(session, timeout=5.0)[1]
        live.seconds_until_nothing_is_left(timeout_s=30.0)
