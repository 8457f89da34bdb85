"""Where a run with a mirror continues: from this machine or from its copy, whichever is newer.

In: the run directory, and the URL below which the run has its copy. Out: a `ResumePoint`, whose
checkpoint is in the run directory. `train` calls it with --resume and `train.resume=auto`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dapo_async.runtime.mirror import Mirror, mirror_of
from dapo_async.runtime.resume import START, ResumePoint, choose_checkpoint
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import CheckpointFolder
from dapo_async.utils.paths import for_shell


def newest_point(
    root: Path,
    base: str,
    *,
    at: str | None = None,
    dry_run: bool = False,
    check: Callable[[Mirror], None] = lambda _: None,
    say: Callable[[str], None],
) -> ResumePoint:
    """The newest whole checkpoint of run directory and mirror; a newer copy is downloaded.

    `base`: `train.checkpoint_mirror`; empty: there is no mirror. `at`: the checkpoint that the user
    has named; newer copies are then removed when the run begins. `check` raises ValueError for a
    copy of another run; it is called before anything is downloaded over a checkpoint.

    A mirror that does not answer costs one line if there is a checkpoint here. Raises ValueError
    when newer copies can't be downloaded, because the run would write over them.
    """
    if not base:
        return choose_checkpoint(root, at=at)
    mirror = mirror_of(base, root)
    point, damage = START, None
    try:
        if root.is_dir():
            point = choose_checkpoint(root, at=at)
    except ValueError as error:  # no checkpoint here is whole
        if at is not None:
            raise
        damage = error
    folder = CheckpointFolder(RunDir(root).checkpoints)
    here = folder.path(point.version).name if point.checkpoint else "no whole checkpoint"
    try:
        versions = mirror.versions()
    except ValueError as error:
        if point.checkpoint is None:
            raise damage or error from error
        say(f"{error}; the run continues from {here} of this machine")
        return point
    newer = [version for version in versions if version > point.version]
    if at is not None:
        if newer:
            say(f"--from {at}: {names(newer)} will be removed from {mirror.url}")
        return replace(point, withdrawn=tuple(newer))
    if not newer:
        if damage is not None:
            raise damage
        if versions:
            say(f"{mirror.url} has nothing newer than {here} of this machine")
        return point
    if dry_run:
        has = f", which has {here}" if point.checkpoint else ""
        say(f"would download step_{newer[-1]:06d} of {mirror.url} to {root}{has}")
        return point
    if point.checkpoint is not None:
        check(mirror)
    try:
        got = mirror.download(root, after=point.version)
    except ValueError as error:
        if point.checkpoint is None:
            raise
        raise ValueError(
            f"{error}; or continue from {here} of this machine, which removes {names(newer)} "
            f"there: --resume {for_shell(root)} --from {here}"
        ) from error
    for line in got.notes[:-1]:
        say(line)
    say(got.notes[-1] + (f"; this machine has {here}" if point.checkpoint else ""))
    return replace(choose_checkpoint(root), withdrawn=tuple(got.damaged))


def withdraw(base: str, root: Path, versions: Sequence[int]) -> None:
    """Removes copies from the mirror. Raises ValueError without an answer."""
    mirror = mirror_of(base, root)
    try:
        mirror.remove(versions)
    except Exception as error:
        raise ValueError(
            f"{names(versions)} can't be removed from {mirror.url}: "
            f"{' '.join(str(error).split())}; repeat the command when the store answers"
        ) from error


def names(versions: Sequence[int]) -> str:
    """step_000020, or step_000020 to step_000050."""
    first, last = (f"step_{each:06d}" for each in (versions[0], versions[-1]))
    return first if first == last else f"{first} to {last}"
