"""Typed handles: what a call sends, which deadline it has, and what its errors say."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_actors import fake_actor
from paths import QUICKSTART
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from dapo_async import config as knobs
from dapo_async.runtime.actors.evaluator import EvaluatorActor
from dapo_async.runtime.actors.learner import LearnerActor
from dapo_async.runtime.actors.replay import ReplayActor
from dapo_async.runtime.actors.rollout import ReplayClient, RolloutActor
from dapo_async.runtime.handles import handle
from dapo_async.runtime.handles.actors import (
    EvaluatorHandle,
    LearnerHandle,
    ReplayHandle,
    WorkerHandle,
)
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed

DEADLINES = knobs.load(QUICKSTART, ["deadlines.work_s=0.1"]).deadlines


async def hang(*_: Any, **__: Any) -> None:
    await asyncio.Event().wait()


def raising(error: Exception) -> Any:
    async def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def task_error(cause: Exception) -> Exception:
    """As Ray raises what an actor's method raised."""
    ray_error: Any = RayTaskError  # untyped
    error: Exception = ray_error("method", "traceback", cause).as_instanceof_cause()
    return error


def test_a_call_passes_its_arguments_and_returns_the_actors_result() -> None:
    async def evaluate(*args: Any) -> Any:
        return args

    worker = WorkerHandle("rollout-0", fake_actor(evaluate=evaluate), DEADLINES)
    result: Any = asyncio.run(worker.evaluate(1, 2))
    assert result == (1, 2)


def test_a_passed_deadline_names_caller_actor_and_method() -> None:
    learner = LearnerHandle("learner-1", fake_actor(version=hang), DEADLINES)
    line = "the driver waited 0.1 s for learner-1 to finish version"
    with pytest.raises(TimeoutError, match=f"^{line}$"):
        asyncio.run(learner.version())


def test_within_replaces_the_deadline_of_a_copy_only() -> None:
    worker = WorkerHandle("rollout-0", fake_actor(report=hang), DEADLINES)
    line = r"^the driver waited 0.05 s for rollout-0 to finish report$"
    with pytest.raises(TimeoutError, match=line):
        asyncio.run(worker.within(0.05).report())
    assert worker._limit_s is None


def test_worker_that_gets_no_answer_waits_for_the_next_replay_actor() -> None:
    soon = replace(DEADLINES, start_s=0.05)
    replay = ReplayClient("replay", fake_actor(exchange=hang), soon, caller="rollout-0")
    line = r"^replay died or did not answer, and rollout-0 waited 0.05 s \(deadlines.start_s\) for"
    with pytest.raises(ActorDied, match=line):
        asyncio.run(replay.within(0.05).exchange("rollout-0", [], num_free=1, num_open=0))


def test_a_deadline_that_the_actor_noticed_is_reported_in_its_words() -> None:
    error = task_error(TimeoutError("take waited 0.1 s: 3 groups are missing"))
    replay = ReplayHandle("replay", fake_actor(take=raising(error)), DEADLINES)
    with pytest.raises(TimeoutError, match=r"^take waited 0.1 s: 3 groups are missing$"):
        asyncio.run(replay.take(3))


def test_an_error_in_an_actor_names_actor_method_and_innermost_error() -> None:
    error = task_error(ExceptionGroup("groups", [ValueError("wrong")]))
    worker = WorkerHandle("rollout-0", fake_actor(run=raising(error)), DEADLINES)
    with pytest.raises(ActorFailed, match=r"^rollout-0 failed in run: ValueError\('wrong'\)$"):
        asyncio.run(worker.watch())


def test_a_dead_actor_is_named_and_its_error_can_be_pickled() -> None:
    worker = WorkerHandle("rollout-0", fake_actor(run=raising(RayActorError())), DEADLINES)
    with pytest.raises(ActorDied) as caught:
        asyncio.run(worker.watch())
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.actor, str(copy)) == ("rollout-0", str(caught.value))
    assert str(copy).startswith("rollout-0 died while the driver waited for run: ")


