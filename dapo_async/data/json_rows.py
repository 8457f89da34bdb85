"""Rows of a JSON file: a path comes in, its objects leave. `sources.py` calls it.

A file has one object per line (JSONL), or it is one array of objects. It may be packed with gzip or
zstd; its first bytes tell. The own reader takes milliseconds and names the line of a mistake;
`datasets` costs each process 0.9 s of imports and a copy of the file in its cache.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

from dapo_async.data.formats import LONGEST, format_of

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BOM = b"\xef\xbb\xbf"
NOT_ZERO = re.compile("[1-9]")
MOST_DIGITS = 4300  # of an integer that Python reads
PER_LINE = "write one JSON object per line"


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file in its order. Empty lines are skipped.

    Raises ValueError, in one line, for a file that can't be read, and for the first line or item
    that is no JSON object.
    """
    first = True
    with _opened(path) as stream:
        for number, line in _lines(stream):
            if first and line.removeprefix(BOM).lstrip().startswith(b"["):
                yield from _array_rows(path, number, line)
                return
            first = False
            where = f"line {number} of {path}"
            yield _checked(_parsed(line, where, PER_LINE), where, PER_LINE)


def _array_rows(path: Path, number: int, line: bytes) -> Iterator[dict[str, Any]]:
    """The objects of a file that begins as an array."""
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # the array has several lines
        pass
    else:
        if first and not any(isinstance(item, dict) for item in first):
            _checked(first, f"line {number} of {path}", PER_LINE)
    with _opened(path) as stream:
        whole = stream.read()
    remedy = "write one array of objects, or one JSON object per line"
    for item, values in enumerate(_parsed(whole, f"data file {path}", remedy), start=1):
        yield _checked(values, f"item {item} of the array in {path}", "write only objects")


def _checked(values: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds a {type(values).__name__}; {remedy}")
    return values


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file. Raises ValueError for a file that can't be read to its end."""
    try:
        with path.open("rb") as file:
            start = file.read(LONGEST)
            file.seek(0)
            if start.startswith(GZIP):
                with gzip.open(file) as unpacked:
                    yield _checked_format(path, cast(io.BufferedReader, unpacked))
            elif start.startswith(ZSTD):
                import pyarrow

                with pyarrow.CompressedInputStream(file, "zstd") as packed:
                    yield _checked_format(path, io.BufferedReader(packed))
            elif (foreign := format_of(start)) is not None:
                raise ValueError(f"data file {path} {foreign}")
            else:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(
                f"data file {path} can't be read: {error.strerror}; give a readable JSONL file"
            ) from error
        raise ValueError(
            f"data file {path} can't be unpacked ({error}); it may be cut off: copy it again"
        ) from error


def _checked_format(path: Path, unpacked: io.BufferedReader) -> IO[bytes]:
    """The stream itself. Raises ValueError where it does not hold JSON."""
    if (foreign := format_of(unpacked.peek(LONGEST), packed=True)) is not None:
        raise ValueError(f"data file {path} {foreign}")
    return unpacked


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers from 1. They end with LF, CRLF or CR."""
    number = 0
    for block in stream:
        for line in block.splitlines():
            number += 1
            if line.strip() and line != BOM:
                yield number, line


def _parsed(text: bytes, where: str, remedy: str) -> Any:
    """The value of a JSON text. Numbers keep all of their digits."""
    try:
        return DECODER.decode(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); "
            "convert the file to UTF-8"
        ) from error
    except _RepeatedKeyError as error:
        raise ValueError(f"{where} has the key {error} twice in one object; keep one") from error
    except (ValueError, RecursionError) as error:  # also for huge numbers and deep lists
        raise ValueError(f"{where} is not valid JSON ({error}); {remedy}") from error


class _RepeatedKeyError(Exception):
    """An object has a key twice: its value depends on who reads it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKeyError(repr(counts.most_common(1)[0][0]))
    return values


def _number(text: str) -> float | Decimal:
    """A number with a point or exponent.

    Where it is infinite as a float the result is infinity, and where only a float makes it zero the
    result is NaN: such a row is left out.
    """
    value = float(text)
    if value and math.isfinite(value):
        return Decimal(text)
    is_zero = not NOT_ZERO.search(text.lower().partition("e")[0])
    return value if value or is_zero else math.nan


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; write it as a text")
    return int(text)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_int=_integer)
