"""The live display of a run on a terminal, by the library rich.

In: rows of metrics and evaluations, through `Progress`. Out: a panel with the newest step, its
groups, the idle shares and the remaining time. Made by `sinks.open_progress`.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from dapo_async.tracking.terminal import Outlet, Progress, low_ess

REFRESHES_PER_S = 2
STEPS_FOR_PACE = 10  # the remaining time uses the median of the newest 10 steps
REJECTED_SO_FAR = "groups.rejected."


class LiveProgress(Progress):
    """Other lines are printed above the display; its last state stays on the terminal."""

    def __init__(
        self, out: Outlet, *, num_steps: int, max_staleness: int, console: Console | None = None
    ) -> None:
        super().__init__(out, num_steps=num_steps, max_staleness=max_staleness)
        self._console = console or Console(file=cast(IO[str], out), force_terminal=True)
        self._began_s = self._row_s = time.monotonic()
        self._row: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._paces_s: deque[float] = deque(maxlen=STEPS_FOR_PACE)
        self._live = Live(
            get_renderable=self.render, console=self._console, refresh_per_second=REFRESHES_PER_S
        )
        self._live.start()
        # rich hides the cursor until it stops. A killed run would leave the terminal without one.
        self._console.show_cursor(True)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def step(self, row: Mapping[str, Any]) -> None:
        self._row, self._row_s = row, time.monotonic()
        self._paces_s.append(row["step_s"])

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._evaluation = row

    def close(self) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        """The display as it is now."""
        done = self._row.get("version", 0)
        table = Table.grid(padding=(0, 3, 0, 0), expand=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=1)
        table.add_row("", ProgressBar(total=self._num_steps, completed=done))
        for name, *facts in self._lines():
            table.add_row(name, "   ".join(facts))
        title = f"step {done}/{self._num_steps}"
        return Panel(table, title=title, subtitle=self._times(), padding=(0, 1))

    def _lines(self) -> Iterator[tuple[str, ...]]:
        """A name and its facts, per line of the display."""
        row = self._row
        yield (
            "learning",
            f"accuracy {formatted(row, 'accuracy', '.3f')}",
            f"reward {formatted(row, 'reward', '.3f')}",
            f"entropy {formatted(row, 'entropy', '.3f')}",
        )
        bound = f"(max {formatted(row, 'group_staleness_max', '.0f')}/{self._max_staleness})"
        yield (
            "responses",
            f"length {formatted(row, 'response_tokens', '.1f')}",
            f"staleness {formatted(row, 'staleness', '.2f')} {bound}",
            low_ess(row),
        )
        yield "groups", *groups(row)
        yield (
            "speed",
            f"{formatted(row, 'tokens_per_s', ',.0f')} tok/s",
            f"idle learner {formatted(row, 'idle.learner', '.0%')}",
            f"rollout {formatted(row, 'idle.rollout', '.0%')}",
        )
        if evaluation := self._evaluation:
            yield (
                f"held-out v{evaluation['version']}",
                f"accuracy {formatted(evaluation, 'accuracy', '.3f')}",
                f"length {formatted(evaluation, 'mean_response_tokens', '.1f')}",
            )

    def _times(self) -> str:
        now_s = time.monotonic()
        elapsed = f"{clock(now_s - self._began_s)} elapsed"
        if not self._paces_s:
            return elapsed
        steps_left = self._num_steps - self._row["version"]
        left_s = steps_left * statistics.median(self._paces_s) - (now_s - self._row_s)
        return f"{elapsed}, about {clock(max(0.0, left_s))} of training left"


def formatted(row: Mapping[str, Any], name: str, form: str) -> str:
    """`row[name]` in the given format; a dash where the row has no such number."""
    value = row.get(name)
    return "–" if value is None else format(value, form)


def groups(row: Mapping[str, Any]) -> list[str]:
    """How many groups were accepted and rejected.

    Accepted: out of the groups offered for this step. Rejected: per reason, in this step and since
    the start of the run.
    """
    if not row:
        return ["–"]
    offered = row.get("offered", 0)
    facts = [f"accepted {row.get('acceptance', 1.0) * offered:.0f} of {offered}"]
    for name in sorted(row):
        if name.startswith(REJECTED_SO_FAR) and row[name]:
            reason = name.removeprefix(REJECTED_SO_FAR)
            now = row.get(f"rejected.{reason}", 0)
            facts.append(f"rejected {now} {reason} ({row[name]} in all)")
    return facts


def clock(seconds: float) -> str:
    """`3725.2` as `1:02:05`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
