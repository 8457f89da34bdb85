"""The current line of a thread of this process. It tells a rank that hangs from ranks that wait."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def stack_location(thread: int) -> str | None:
    """The innermost line in this package and the innermost function of all.

    Such as `model/mesh.py:42 sum > all_reduce`; None when the thread has ended.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return None
    stack = traceback.extract_stack(frame)
    last, own = stack[-1], [each for each in stack if PACKAGE in Path(each.filename).parents]
    if not own:
        return last.name
    place = f"{Path(own[-1].filename).relative_to(PACKAGE)}:{own[-1].lineno} {own[-1].name}"
    return place if own[-1] is last else f"{place} > {last.name}"
