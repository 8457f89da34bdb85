"""A number of slots that changes: order, shrinking, growth and cancelled requests."""

from __future__ import annotations

import asyncio

import pytest

from dapo_async.rollout.sglang.slot_gate import SlotGate


class Requests:
    """Each request takes a slot until the test ends it."""

    def __init__(self, num_slots: int) -> None:
        self.gate, self.inside = SlotGate(num_slots), list[int]()
        self._ends: dict[int, asyncio.Event] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def start(self, *names: int) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._run(name))
        await settled()

    async def _run(self, name: int) -> None:
        async with self.gate:
            self.inside.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.inside.remove(name)

    async def end(self, name: int) -> None:
        self._ends[name].set()
        await settled()

    def cancel(self, name: int) -> None:
        self._tasks[name].cancel()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_requests_enter_in_order_as_slots_become_free() -> None:
    async def main() -> None:
        requests = Requests(2)
        await requests.start(0, 1, 2, 3)
        assert requests.inside == [0, 1]
        await requests.end(1)
        assert requests.inside == [0, 2]
        await requests.end(0)
        assert requests.inside == [2, 3]

    asyncio.run(main())


def test_more_slots_let_waiting_requests_in_at_once() -> None:
    async def main() -> None:
        requests = Requests(1)
        await requests.start(0, 1, 2, 3)
        requests.gate.resize(3)
        await settled()
        assert requests.inside == [0, 1, 2]

    asyncio.run(main())


def test_fewer_slots_take_effect_as_requests_leave() -> None:
    async def main() -> None:
        requests = Requests(3)
        await requests.start(0, 1, 2, 3, 4)
        requests.gate.resize(1)
        for name, inside in ((0, [1, 2]), (1, [2]), (2, [3]), (3, [4]), (4, [])):
            await requests.end(name)
            assert requests.inside == inside

    asyncio.run(main())


@pytest.mark.parametrize("together", [False, True])
def test_a_cancelled_request_keeps_no_slot(together: bool) -> None:
    """Also if its slot comes together with the cancellation."""

    async def main() -> None:
        requests = Requests(1)
        await requests.start(0, 1, 2)
        if together:
            requests.gate.resize(2)  # request 1 may enter, but has not run yet
        requests.cancel(1)
        await settled()
        assert requests.inside == ([0, 2] if together else [0])
        await requests.end(0)
        await requests.end(2)
        await requests.start(3)
        assert requests.inside == [3]

    asyncio.run(main())
