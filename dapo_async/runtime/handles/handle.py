"""Typed calls to Ray actors, each with a deadline.

A handle class lists the methods of one actor class, and the deadline of each:

    class ReplayHandle(Handle[ReplayActor]):
        take = remote(ReplayActor.take, lambda deadlines: deadlines.work_s)

`await replay.take(3)` then has the argument types and the result type of `ReplayActor.take`.
Each call raises TimeoutError, ActorDied or ActorFailed; the message names actor and method.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
)

from dapo_async.config import DeadlinesConfig
from dapo_async.runtime.actors.once import CallIds
from dapo_async.types import MemoryShort, StateUnusable

ActorClass = TypeVar("ActorClass")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Deadline = Callable[[DeadlinesConfig], float | None]  # seconds; None: wait without limit
BREAK_S = 20.0  # a connection that is broken for longer is a death
PAUSE_S = 0.5  # between two calls over a broken connection
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ActorDied(RuntimeError):
    """The process of `actor` is gone."""

    def __init__(self, actor: str, message: str) -> None:
        super().__init__(actor, message)  # as given, so that the error can be pickled
        self.actor = actor

    def __str__(self) -> str:
        return " ".join(self.args)


class ActorFailed(RuntimeError):
    """An actor raised; the message names the actor, the method and the original error."""


class ActorSilent(TimeoutError):
    """An actor does not even answer a ping: it hangs, or its node can't be reached."""


class ObjectsLost(ActorFailed):
    """Objects that the actor needed were lost with the process that had made them."""


class RankMemoryShort(ActorFailed):
    """See `MemoryShort`."""


class RankStateUnusable(ActorFailed):
    """See `StateUnusable`."""


class Handle(Generic[ActorClass]):
    """One actor of a run by its name. Subclasses list its methods with `remote`."""

    def __init__(
        self, name: str, actor: Any, deadlines: DeadlinesConfig, *, caller: str = "the driver"
    ) -> None:
        """`actor`: Ray's handle. `caller`: who waits, as the messages name it."""
        self.name = name
        # Both are shared with the handles that `within` makes.
        self._process, self._call_ids = [actor], CallIds()
        self._deadlines, self._caller = deadlines, caller
        self._limit_s: float | None = None

    @property
    def actor(self) -> Any:
        """Ray's handle."""
        return self._process[0]

    def within(self, limit_s: float) -> Self:
        """The same actor with `limit_s` as the deadline of every call."""
        handle = copy.copy(self)
        handle._limit_s = limit_s
        return handle

    def kill(self) -> None:
        ray.kill(self.actor)

    def replace(self, actor: Any) -> None:
        """From now on the calls go to `actor`, which does the work of the one before."""
        self._process[0] = actor

    async def _call(
        self,
        method: str,
        deadline: Deadline,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        repeatable: bool,
    ) -> Any:
        limit_s = self._limit_s if self._limit_s is not None else deadline(self._deadlines)
        try:
            async with asyncio.timeout(limit_s):
                if repeatable:
                    return await self._unbroken(method, args, kwargs)
                with self._call_ids.of_a_call() as call_id:
                    return await self._unbroken(method, args, {**kwargs, "call_id": call_id})
        except TimeoutError as error:
            if isinstance(error, RayTaskError):  # the actor itself gave up waiting
                raise TimeoutError(str(_original(error))) from error
            raise TimeoutError(
                f"{self._caller} waited {limit_s:g} s for {self.name} to finish {method}"
            ) from error
        except RayActorError as error:
            raise ActorDied(
                self.name, f"died while {self._caller} waited for {method}: {_exit_detail(error)}"
            ) from error
        except ActorUnschedulableError as error:
            reason = " ".join(str(error).split())
            raise ActorDied(self.name, f"can't start: {reason}") from error
        except RayTaskError as error:
            original = _original(error)
            kinds = {
                ObjectLostError: ObjectsLost,
                MemoryShort: RankMemoryShort,
                StateUnusable: RankStateUnusable,
            }
            kind = next((kinds[each] for each in kinds if isinstance(original, each)), ActorFailed)
            raise kind(f"{self.name} failed in {method}: {original!r}") from error

    async def _unbroken(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Repeats the call while the connection is broken, for `BREAK_S` at most.

        Ray can't tell then whether the actor has got the call; with a `call_id` the actor can. A
        process that takes its place meanwhile does not get the call: that one may wait for a node,
        and knows nothing of it.
        """
        loop, actor = asyncio.get_running_loop(), self.actor
        broken_s: float | None = None
        while True:
            began_s = loop.time()
            try:
                return await getattr(actor, method).remote(*args, **kwargs)
            except ActorUnavailableError:
                if broken_s is None or loop.time() - began_s > BREAK_S:
                    broken_s = loop.time()  # it worked meanwhile
                if loop.time() - broken_s > BREAK_S:
                    raise
            await asyncio.sleep(PAUSE_S)
            if self.actor is not actor:
                raise ActorDied(self.name, f"was replaced while {self._caller} waited for {method}")


def remote(
    method: Callable[Concatenate[ActorClass, Arguments], Coroutine[Any, Any, Result]],
    deadline: Deadline,
    *,
    repeatable: bool = False,
) -> Callable[Concatenate[Handle[ActorClass], Arguments], Coroutine[Any, Any, Result]]:
    """A handle's method that calls `method` of the actor.

    When the connection breaks the call is made again. `repeatable`: a second call does no harm.
    Any other one is made once by the actor, whose class is decorated with `answers_once`.
    """
    name = method.__name__

    async def call(
        self: Handle[ActorClass], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        result: Result = await self._call(name, deadline, args, kwargs, repeatable=repeatable)
        return result

    return call


def _original(error: RayTaskError) -> BaseException:
    """What was raised in the actor, without wrappers and exception groups of one member."""
    cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause


def _exit_detail(error: RayActorError) -> str:
    """The exit type and detail that Ray reports, on one line, without its general advice.

    Ray colours the name of an actor whose start has failed, also where nobody sees colours.
    """
    text = " ".join(COLOUR.sub("", str(error)).split())
    detail = text.partition("Worker exit type:")[2] or text
    return detail.partition("Some common causes")[0].strip() or "no reason given"
