"""Many tensors as few collectives, or few files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of float32


def buckets(
    items: Iterable[T], size: Callable[[T], int], *, limit: int = BUCKET_ELEMENTS
) -> Iterator[list[T]]:
    """Runs of neighbours whose sizes together are at most `limit`; a larger item is alone."""
    bucket: list[T] = []
    filled = 0
    for item in items:
        if bucket and filled + size(item) > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size(item)
    if bucket:
        yield bucket
