"""Where a thread of this process is: what tells a rank that hangs from those that wait for it in a collective."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def whereabouts(thread: int) -> str | None:
    """The thread's innermost line in this package, and the innermost function of all, such as `model/mesh.py:42 sum`; None when it is gone."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return None
    stack = traceback.extract_stack(frame)
    last, own = stack[-1], [each for each in stack if PACKAGE in Path(each.filename).parents]
    if not own:
        return last.name
    place = f"{Path(own[-1].filename).relative_to(PACKAGE)}:{own[-1].lineno} {own[-1].name}"
    return place if own[-1] is last else f"{place} > {last.name}"
