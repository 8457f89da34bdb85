"""What the driver of a run posts: the newest state, in a file and for the cluster."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tracking_world import config_with, step_row

from dapo_async.runtime.beat import Beat
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.run_status import RunState, status_of_post


def test_newest_state_is_in_the_file_and_posted_to_the_cluster(tmp_path: Path) -> None:
    posts: list[tuple[str, str]] = []

    def post(root: str, text: str) -> None:
        posts.append((root, text))

    async def scene() -> None:
        run_dir = RunDir.create(tmp_path / "run")
        beat = Beat(
            config_with(sinks="none", num_steps=9), run_dir, bottleneck=lambda: "none", post=post
        )
        beat.start()
        for step in range(12):
            beat.step(
                step_row(step), {"rollout-0": {"version": float(step)}}, workers={"wanted": 1}
            )
        beat.evaluation({"version": 3, "accuracy": 0.5})
        facts = json.loads(run_dir.status.read_text())
        assert facts["row"]["version"] == 12
        assert len(facts["recent"]) == 10
        assert facts["engines"] == {"rollout-0": {"version": 11.0}}
        assert facts["evaluation"]["accuracy"] == 0.5
        assert str(tmp_path) not in run_dir.status.read_text(), "the folder may be moved"
        await beat.end("done", "all steps trained")

    asyncio.run(scene())
    root, text = posts[-1]
    assert root == str(tmp_path / "run")
    status = status_of_post(json.loads(text))
    assert (status.state, status.root) == (RunState.DONE, tmp_path / "run")
    assert len(posts) <= 3, "a post that is under way is not repeated for each step"
