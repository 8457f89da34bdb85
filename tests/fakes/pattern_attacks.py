"""Texts that are slow for a regular expression with nested or adjacent repetitions.

`attacks` reads the structure of a pattern: before each repetition it writes a match, then it
repeats what the repetition repeats.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import re
from collections.abc import Iterator
from re import _parser as parser  # type: ignore[attr-defined]
from types import ModuleType
from typing import Any

CATEGORIES = {"DIGIT": "7", "SPACE": " ", "WORD": "a", "NOT_SPACE": "a", "NOT_DIGIT": "a"}
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
LONG = 20  # repetitions that may be longer are attacked


def patterns(package: ModuleType) -> dict[str, re.Pattern[str]]:
    """All compiled patterns in the modules of a package, by name, also those within collections."""
    found: dict[str, re.Pattern[str]] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, re.Pattern):
            found.setdefault(name, value)
        elif isinstance(value, tuple | list):
            for number, each in enumerate(value):
                visit(f"{name}[{number}]", each)

    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, value in vars(importlib.import_module(info.name)).items():
            visit(f"{info.name.rpartition('.')[2]}.{name}", value)
    return found


def attacks(pattern: re.Pattern[str], *, rounds: int = 4) -> list[tuple[str, str]]:
    """(prefix, part to repeat) of each long repetition in a pattern, the same in every call."""
    rng, tree = random.Random(0), parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE)
    found = {
        pair
        for _ in range(rounds)
        for before, body in _repetitions(tree, "", rng)
        if body
        for pair in ((before, body), ("", before + body))
    }
    return sorted(found)


def _repetitions(tree: Any, prefix: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    for operation, value in tree:
        name = str(operation)
        if name in REPEATS:
            if int(value[1]) > LONG:
                yield prefix, _example(value[2], rng)
            yield from _repetitions(value[2], prefix, rng)
        elif name == "SUBPATTERN":
            yield from _repetitions(value[-1], prefix, rng)
        elif name == "BRANCH":
            for branch in value[1]:
                yield from _repetitions(branch, prefix, rng)
        prefix += _one(operation, value, rng)


def _example(tree: Any, rng: random.Random) -> str:
    """A text that the pattern is likely to match."""
    return "".join(_one(operation, value, rng) for operation, value in tree)


def _one(operation: Any, value: Any, rng: random.Random) -> str:
    name = str(operation)
    if name == "LITERAL":
        return chr(value)
    if name in ("ANY", "NOT_LITERAL"):
        return rng.choice("a1 ")
    if name == "IN":
        return _of_class(value, rng)
    if name in REPEATS:
        least, most, body = value
        return "".join(_example(body, rng) for _ in range(max(least, min(int(most), 1))))
    if name == "SUBPATTERN":
        return _example(value[-1], rng)
    if name == "BRANCH":
        return _example(rng.choice(value[1]), rng)
    return ""


def _of_class(items: Any, rng: random.Random) -> str:
    members = []
    for operation, value in items:
        if str(operation) == "LITERAL":
            members.append(chr(value))
        elif str(operation) == "RANGE":
            members += [chr(value[0]), chr(value[1])]
        elif str(operation) == "CATEGORY":
            members.append(CATEGORIES.get(str(value).removeprefix("CATEGORY_"), "!"))
    if str(items[0][0]) == "NEGATE":
        members = [each for each in "a7 x$(" if each not in members]
    return rng.choice(members or ["~"])
