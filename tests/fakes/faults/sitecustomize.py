"""Faults inside the processes of a real run.

Python runs this file at the start of each process that has its folder on PYTHONPATH. A file NAME in
the folder that `DAPO_ASYNC_FAULTS` names asks for a fault: the next process that comes to the place
of NAME removes the file and has the fault, once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "DAPO_ASYNC_FAULTS"
RUNTIME, ROLLOUT = "dapo_async.runtime", "dapo_async.rollout"


class Injected(RuntimeError):
    pass


def fails(call: Callable[[], Any], *_: Any) -> Any:
    raise Injected("a fault of the test")


def lacks_memory(call: Callable[[], Any], *_: Any) -> Any:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def has_nan(call: Callable[[], Any], *_: Any) -> Any:
    """The logprobs of the groups for training that have finished in this decode step; if there are
    none, the next step has the fault."""
    finished = call()
    of_training = [completions for group_id, completions in finished if group_id >= 0]
    for completions in of_training:
        for completion in completions:
            completion.behaviour_logprobs[:] = float("nan")
    if not of_training:
        (Path(os.environ[FOLDER]) / "nan").touch()
    return finished


def keeps_weights(call: Callable[[], Any], engine: Any, arguments: dict[str, Any]) -> Any:
    """The engine goes on with its old weights under the new version."""
    old = {name: tensor.clone() for name, tensor in engine.weights().items()}
    return engine.update_weights.__wrapped__(engine, old, **arguments)


# By name: module, class, method, and what happens instead of a call.
PLACES: dict[str, tuple[str, str, str, Callable[..., Any]]] = {
    "learner": ("dapo_async.learner.rank", "LearnerRank", "_loss", fails),
    "memory": ("dapo_async.learner.rank", "LearnerRank", "_loss", lacks_memory),
    "worker": (f"{ROLLOUT}.worker", "RolloutWorker", "_roll", fails),
    "engine": (f"{ROLLOUT}.native.engine", "TorchEngine", "step", fails),
    "nan": (f"{ROLLOUT}.native.engine", "TorchEngine", "step", has_nan),
    "version": (f"{ROLLOUT}.native.engine", "TorchEngine", "update_weights", keeps_weights),
    "replay": (f"{RUNTIME}.actors.replay", "ReplayActor", "take", fails),
    "evaluator": (f"{RUNTIME}.actors.evaluator", "EvaluatorActor", "evaluate", fails),
    "driver": ("dapo_async.weights.publisher", "Publisher", "start", fails),
}

# Faults of a rollout worker's engine, which an evaluator has too.
IN_WORKERS = ("nan", "version")


def is_asked(name: str) -> bool:
    if name in IN_WORKERS and f"{RUNTIME}.actors.rollout" not in sys.modules:
        return False
    try:
        (Path(os.environ[FOLDER]) / name).unlink()
    except FileNotFoundError:
        return False
    return True


def with_fault(name: str, method: Callable[..., Any], fault: Callable[..., Any]) -> Any:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def waits(self: Any, *args: Any, **kwargs: Any) -> Any:
            return fault(lambda: None) if is_asked(name) else await method(self, *args, **kwargs)

        return waits

    @functools.wraps(method)
    def calls(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_asked(name):
            return method(self, *args, **kwargs)
        return fault(lambda: method(self, *args, **kwargs), self, kwargs)

    return calls


class Finder(importlib.abc.MetaPathFinder):
    """Puts the faults of a module in as soon as it is imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        here = {name: place for name, place in PLACES.items() if place[0] == fullname}
        if not here:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_with_faults(module: Any) -> None:
            execute(module)
            for name, (_, kind, method, fault) in here.items():
                owner = getattr(module, kind)
                setattr(owner, method, with_fault(name, getattr(owner, method), fault))

        setattr(spec.loader, "exec_module", execute_with_faults)  # noqa: B010 (mypy refuses it)
        return spec


if FOLDER in os.environ:
    sys.meta_path.insert(0, Finder())
