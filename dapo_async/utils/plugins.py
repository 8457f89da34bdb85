"""The user's own functions, named `module:function` in the config.

A name comes in, a checked function leaves. Verifiers and filters are loaded with it at the start.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def is_custom(name: str) -> bool:
    """Whether `name` has the form `module:function`."""
    return ":" in name


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` has a parameter with this name."""
    return name in inspect.signature(function).parameters


def load_function(
    name: str, *, knob: str, parameters: Sequence[str], optional: Sequence[str] = ()
) -> Callable[..., Any]:
    """Imports the function `name`, which must take `parameters` by position.

    It may also have parameters named in `optional`, which are passed as keywords.

    The module must be importable in every process of the run: installed, or in a folder of
    PYTHONPATH. Raises ValueError, in one line that names `knob`, when the name can't be imported,
    is no plain function, or takes other parameters.
    """
    path, _, function_name = name.partition(":")
    wanted = f"{knob} ({name!r}) must be module:function, a function({', '.join(parameters)})"
    if not path or not function_name:
        raise ValueError(
            f"{wanted}; write for example my_package.rewards:{function_name or 'judge'}"
        )
    try:
        function: Any = importlib.import_module(path)
        for part in function_name.split("."):
            function = getattr(function, part)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{wanted}: {why}; install the module or put its folder on PYTHONPATH"
        ) from error
    if not callable(function) or inspect.isclass(function):
        kind = "class" if inspect.isclass(function) else type(function).__name__
        raise ValueError(f"{wanted}, but it is a {kind}; name a function")
    if inspect.iscoroutinefunction(function):
        raise ValueError(
            f"{wanted}, but it is asynchronous; write a plain function, which is called in a thread"
        )
    keywords = {each: each for each in optional if has_parameter(function, each)}
    try:
        inspect.signature(function).bind(*parameters, **keywords)
    except TypeError as error:
        raise ValueError(
            f"{wanted}, but its parameters are {inspect.signature(function)} ({error}); change them"
        ) from error
    checked: Callable[..., Any] = function
    return checked
