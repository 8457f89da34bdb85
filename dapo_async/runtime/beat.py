"""The newest state of a run, for `dapo-async status` in another process or on another machine.

In: each row of metrics.jsonl, evaluations and the state of the engines. Out: one JSON object, in
`status.json` of the run directory and in the key-value store of the Ray cluster. The first is for
whoever can read the folder; the second is for whoever can reach the cluster only.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from dapo_async.config import Config
from dapo_async.runtime.cluster.run_board import post
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.run_status import STEPS_FOR_PACE
from dapo_async.utils.checkpoint_dir import CheckpointFolder


class Beat:
    """Keeps the newest facts and writes them. Nothing here raises or delays training."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        *,
        bottleneck: Callable[[], str | None],
        post: Callable[[str, str], None] = post,
    ) -> None:
        """`post` gets the run directory and the JSON text, in a thread."""
        self._run_dir, self._bottleneck, self._post = run_dir, bottleneck, post
        self._facts: dict[str, Any] = {
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "work_s": config.deadlines.work_s,
            "num_steps": config.train.num_steps,
            "max_staleness": config.replay.max_staleness,
            "state": "running",
            "reason": "",
            "row": {},
            "recent": [],
            "engines": {},
            "workers": {},
            "evaluation": {},
            "checkpoint": None,
        }
        self._recent: deque[dict[str, float]] = deque(maxlen=STEPS_FOR_PACE)
        self._posting: asyncio.Task[None] | None = None

    def step(
        self,
        row: Mapping[str, Any],
        engines: Mapping[str, Mapping[str, float]],
        *,
        workers: Mapping[str, Any],
    ) -> None:
        """A row of metrics.jsonl, `Tracker.by_engine`, and `Fleet.facts`."""
        self._recent.append({"step_s": row["step_s"], "tokens": row.get("tokens", 0.0)})
        self._write(row=dict(row), recent=[*self._recent], engines=engines, workers=workers)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A row of evaluations.jsonl."""
        self._write(evaluation=dict(row))

    def start(self) -> None:
        """The run has begun: every process that looks for it finds it from now on."""
        self._write()

    async def end(self, state: str, reason: str) -> None:
        """`state` is one of `RunState`."""
        await self._posted()
        self._write(state=state, reason=reason)
        await self._posted()

    async def _posted(self) -> None:
        if self._posting is not None:
            await self._posting

    def _write(self, **facts: Any) -> None:
        saved = CheckpointFolder(self._run_dir.checkpoints).newest
        self._facts |= facts
        self._facts |= {
            "time_s": time.time(),
            "bottleneck": self._bottleneck(),
            "checkpoint": self._run_dir.relative(saved) if saved else None,
        }
        root = str(self._run_dir.root)
        with suppress(OSError):  # such as a full disk: the metrics of this step say so
            self._run_dir.write_status(json.dumps(self._facts))  # it names no folder: that may move
        text = json.dumps({"root": root, **self._facts})
        if self._posting is None or self._posting.done():  # else the next one has newer facts
            self._posting = asyncio.create_task(asyncio.to_thread(self._post, root, text))
