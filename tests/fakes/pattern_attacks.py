"""Texts that are slow for a regular expression with nested or adjacent repetitions.

`uses` finds the patterns of a package, with the methods that the package calls on them. `attacks`
reads the structure of a pattern: before each repetition it writes a match, then it repeats what the
repetitions repeat, and it ends with something that does not match. `growth` measures a pattern.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import math
import pkgutil
import random
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from re import _parser as parser  # type: ignore[attr-defined]
from types import FrameType, ModuleType
from typing import Any

CATEGORIES = {"DIGIT": "7", "SPACE": " ", "WORD": "a", "NOT_SPACE": "a", "NOT_DIGIT": "a"}
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
ASSERTIONS = ("ASSERT", "ASSERT_NOT")
LONG = 20  # repetitions that may be longer are attacked
ENDS = ("", "\0")
MOST_PAIRS = 20
COUNT, FACTOR = 500, 4  # repetitions of an attack, and how many times as many are compared with it
FLOOR_S, LIMIT_S = 2e-3, 1.0  # processor time that is not compared, and that ends a measurement
TRIES = 6  # measurements of a growth before it counts: a virtual machine that is stopped looks slow

Method = Callable[[re.Pattern[str], str], object]
METHODS: dict[str, Method] = {
    "match": lambda pattern, text: pattern.match(text),
    "fullmatch": lambda pattern, text: pattern.fullmatch(text),
    "search": lambda pattern, text: sum(1 for _ in pattern.finditer(text)),
}
SEARCHES = ("search", "sub", "finditer", "findall", "split")


def patterns(package: ModuleType) -> dict[str, re.Pattern[str]]:
    """All compiled patterns in the modules of a package, by name, also those within collections."""
    found: dict[str, re.Pattern[str]] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, re.Pattern):
            found.setdefault(name, value)
        elif isinstance(value, tuple | list):
            for number, each in enumerate(value):
                visit(f"{name}[{number}]", each)

    for module in _modules(package):
        for name, value in vars(module).items():
            visit(f"{module.__name__.rpartition('.')[2]}.{name}", value)
    return found


def uses(package: ModuleType) -> dict[str, tuple[re.Pattern[str], set[str]]]:
    """The patterns of a package by name, and which of `METHODS` it calls on them.

    They are its compiled patterns and the texts in calls such as `re.search("…", text)`. A pattern
    whose methods are not found in the source is searched for.
    """
    found = patterns(package)
    called: defaultdict[re.Pattern[str], set[str]] = defaultdict(set)
    for module in _modules(package):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = vars(module).get(node.value.id)
                if isinstance(owner, re.Pattern) and node.attr in (*SEARCHES, *METHODS):
                    called[owner].add(node.attr)
            if (written := _written(node)) is not None:
                method, text, line = written
                name = f"{module.__name__.rpartition('.')[2]}:{line}"
                found[name] = re.compile(text)
                called[found[name]].add(method)
    return {
        name: (
            pattern,
            {"search" if each in SEARCHES else each for each in called[pattern]} or {"search"},
        )
        for name, pattern in found.items()
    }


def _modules(package: ModuleType) -> list[ModuleType]:
    infos = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(info.name) for info in infos]


def _written(node: ast.AST) -> tuple[str, str, int] | None:
    """The method, the pattern and the line of a call such as `re.search("…", text)`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    module, method = node.func.value, node.func.attr
    if not (isinstance(module, ast.Name) and module.id == "re" and method in (*SEARCHES, *METHODS)):
        return None
    (pattern, *_) = node.args
    assert isinstance(pattern, ast.Constant), f"name the pattern in line {node.lineno}"
    return method, str(pattern.value), node.lineno


def attacks(pattern: re.Pattern[str], *, rounds: int = 4) -> list[tuple[str, str]]:
    """(prefix, part to repeat) of each long repetition in a pattern, the same in every call."""
    rng, tree = random.Random(0), _parsed(pattern)
    found = {
        pair
        for _ in range(rounds)
        for before, body in _repetitions(tree, "", rng)
        if body
        for pair in ((before, body), ("", before + body))
    }
    return sorted(found)


