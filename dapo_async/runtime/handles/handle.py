"""Calls to actors: each has a deadline that names who waited for whom, and a dead actor is named as what it was."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError


class ActorDied(RuntimeError):
    """A part of the run is gone: `actor`; the message names it too."""

    def __init__(self, actor: str, message: str) -> None:
        super().__init__(f"{actor} {message}")
        self.actor = actor


class ActorFailed(RuntimeError):
    """A part of the run raised; the message names it and has the original error, which is the cause."""


class Remote:
    """One actor by its name in the run. `await remote.call("method", …, deadline_s=…)` is the only way to it."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name, self.handle = name, handle

    async def call(self, method: str, *args: Any, deadline_s: float | None, **kwargs: Any) -> Any:
        """The method's result. `deadline_s=None` is for watching an actor, whose every outcome is an end.

        Raises TimeoutError, ActorDied or ActorFailed, each naming the actor and the method.
        """
        try:
            async with asyncio.timeout(deadline_s):
                return await getattr(self.handle, method).remote(*args, **kwargs)
        except TimeoutError as error:
            if isinstance(error, RayTaskError):
                raise TimeoutError(str(_original(error))) from error
            raise TimeoutError(
                f"the driver waited {deadline_s:g} s for {self.name} to finish {method}"
            ) from error
        except RayActorError as error:
            raise ActorDied(
                self.name, f"died while the driver waited for {method}: {_exit_detail(error)}"
            ) from error
        except RayTaskError as error:
            raise ActorFailed(f"{self.name} failed in {method}: {_original(error)!r}") from error

    def kill(self) -> None:
        ray.kill(self.handle)


def _original(error: RayTaskError) -> BaseException:
    """What was raised in the actor, out of its wrappers and of exception groups with one member."""
    cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause


def _exit_detail(error: RayActorError) -> str:
    """Ray's account of the death without its general advice: the exit type and detail, on one line."""
    told = " ".join(str(error).split())
    detail = told.partition("Worker exit type:")[2] or told
    return detail.partition("Some common causes")[0].strip() or "no reason given"
