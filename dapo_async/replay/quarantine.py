"""Prompts that the verifier can't judge: they are left out of training, by name.

In: groups of which the verifier has judged no response, and groups that it has judged. Out: the
rows of the prompts in quarantine, a line for each, and why training can't go on. The replay actor
calls it.

The file `quarantine.jsonl` of the run directory has a row per prompt. A resumed run reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dapo_async.types import Prompt

FAILURES = 3  # of one prompt's groups, without a judged one in between
MOST_IN_A_ROW = 64  # failed groups, without a judged one: the verifier does not work at all
TEXT_CHARACTERS = 60


@dataclass(slots=True)
class VerifierFailures:
    """Groups on which the verifier failed, without a judged one in between."""

    by_row: Counter[int] = field(default_factory=Counter)  # of the data set, for each prompt
    in_a_row: int = 0

    def failed(self, row: int) -> None:
        self.by_row[row] += 1
        self.in_a_row += 1

    def judged(self, row: int) -> bool:
        """Returns whether there was something to forget."""
        had = self.in_a_row > 0 or row in self.by_row
        self.by_row.pop(row, None)
        self.in_a_row = 0
        return had

    def image(self) -> dict[str, Any]:
        """As JSON values."""
        return {"by_row": [[*each] for each in self.by_row.items()], "in_a_row": self.in_a_row}

    @classmethod
    def of_image(cls, image: Mapping[str, Any]) -> VerifierFailures:
        return cls(Counter(dict(image["by_row"])), image["in_a_row"])


class Quarantine:
    """Counts failures by row of the data set."""

    def __init__(
        self,
        num_prompts: int,
        rows: Iterable[Mapping[str, Any]] = (),
        failures: VerifierFailures | None = None,
    ) -> None:
        """`rows`: those of `quarantine.jsonl`. One prompt always stays outside. `failures`: so
        far."""
        self._num_prompts = num_prompts
        self._failures = failures if failures is not None else VerifierFailures()
        self.rows: dict[int, Mapping[str, Any]] = {int(row["row"]): row for row in rows}
        for row in self.rows:  # counted before its process died
            self._failures.by_row.pop(row, None)
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
        return self._failures.in_a_row > 0 or bool(self._failures.by_row)

    def judged(self, prompt: Prompt) -> bool:
        """A group of the prompt has its verdicts. Returns whether that ends a count."""
        return self._failures.judged(prompt.row)

    def failed(self, prompt: Prompt, why: str) -> dict[str, Any] | None:
        """The verifier failed on a group. Returns the row for the file if the prompt goes in."""
        why = why or "it gave no verdict"
        self._failures.failed(prompt.row)
        if self._failures.in_a_row >= MOST_IN_A_ROW:
            self.fault = (
                f"the verifier failed on {self._failures.in_a_row} groups in a row; the last time: "
                f"{why}; correct it (reward.verifier)"
            )
        is_last = len(self.rows) + 1 >= self._num_prompts
        if self._failures.by_row[prompt.row] < FAILURES or is_last:
            return None
        del self._failures.by_row[prompt.row]
        text = " ".join(prompt.text.split())
        self.rows[prompt.row] = values = {
            "row": prompt.row,
            "source": prompt.source,
            "text": text if len(text) <= TEXT_CHARACTERS else text[-TEXT_CHARACTERS:],
            "why": why,
        }
        return values
