"""Prompts that the verifier can't judge: they are left out of training, by name.

In: which groups the verifier failed on, and which it judged. Out: the rows of the prompts in
quarantine, a line for each, and why training can't go on. The replay actor calls it.

The file `quarantine.jsonl` of the run directory has a row per prompt. A resumed run reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dapo_async.types import Prompt

FAILURES = 3  # of one prompt's groups, without a judged one in between
MOST_IN_A_ROW = 64  # failed groups, without a judged one: the verifier does not work at all
TEXT_CHARACTERS = 60


class Quarantine:
    """Counts failures by row of the data set."""

    def __init__(self, num_prompts: int, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """`rows`: those of `quarantine.jsonl`. One prompt always stays outside."""
        self._num_prompts = num_prompts
        self._failures: Counter[int] = Counter()
        self._in_a_row = 0
        self.rows: dict[int, Mapping[str, Any]] = {int(row["row"]): row for row in rows}
        self.fault: str | None = None  # why training can't go on

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for the user for each prompt, in the order in which they came."""
        return tuple(
            f"prompt of row {row} ({values['text']!r}) is left out from now on: the verifier "
            f"failed on {FAILURES} of its groups; the last time: {values['why']}"
            for row, values in self.rows.items()
        )

    def holds(self, prompt: Prompt) -> bool:
        return prompt.row in self.rows

    @property
    def counts_failures(self) -> bool:
        """Whether `judged` has to be called."""
        return self._in_a_row > 0 or bool(self._failures)

    def judged(self, prompt: Prompt) -> None:
        """A group of the prompt has its verdicts."""
        self._in_a_row = 0
        self._failures.pop(prompt.row, None)

    def failed(self, prompt: Prompt, why: str) -> dict[str, Any] | None:
        """The verifier failed on a group. Returns the row for the file if the prompt goes in."""
        why = why or "it gave no verdict"
        self._in_a_row += 1
        self._failures[prompt.row] += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            self.fault = (
                f"the verifier failed on {self._in_a_row} groups in a row; the last time: {why}; "
                "correct it (reward.verifier)"
            )
        is_last = len(self.rows) + 1 >= self._num_prompts
        if self._failures[prompt.row] < FAILURES or is_last:
            return None
        del self._failures[prompt.row]
        text = " ".join(prompt.text.split())
        self.rows[prompt.row] = values = {
            "row": prompt.row,
            "source": prompt.source,
            "text": text if len(text) <= TEXT_CHARACTERS else text[-TEXT_CHARACTERS:],
            "why": why,
        }
        return values
