"""The order of prompts: endless, shuffled anew in each epoch, resumable from one integer. The replay actor draws from it at each admission."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dapo_async.types import Prompt


class PromptStream:
    """The order of epoch e depends on (seed, e) and the number of prompts alone, so `position` is all that a checkpoint needs."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, position: int = 0) -> None:
        """Raises ValueError without prompts or for a negative position."""
        if not prompts:
            raise ValueError("the prompt stream needs at least one prompt; give a data set with usable rows")
        if position < 0:
            raise ValueError(f"stream position ({position}) must not be negative; resume from a checkpoint's own position")
        self._prompts, self._seed, self._position = prompts, seed, position
        self._order = self._shuffled(self.epoch)

    @property
    def position(self) -> int:
        """How many prompts have been drawn since the run began."""
        return self._position

    @property
    def epoch(self) -> int:
        """Of the next prompt: 0, 1, 2, …"""
        return self._position // len(self._prompts)

    def next(self) -> Prompt:
        """The next prompt; there always is one."""
        offset = self._position % len(self._prompts)
        if offset == 0:
            self._order = self._shuffled(self.epoch)
        self._position += 1
        return self._prompts[self._order[offset]]

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts)).tolist()
        return order
