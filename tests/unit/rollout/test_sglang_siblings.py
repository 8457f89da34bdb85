"""An SGLang engine reports each sibling that ends, whatever becomes of its group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import numpy as np
import pytest

from dapo_async.rollout import EngineFault, GroupRequest, SamplingParams
from dapo_async.rollout.sglang.client import Chunk, SGLangClient
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.types import Completion, FinishReason
from dapo_async.utils.state_clock import StateClock

SAMPLING = SamplingParams(max_tokens=1, temperature=1.0, stop_token_ids=(), seed=0)
DONE = Completion(
    np.array([7], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), 0, FinishReason.STOP
)
SPANS = ({"version": "run:0", "start": 0, "end": 1},)


class FakeServer:
    """Ends a response when the test says so."""

    url = "http://server"

    def __init__(self) -> None:
        self.responses: list[asyncio.Future[None]] = []

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        end = asyncio.get_running_loop().create_future()
        self.responses.append(end)
        await end
        yield Chunk([7], [0.0], {"type": "length"}, SPANS, "run:0")


def engine_of(server: FakeServer, *, num_slots: int) -> SGLangEngine:
    return SGLangEngine(
        cast(SGLangClient, server),
        StateClock("engine"),
        num_slots=num_slots,
        weight_update="recompute",
        incarnation="run",
    )


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_ends_are_reported_one_by_one_and_siblings_start_in_order() -> None:
    async def main() -> None:
        server, ends = FakeServer(), [[], []]  # type: tuple[FakeServer, list[list[int]]]
        engine = engine_of(server, num_slots=2)
        prompt = np.array([1, 2], np.int32)
        partial = (None, DONE, None)
        groups = [
            asyncio.create_task(
                engine.generate(GroupRequest(0, prompt, 3, SAMPLING, partial), ends[0].append)
            ),
            asyncio.create_task(
                engine.generate(GroupRequest(1, prompt, 2, SAMPLING), ends[1].append)
            ),
        ]
        await settled()
        assert ends == [[1], []], "a sibling that another engine finished ends at once"
        assert len(server.responses) == 2
        server.responses[1].set_result(None)
        await settled()
        assert (ends, len(server.responses)) == ([[1, 1], []], 3)
        for response in server.responses:
            if not response.done():
                response.set_result(None)
        await settled()
        assert (ends, len(server.responses)) == ([[1, 1, 1], [1]], 4)
        server.responses[3].set_result(None)
        answers = await asyncio.gather(*groups)
        assert [len(completions) for completions in answers] == [3, 2]
        assert ends == [[1, 1, 1], [1, 1]]

    asyncio.run(main())


def test_siblings_that_fail_with_their_server_are_not_reported() -> None:
    async def main() -> None:
        server, ends = FakeServer(), list[int]()
        engine = engine_of(server, num_slots=3)
        request = GroupRequest(0, np.array([1, 2], np.int32), 3, SAMPLING)
        group = asyncio.create_task(engine.generate(request, ends.append))
        await settled()
        server.responses[2].set_result(None)
        await settled()
        server.responses[0].set_exception(EngineFault("connection lost"))
        with pytest.raises(EngineFault, match="connection lost") as fault:
            await group
        assert ends == [1]
        assert fault.value.partial_completions[:2] == (None, None)
        assert fault.value.partial_completions[2] is not None
        counts = engine.tokens.counts
        assert (counts.generated, counts.prefilled, counts.in_flight) == (1, 2, 1), counts

    asyncio.run(main())
