"""The order of prompts: endless, shuffled anew in each epoch, addressed by position.

The replay actor reads the prompt of each admission.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dapo_async.types import Prompt


class PromptStream:
    """The prompt at position i depends only on the prompts, the seed and i.

    So a resumed run needs only the position.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        """Raises ValueError without prompts."""
        if not prompts:
            raise ValueError(
                "the prompt stream needs at least one prompt; give a data set with usable rows"
            )
        self._prompts, self._seed = prompts, seed
        self._epoch, self._order = 0, self._shuffled(0)

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at `position` 0, 1, 2, …; each epoch has every prompt once."""
        assert position >= 0, position
        epoch, offset = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._prompts[self._order[offset]]

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = (
            np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts)).tolist()
        )
        return order
