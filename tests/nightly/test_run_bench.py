"""`dapo-async bench` on a real Ray: the loop with either side replaced, and with both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from paths import QUICKSTART
from run_support import COMMAND, environment

pytestmark = pytest.mark.ray


def test_loop_is_measured_with_either_side_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["end-to-end", "--repeats", "2", "--warm-up", "0", "--json", str(out)]
    sizes = ["replay.groups_per_step=4", "replay.group_size=4", "ray.address=local"]
    done = subprocess.run(
        [COMMAND, "bench", str(QUICKSTART), *words, *sizes],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["complete"]
    for row, replaced in zip(result["rows"], ("learner", "rollout", "nothing"), strict=True):
        assert row["what"] == {"kind": "end-to-end", "replaced": replaced}
        figures = row["figures"]
        assert len(figures["step_s"]["values"]) == 2
        assert figures["groups_per_s"]["values"][0] == pytest.approx(
            4 / figures["step_s"]["values"][0]
        )
        assert {"idle_learner", "idle_rollout", "tokens_per_s", "publish_s"} <= figures.keys()
        assert ("decode_step_s" in figures) == (replaced != "rollout")
        assert ("train_token_s" in figures) == (replaced != "learner")
    assert "shared: {engine: " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