def texts(pattern: re.Pattern[str], *, rounds: int = 2) -> Iterator[Callable[[int], str]]:
    """Functions that write an attack with a number of repetitions."""
    pairs = attacks(pattern, rounds=rounds)
    rng, tree = random.Random(1), _parsed(pattern)
    pairs += [("", whole) for _ in range(rounds) if (whole := _example(tree, rng))]
    ends = sorted({*ENDS, *_asserted(tree, rng)})
    for (prefix, body), end in itertools.product(pairs, ends):
        yield functools.partial(_repeated, prefix, body, end)
    bodies = sorted({body for prefix, body in pairs if prefix} | {body[-1] for _, body in pairs})
    mixed = list(itertools.permutations(bodies, 2))
    for one, other in rng.sample(mixed, min(MOST_PAIRS, len(mixed))):
        yield functools.partial(_repeated, "", one + other, "")
        yield functools.partial(_one_after_the_other, one, other)


def _repeated(prefix: str, body: str, end: str, count: int) -> str:
    return prefix + body * count + end


def _one_after_the_other(one: str, other: str, count: int) -> str:
    return one * count + other * count


def growth(
    pattern: re.Pattern[str], method: str, write: Callable[[int], str]
) -> tuple[float, str] | None:
    """The growth of time from one length of an attack to `FACTOR` times it, and the attack's start.

    None where the longer one takes less than `FLOOR_S`, or the growth is below twice `FACTOR`.
    """
    long = _seconds(METHODS[method], pattern, write(FACTOR * COUNT))
    if long < FLOOR_S:
        return None
    if long >= LIMIT_S:
        return math.inf, write(3)[:80]
    short = math.inf
    for _ in range(TRIES):
        long = min(long, _seconds(METHODS[method], pattern, write(FACTOR * COUNT)))
        short = min(short, _seconds(METHODS[method], pattern, write(COUNT)))
        if long < FLOOR_S or long < 2 * FACTOR * short:
            return None
    return round(long / short, 1), write(3)[:80]


def _seconds(method: Method, pattern: re.Pattern[str], text: str) -> float:
    """Processor time of one call, `LIMIT_S` for a call that takes as long."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
    began_s = time.thread_time()
    try:
        method(pattern, text)
    except TimeoutError:
        return LIMIT_S
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return time.thread_time() - began_s


def _parsed(pattern: re.Pattern[str]) -> Any:
    return parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE)


def _repetitions(tree: Any, prefix: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    for operation, value in tree:
        name = str(operation)
        if name in REPEATS:
            if int(value[1]) > LONG:
                yield prefix, _example(value[2], rng)
            yield from _repetitions(value[2], prefix, rng)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            yield from _repetitions(_group(name, value), prefix, rng)
        elif name in ASSERTIONS:
            yield from _repetitions(value[1], prefix, rng)
        elif name == "BRANCH":
            for branch in value[1]:
                yield from _repetitions(branch, prefix, rng)
        prefix += _one(operation, value, rng)


def _asserted(tree: Any, rng: random.Random) -> Iterator[str]:
    """Examples of what a pattern looks ahead for."""
    for operation, value in tree:
        name = str(operation)
        if name in ASSERTIONS and value[0] > 0:
            yield _example(value[1], rng)
        elif name in (*REPEATS, "SUBPATTERN", "ATOMIC_GROUP"):
            yield from _asserted(value if name == "ATOMIC_GROUP" else value[-1], rng)


def _group(name: str, value: Any) -> Any:
    return value[-1] if name == "SUBPATTERN" else value


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
    if name in ("SUBPATTERN", "ATOMIC_GROUP"):
        return _example(_group(name, value), rng)
    if name == "ASSERT":
        return _example(value[1], rng) if value[0] < 0 else ""
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
