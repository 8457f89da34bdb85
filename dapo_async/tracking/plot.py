"""`dynamics.png`: the training dynamics of one run as a picture.

In: metrics.jsonl and evaluations.jsonl of a run directory. Out: the PNG. The driver calls it at the
end of a run.
"""

from __future__ import annotations

from contextlib import suppress

from dapo_async.tracking.charts import draw, project_style, whole_steps
from dapo_async.tracking.panels import in_picture, traces
from dapo_async.tracking.report_reading import read_run
from dapo_async.tracking.run_dir import RunDir

COLUMNS = 3
DPI = 110


def import_library() -> None:
    """Imports matplotlib, which takes most of a second, before `draw_dynamics` needs it.

    Where it can't be imported, `draw_dynamics` says so.
    """
    with suppress(ImportError):
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401


def draw_dynamics(run_dir: RunDir) -> bool:
    """Draws the picture. Returns False, without a file, when the run has no step yet."""
    if not run_dir.metrics.exists():
        return False
    run = read_run(run_dir.root, run_dir.root.name)
    if not run.rows:
        return False
    from matplotlib.figure import Figure  # see `import_library`

    shown = [(panel, found) for panel in in_picture() if (found := traces(panel, [run]))]
    lines = -(-len(shown) // COLUMNS)
    with project_style():
        figure = Figure(figsize=(13.5, 2.55 * lines + 0.4), layout="constrained")
        grid = figure.subplots(lines, COLUMNS, squeeze=False, sharex=False)
        for axes, (panel, found) in zip(grid.flat, shown, strict=False):
            draw(axes, found, alone=True)
            axes.set_title(panel.title)
            whole_steps(axes)
            if len(found) > 1:
                axes.legend()
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        figure.suptitle(f"{run.name}: {len(run.rows)} learner steps", x=0.01, ha="left", size=12)
        figure.supxlabel("learner step", size=9.5)
        figure.savefig(run_dir.picture, dpi=DPI, facecolor="white")
    return True
