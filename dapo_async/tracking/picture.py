"""The training dynamics of one run as a picture: what the DAPO repository tells people to watch, and what asynchrony adds."""

from __future__ import annotations

import json
from pathlib import Path

PANELS = (
    ("accuracy", ("accuracy",)),
    ("response length (tokens)", ("response_tokens",)),
    ("entropy (nats)", ("entropy",)),
    ("mean probability", ("probability",)),
    ("staleness (versions)", ("staleness", "staleness_max")),
    ("rejected groups", ("rejected.all_correct", "rejected.all_wrong")),
    ("clip fractions", ("clip_low_fraction", "clip_high_fraction")),
    ("idle share", ("idle.learner", "idle.rollout")),
)


def draw_dynamics(metrics: Path, out: Path) -> bool:
    """Draws `metrics.jsonl` as a grid of curves over steps into a PNG; False, and no file, when there is no step yet."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if not rows:
        return False
    import matplotlib as mpl  # costs most of a second: only here, off the training path

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(16, 6.5), layout="constrained")
    for panel, (title, names) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, linewidth=1.6)
        panel.set_title(title, fontsize=11)
        panel.grid(alpha=0.3)
        if len(names) > 1 and panel.lines:
            panel.legend(fontsize=8)
    figure.supxlabel("learner step")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return True
