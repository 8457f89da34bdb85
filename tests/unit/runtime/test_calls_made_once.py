"""Calls that come twice over a broken connection: the actor makes them once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray

from dapo_async.runtime.actors.once import CALLS, CallId, CallIds, answers_once


@answers_once
class Learner:
    def __init__(self) -> None:
        self.minibatches: list[int] = []
        self.may_end = asyncio.Event()

    async def minibatch(self, number: int) -> int:
        """Trains."""
        await self.may_end.wait()
        if number < 0:
            raise ValueError(number)
        self.minibatches.append(number)
        return number + len(self.minibatches)


class Sleeping(Learner):
    """As the actors of benchmarks: with methods of its base class."""


def kept(learner: Learner) -> list[int]:
    (calls,) = vars(learner)[CALLS]._calls.values()
    return sorted(calls)


def play(scene: Callable[[Any], Coroutine[Any, Any, None]], kind: type[Learner] = Learner) -> None:
    async def act() -> None:
        await scene(kind())

    asyncio.run(act())


@pytest.mark.parametrize("kind", [Learner, Sleeping])
def test_a_call_that_comes_again_gets_the_answer_of_the_first(kind: type[Learner]) -> None:
    async def scene(learner: Any) -> None:
        ids = CallIds()
        with ids.of_a_call() as call_id:
            lost = asyncio.create_task(learner.minibatch(7, call_id=call_id))
            await asyncio.sleep(0)
            again = asyncio.create_task(learner.minibatch(7, call_id=call_id))  # still under way
            await asyncio.sleep(0)
            lost.cancel()
            learner.may_end.set()
            assert await again == 8
            assert await learner.minibatch(7, call_id=call_id) == 8  # ended
        assert learner.minibatches == [7]
        with ids.of_a_call() as call_id:
            assert await learner.minibatch(7, call_id=call_id) == 9, "a call of its own"
        assert await learner.minibatch(7) == 10, "without a number nothing is compared"
        assert learner.minibatches == [7, 7, 7]

    play(scene, kind)


def test_an_error_is_the_answer_too() -> None:
    async def scene(learner: Any) -> None:
        learner.may_end.set()
        call_id = CallId("driver", 0, (0,))
        for _ in range(2):
            with pytest.raises(ValueError, match="-1"):
                await learner.minibatch(-1, call_id=call_id)

    play(scene)


def test_answers_are_kept_until_the_caller_has_them() -> None:
    async def scene(learner: Any) -> None:
        ids = CallIds()
        learner.may_end.set()
        with ids.of_a_call() as long:
            await learner.minibatch(0, call_id=long)
            for number in (1, 2, 3):
                with ids.of_a_call() as call_id:
                    await learner.minibatch(number, call_id=call_id)
            assert kept(learner) == [0, 3], "the answer to 0 may be lost"
        with ids.of_a_call() as call_id:
            await learner.minibatch(4, call_id=call_id)
        assert kept(learner) == [4]
        with CallIds().of_a_call() as other:
            assert other.caller != call_id.caller

    play(scene)


def test_ray_sees_the_arguments_of_the_method_and_the_number() -> None:
    assert [*inspect.signature(Learner.minibatch).parameters] == ["self", "number", "call_id"]
    ray_class: Any = ray.remote(Learner)
    found = ray_class.__ray_metadata__.method_meta.signatures["minibatch"]
    assert [parameter.name for parameter in found][:2] == ["number", "call_id"]
    assert Learner.minibatch.__doc__ == "Trains."
    assert inspect.iscoroutinefunction(Learner.minibatch)
