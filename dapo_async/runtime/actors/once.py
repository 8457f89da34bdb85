"""Calls that are made again over a broken connection, and that the actor makes once.

When a connection breaks, Ray can't tell whether the actor has got a call. So `Handle` sends it
again, with the same `CallId`: the actor then makes the call, or gives the answer of the first one,
which may still be under way. Both last as long as the process.

    @answers_once
    class ReplayActor: …
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import secrets
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple, TypeVar

ActorClass = TypeVar("ActorClass")
CALLS = "_calls_made_once"  # attribute of an actor: `CallsMadeOnce`


class CallId(NamedTuple):
    """Tells a call of one caller from all others."""

    caller: str
    number: int
    # Of the caller's calls that are not answered yet, this one included: only these may come again.
    unanswered: tuple[int, ...]


class CallIds:
    """A caller's side."""

    def __init__(self) -> None:
        self._caller, self._numbers = secrets.token_hex(8), count()
        self._unanswered: set[int] = set()

    @contextmanager
    def of_a_call(self) -> Iterator[CallId]:
        """In the body the call is made, as often as needed."""
        number = next(self._numbers)
        self._unanswered.add(number)
        try:
            yield CallId(self._caller, number, tuple(self._unanswered))
        finally:
            self._unanswered.discard(number)


class CallsMadeOnce:
    """An actor's side: the calls that may come again, by caller and number."""

    def __init__(self) -> None:
        self._calls: dict[str, dict[int, asyncio.Task[Any]]] = {}

    async def answer(self, call_id: CallId, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The answer to the call, which is made once, however often it is asked for. Forgets the
        calls whose answers the caller has."""
        calls = self._calls.setdefault(call_id.caller, {})
        for number in [each for each, call in calls.items() if call.done()]:
            if number not in call_id.unanswered:
                del calls[number]
        if call_id.number not in calls:
            calls[call_id.number] = asyncio.create_task(make())
        # If one that waits for the answer is cancelled, another one may come.
        return await asyncio.shield(calls[call_id.number])


def answers_once(actor: type[ActorClass]) -> type[ActorClass]:
    """Every public method of the actor takes a `call_id`, too."""
    for name, method in [*vars(actor).items()]:
        if inspect.iscoroutinefunction(method) and not name.startswith("_"):
            setattr(actor, name, _once(method))
    return actor


def _once(method: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
    @functools.wraps(method)
    async def call(self: Any, *args: Any, call_id: CallId | None = None, **kwargs: Any) -> Any:
        if call_id is None:
            return await method(self, *args, **kwargs)
        made: CallsMadeOnce = vars(self).setdefault(CALLS, CallsMadeOnce())
        return await made.answer(call_id, lambda: method(self, *args, **kwargs))

    # Ray checks the arguments of a call by the signature of the innermost function.
    del vars(call)["__wrapped__"]
    known = inspect.signature(method)
    parameters = [*known.parameters.values()]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("call_id", kind, default=None))
    call.__signature__ = known.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call
