"""The training dynamics of one run as a picture: what the DAPO repository tells people to watch, and what asynchrony adds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapo_async.tracking.run_dir import RunDir

# Title, curves of metrics.jsonl, and the points of evaluations.jsonl that belong beside them.
PANELS = (
    ("accuracy", ("accuracy",), "accuracy"),
    ("reward", ("reward",), None),
    ("response length (tokens)", ("response_tokens",), "mean_response_tokens"),
    ("entropy (nats)", ("entropy",), None),
    ("mean probability of the chosen tokens", ("probability",), None),
    ("staleness (versions)", ("staleness", "staleness_max"), None),
    ("clip fractions", ("clip_low_fraction", "clip_high_fraction"), None),
    ("rejected groups", ("rejected.all_correct", "rejected.all_wrong"), None),
    ("idle share", ("idle.learner", "idle.rollout"), None),
)
COLUMNS = 3


def draw_dynamics(run_dir: RunDir) -> bool:
    """Draws `metrics.jsonl`, and `evaluations.jsonl` where there is one, into `dynamics.png`; False, and no file, when there is no step yet."""
    rows = run_dir.rows() if run_dir.metrics.exists() else []
    if not rows:
        return False
    import matplotlib as mpl  # costs most of a second: only here, off the training path

    mpl.use("Agg")
    from matplotlib import pyplot

    evaluations = _rows(run_dir.evaluations)
    lines = -(-len(PANELS) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(15, 3 * lines), layout="constrained")
    for panel, (title, names, evaluated) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            _draw(panel, rows, "step", name, label=name.rpartition(".")[2], linewidth=1.6)
        if evaluated:
            # Version v is what the steps before step v have made.
            _draw(
                panel,
                evaluations,
                "version",
                evaluated,
                label="held-out",
                marker="o",
                linestyle="--",
                linewidth=1.0,
            )
        panel.set_title(title, fontsize=11)
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1:
            panel.legend(fontsize=8)
    figure.suptitle(run_dir.root.name, fontsize=12)
    figure.supxlabel("learner step", fontsize=11)
    figure.savefig(run_dir.picture, dpi=100)
    pyplot.close(figure)
    return True


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _draw(
    panel: Any, rows: Sequence[Mapping[str, Any]], across: str, name: str, **style: Any
) -> None:
    """One curve of the rows that have a number for it."""
    points = [(row[across], row[name]) for row in rows if row.get(name) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), **style)
