"""The actors of a run together: an evaluation while a worker is being replaced."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from fake_actors import fake_actor
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.handles.actors import ReplayHandle, WorkerHandle
from dapo_async.runtime.launch import Actors
from dapo_async.runtime.system import System


def test_worker_that_is_being_replaced_evaluates_its_share_when_it_is_back() -> None:
    config = knobs.load(QUICKSTART, ["rollout.num_workers=2"])
    asked: list[str] = []

    def worker(number: int) -> WorkerHandle:
        async def evaluate(part: int, num_parts: int) -> Evaluation:
            asked.append(f"{part} of {num_parts}")
            return Evaluation(1, 1.0, 3, 0, frozenset({4}))

        return WorkerHandle(f"rollout-{number}", fake_actor(evaluate=evaluate), config.deadlines)

    actors = Actors(
        replay=ReplayHandle("replay", None, config.deadlines),
        ranks=[],
        workers=[worker(0), worker(1)],
        evaluator=None,
        start_replay=cast(Any, None),
        start_rank=cast(Any, None),
        start_worker=cast(Any, None),
        start_evaluator=cast(Any, None),
        without_room=tuple,
    )

    async def evaluate_while_the_second_starts() -> Evaluation:
        system = System(config, actors, say=lambda line: None)
        is_back = system.supervisor._is_back["rollout-1"] = asyncio.Event()
        evaluating = asyncio.create_task(system.evaluate())
        await asyncio.sleep(0.01)
        assert asked == ["0 of 2"], "the new process is not ready"
        is_back.set()
        return await evaluating

    evaluation = asyncio.run(evaluate_while_the_second_starts())
    assert asked == ["0 of 2", "1 of 2"]
    assert evaluation.num_prompts == 2