def test_a_connection_that_breaks_for_a_moment_is_no_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handle, "PAUSE_S", 0.01)
    monkeypatch.setattr(handle, "BREAK_S", 0.2)
    calls: list[str] = []

    def breaking(times: float) -> Any:
        async def call() -> str:
            calls.append("call")
            if len(calls) <= times:
                raise ActorUnavailableError("Socket closed", b"0" * 16)
            return "line"

        return call

    learner = LearnerHandle("learner", fake_actor(ping=breaking(3)), DEADLINES)
    assert asyncio.run(learner.ping()) == "line"
    assert len(calls) == 4
    calls.clear()
    lasting = LearnerHandle("learner", fake_actor(ping=breaking(10_000)), DEADLINES)
    with pytest.raises(ActorDied, match="learner died while the driver waited for ping"):
        asyncio.run(lasting.ping())
    # The process that takes its place, and may still wait for a node, does not get the call.
    replaced = LearnerHandle("learner", fake_actor(), DEADLINES)

    async def dies() -> None:
        replaced.replace(fake_actor(ping=hang))
        raise ActorUnavailableError("Socket closed", b"0" * 16)

    replaced.replace(fake_actor(ping=dies))
    with pytest.raises(ActorDied, match="learner was replaced while the driver waited for ping"):
        asyncio.run(replaced.ping())


HANDLES = (
    (ReplayHandle, ReplayActor),
    (LearnerHandle, LearnerActor),
    (WorkerHandle, RolloutActor),
    (EvaluatorHandle, EvaluatorActor),
    (ReplayClient, ReplayActor),
)
CALLS = [
    (handle_class, actor_class, name)
    for handle_class, actor_class in HANDLES
    for name, value in vars(handle_class).items()
    if getattr(value, "__qualname__", "").startswith("remote.")
]


class Breaking:
    """Ray's handle of an actor whose answer to the first call is lost with the connection."""

    def __init__(self, methods: type) -> None:
        self._methods = methods
        self.sent: list[tuple[str, Any]] = []  # each call with its id

    def __getattr__(self, name: str) -> Any:
        async def remote(call_id: Any = None) -> str:
            self.sent.append((name, call_id))
            if len(self.sent) == 1:
                raise ActorUnavailableError("Socket closed", b"0" * 16)
            return "answer"

        assert hasattr(self._methods, name)
        return SimpleNamespace(remote=remote)


@pytest.mark.parametrize(
    ("handle_class", "actor_class", "name"),
    CALLS,
    ids=[f"{of.__name__}-{name}" for of, _, name in CALLS],
)
def test_every_call_outlasts_a_broken_connection(
    monkeypatch: pytest.MonkeyPatch, handle_class: Any, actor_class: type, name: str
) -> None:
    monkeypatch.setattr(handle, "PAUSE_S", 0.001)
    actor = Breaking(actor_class)
    assert asyncio.run(getattr(handle_class("one", actor, DEADLINES), name)()) == "answer"
    (method, first), again = actor.sent
    assert again == (method, first), "the actor sees that it is the same call"
    if first is not None:
        assert "call_id" in inspect.signature(getattr(actor_class, method)).parameters


def test_calls_that_change_an_actor_are_made_once() -> None:
    actor = Breaking(LearnerActor)
    actor.sent.append(("none is lost", None))
    learner = LearnerHandle("learner", actor, DEADLINES)

    async def two() -> None:
        await learner.minibatch()  # type: ignore[call-arg]
        await learner.minibatch()  # type: ignore[call-arg]

    asyncio.run(two())
    (_, first), (_, second) = actor.sent[1:]
    assert first is not None
    assert first.caller == second.caller
    assert (first.number, second.number) == (0, 1)
    assert second.unanswered == (1,)


def test_a_reason_of_ray_has_no_colours() -> None:
    worker = WorkerHandle("rollout-0", fake_actor(run=raising(Coloured())), DEADLINES)
    with pytest.raises(ActorDied) as error:
        asyncio.run(worker.watch())
    assert "raised in ray::Replay (pid=1)" in str(error.value)


class Coloured(RayActorError):
    def __str__(self) -> str:
        return "raised in \x1b[36mray::Replay\x1b[39m (pid=1)"
