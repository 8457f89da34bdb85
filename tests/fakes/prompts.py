"""Prompts for tests."""

from collections.abc import Sequence

import numpy as np

from dapo_async.types import Prompt


def prompt(row: int, ids: Sequence[int] = (1, 2)) -> Prompt:
    """The prompt of one row; its gold answer is the row."""
    return Prompt(row, f"problem {row}", np.array(ids, np.int32), str(row))
