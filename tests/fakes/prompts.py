"""Prompts made of numbers."""

import numpy as np

from dapo_async.types import Prompt


def prompt(row, ids=(1, 2)):
    return Prompt(row, f"problem {row}", np.array(ids, np.int32), str(row))
