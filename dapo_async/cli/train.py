"""`dapo-async train`: starts or resumes a run, or prints what would start (`--dry-run`)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dapo_async.cli.arguments import EXAMPLE, Parser, add_config, path, say
from dapo_async.cli.dry_run import dry_run_lines
from dapo_async.config import Config, load, to_yaml
from dapo_async.utils.paths import for_shell

if TYPE_CHECKING:  # torch, transformers and Ray take seconds to import
    from dapo_async.runtime.mirror import Mirror
    from dapo_async.runtime.preflight import Inputs
    from dapo_async.runtime.resume import ResumePoint
    from dapo_async.tracking.run_dir import RunDir

HELP = "train a model; writes a run directory"
RESUMABLE = ("interrupted", "out_of_time", "failed")  # statuses after which a run can go on


def add_arguments(parser: Parser) -> None:
    """Adds what `train` takes."""
    add_config(parser, needed=False)
    parser.add_argument(
        "--resume",
        type=_run_or_url,
        metavar="RUN_DIR",
        help="continue the run in this folder with its own config; give no CONFIG. A URL, such as "
        "s3://bucket/runs/NAME, is downloaded first",
    )
    parser.add_argument(
        "--from",
        dest="at",
        metavar="STEP",
        help="with --resume: roll back to this checkpoint, such as step_000120, or best; newer "
        "ones are set aside (default: the newest whole one)",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the run again from its newest checkpoint when it dies, fails or hangs",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would start, and start nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Checks everything, then trains. The exit code is that of the run."""
    from dapo_async.model import with_positions
    from dapo_async.runtime.cluster.address import choose
    from dapo_async.runtime.cluster.environment import prepare
    from dapo_async.runtime.local_model import with_local_model
    from dapo_async.runtime.resume import (
        START,
        complete_line,
        find_resume_point,
        with_model_at_hand,
    )
    from dapo_async.runtime.run_keeper import is_restarted
    from dapo_async.runtime.scale_desk import asked_line
    from dapo_async.tracking.run_dir import unusable

    if isinstance(options.resume, str) and options.config is None:
        if (root := _download(options)) is None:
            return 0
        options.resume = root
    if options.supervise and not options.dry_run:
        return _supervise(options)
    config, root, point = _begin(options)
    resume = point is not None
    point = point or START
    may_be_complete = config.train.resume == "auto" or is_restarted()
    if may_be_complete and (line := complete_line(root, config, point)):
        say(line)
        return 0
    if resume and (line := asked_line(root, config)) is not None:
        say(line)
    config, saved = with_local_model(config, download=not options.dry_run)
    saved = replace(saved, run_dir="")  # the folder may be moved
    if resume:
        config = with_model_at_hand(config, point.checkpoint)
    choice = choose(config.ray.address, allow_unauthenticated=config.ray.allow_unauthenticated)
    # The run gets the address that was chosen; `saved` keeps the knob, a resumed run chooses anew.
    config = replace(config, ray=replace(config.ray, address=choice.address))
    prepare(choice.address)

    from dapo_async.runtime.preflight import check_inputs

    base = config
    config = config.with_model(with_positions(config.model.path, config.model.max_positions))
    inputs = check_inputs(config, dry_run=options.dry_run)
    if resume:
        point = find_resume_point(
            config,
            train_data=inputs.fingerprint,
            heldout_data=inputs.heldout_fingerprint,
            point=point,
        )
    for line in (
        choice.note,
        *point.notes,
        *inputs.notes,
        *_data_lines(inputs, dry_run=options.dry_run),
    ):
        if line:
            say(line)
    if options.dry_run:
        if not resume and (fault := unusable(root)) is not None:
            say(f"could not start on this machine: {fault}")
        for line in inputs.model:
            say(line)
        for line in dry_run_lines(config, root, first_step=point.version):
            say(line)
        return 0

    return _train(base, saved, root, inputs=inputs, point=point, resume=resume)


def _supervise(options: argparse.Namespace) -> int:
    """Runs the command in child processes, until one of them ends the run."""
    from dapo_async.runtime.resume import saved_config
    from dapo_async.runtime.run_keeper import RunKeeper

    if options.resume and options.config is None:
        root = options.resume.resolve()
        config = load(saved_config(root), files=False)
        rollback = ["--from", options.at] if options.at else []
        words = ["--resume", str(root), *rollback, *options.overrides]
    else:
        config, root = _given(options)  # refuses what does not go together
        words = [str(options.config), *options.overrides, f"run_dir={root}"]
    keeper = RunKeeper(
        root,
        silence_s=config.deadlines.ping_s,
        nodes_wait_s=config.ray.wait_for_nodes_s,
        say=say,
    )
    return keeper.keep(words)


def _train(
    config: Config, saved: Config, root: Path, *, inputs: Inputs, point: ResumePoint, resume: bool
) -> int:
    """Makes the run directory, or reopens it, and trains into it. Returns the exit code of the run.

    `saved` is the config as the run directory keeps it.
    """
    from dapo_async.model import with_positions
    from dapo_async.runtime.newest_point import withdraw
    from dapo_async.runtime.run import run_training
    from dapo_async.tracking.run_dir import RunDir, missing_folders
    from dapo_async.tracking.sinks import open_progress
    from dapo_async.utils.files import atomic_write, is_disk_full

    made = missing_folders(root)
    if resume:
        run_dir = RunDir(root)
        begin = point.checkpoint or "the base model: there is no checkpoint yet"
        say(f"resuming at step {point.version} from {begin}")
    else:
        run_dir = _new_run_dir(root, to_yaml(saved), made)
    say(f"run directory {root}")
    config = config.with_model(
        with_positions(config.model.path, config.model.max_positions, run_dir.model)
    )

    def ready_run_dir() -> None:
        """Once Ray runs: a resume that can't begin leaves everything as it was."""
        if resume:
            if point.withdrawn:
                withdraw(config.train.checkpoint_mirror, root, point.withdrawn)
            for name in run_dir.reopen(point.version):
                progress.say(f"set aside {name}: the run continues before it")
            atomic_write(run_dir.config, to_yaml(saved))

    try:
        with open_progress(
            num_steps=config.train.num_steps, max_staleness=config.replay.max_staleness
        ) as progress:
            code = run_training(
                config,
                run_dir=run_dir,
                progress=progress,
                resume=point,
                train_data=inputs.fingerprint or "",
                heldout_data=inputs.heldout_fingerprint or "",
                prepare=ready_run_dir,
            )
    except ValueError:  # the run never began
        if not resume:
            run_dir.discard(made)
        raise
    except OSError as error:
        if not is_disk_full(error):
            raise
        progress.say(
            f"failed: the disk of {root} is full; free some space, and continue with "
            f"dapo-async train --resume {for_shell(root)}"
        )
        return 1
    for line in closing_lines(root):
        progress.say(line)
    return code


def _new_run_dir(root: Path, config: str, made: Sequence[Path]) -> RunDir:
    """Makes and locks the directory, with its config. Raises ValueError and leaves nothing if that
    fails. `made`: the folders that are missing before."""
    from dapo_async.tracking.run_dir import RunDir, not_made
    from dapo_async.utils.files import atomic_write

    run_dir = RunDir(root)
    try:
        RunDir.create(root).lock()
        atomic_write(run_dir.config, config)
    except OSError as error:  # a full disk
        run_dir.discard(made)
        raise ValueError(not_made(root, error)) from error
    return run_dir


def _begin(options: argparse.Namespace) -> tuple[Config, Path, ResumePoint | None]:
    """The config, its run directory, and where the run there continues; None: it is a new run."""
    from dapo_async.config.validate import check
    from dapo_async.runtime.newest_point import newest_point
    from dapo_async.runtime.resume import continued_config, resumed_config, saved_config
    from dapo_async.tracking.run_dir import RunDir

    if options.resume and options.config is None:
        root = options.resume.resolve()
        saved = load(saved_config(root), options.overrides, files=False)
        if not options.dry_run:
            RunDir(root).lock()  # first of all: a running run changes its checkpoints
        point = newest_point(
            root,
            saved.train.checkpoint_mirror,
            at=options.at,
            dry_run=options.dry_run,
            check=partial(_check_copy, saved),
            say=say,
        )
        return resumed_config(root, options.overrides, checkpoint=point.checkpoint), root, point
    config, root = _given(options)
    base = config.train.checkpoint_mirror
    if config.train.resume == "auto" and root.is_dir():
        run_dir = RunDir(root)
        if run_dir.config.is_file():
            if not options.dry_run:
                run_dir.lock()
            point = newest_point(
                root,
                base,
                dry_run=options.dry_run,
                check=partial(_check_copy, load(run_dir.config, files=False)),
                say=say,
            )
            return continued_config(root, config, checkpoint=point.checkpoint), root, point
        if not options.dry_run and not run_dir.is_locked():
            run_dir.discard(())  # the empty folders of a start that was killed
    check(config)
    if base and _is_on_mirror(config, root):
        point = newest_point(root, base, dry_run=options.dry_run, say=say)
        if not options.dry_run:
            RunDir(root).lock()
            return continued_config(root, config, checkpoint=point.checkpoint), root, point
    return config, root, None


def _check_copy(ours: Config, mirror: Mirror) -> None:
    """Raises ValueError if the copy is not of the run here, which has the config `ours`."""
    from dapo_async.runtime.resume import changed_knobs

    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(mirror.config())
        theirs = load(file, files=False)
    for name, here, there in changed_knobs(ours, theirs):
        raise ValueError(
            f"{mirror.url} has another run than this machine: {name} is {there} there and {here} "
            "here; choose another run_dir or train.checkpoint_mirror"
        )


def _is_on_mirror(config: Config, root: Path) -> bool:
    """Whether the mirror has checkpoints of a run that is not on this machine.

    Raises ValueError for a new run whose place on the mirror is taken.
    """
    from dapo_async.runtime.mirror import mirror_of

    mirror = mirror_of(config.train.checkpoint_mirror, root)
    taken = bool(mirror.versions())
    if taken and config.train.resume != "auto":
        raise ValueError(
            f"{mirror.url} has checkpoints of a run; continue it with train.resume=auto or "
            f"--resume {mirror.url}, or choose another run_dir"
        )
    return taken


def _download(options: argparse.Namespace) -> Path | None:
    """The new run directory with the run of `--resume URL`; None after a dry run."""
    from dapo_async.runtime.cluster.environment import run_root
    from dapo_async.runtime.mirror import Mirror, fetched

    if options.at is not None:
        raise ValueError(
            f"--from {options.at} needs a run directory of this machine, because only the newest "
            "checkpoint is downloaded; leave it out"
        )
    mirror = Mirror(options.resume)
    root = run_root("", name=mirror.name)
    if options.dry_run:
        say(f"would download the newest of the versions {mirror.versions()} to {root}")
        return None
    for line in fetched(mirror, root):
        say(line)
    return root


def _run_or_url(text: str) -> Path | str:
    """The type of --resume."""
    return text if "://" in text else path(text)


def _given(options: argparse.Namespace) -> tuple[Config, Path]:
    """The config of CONFIG and the overrides, and its run directory. Files are not checked yet.

    Raises ValueError for arguments that do not go together.
    """
    from dapo_async.runtime.cluster.environment import run_root

    if options.resume:
        raise ValueError(
            f"--resume uses the config of the run; leave out {options.config}, and give "
            "changes as key=value"
        )
    if options.at is not None:
        raise ValueError(f"--from {options.at} needs --resume RUN_DIR; add it")
    if options.config is None:
        raise ValueError(f"which config? give a YAML file, such as {EXAMPLE}, or --resume RUN_DIR")
    config = load(options.config, options.overrides, files=False)
    if config.train.resume == "auto" and not config.run_dir:
        raise ValueError(
            "train.resume=auto needs a fixed run_dir, because each start without one makes a new "
            "folder; set run_dir=NAME"
        )
    name = f"{Path(options.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    root = run_root(config.run_dir, name=name)
    return replace(config, run_dir=str(root)), root


def _data_lines(inputs: Inputs, *, dry_run: bool) -> Iterator[str]:
    if inputs.train and dry_run:  # in a run the replay actor reports it
        yield f"training   {inputs.train.summary}"
    if inputs.heldout and (dry_run or inputs.heldout.left_out.counts):
        yield f"held-out   {inputs.heldout.summary}"


def closing_lines(root: Path) -> Iterator[str]:
    """What a run has come to, from its summary.json, and the files that it has written.

    The reason of a failure is the last line, because the log of a job is read from its end.
    """
    from dapo_async.tracking.next_split import split_line

    summary = json.loads((root / "summary.json").read_text())
    end, failed = f"{summary['status']}: {summary['reason']}", summary["status"] == "failed"
    yield "" if failed else f"\n{end}"
    if summary["final_accuracy"] is not None:
        yield (
            f"held-out accuracy {summary['initial_accuracy']:.3f} -> "
            f"{summary['final_accuracy']:.3f}, length {summary['initial_response_tokens']:.1f} -> "
            f"{summary['final_response_tokens']:.1f}, in {summary['train_s']:.1f} s of training"
        )
    groups = _group_counts(summary["groups"])
    yield f"{summary['steps']} steps, {summary['tokens']} tokens; groups: {groups}"
    idle, staleness = summary["idle"], summary["staleness"]
    yield (
        f"staleness mean {staleness['mean']:.2f} max {staleness['max']}; "
        f"idle learner {idle['learner']:.0%}, rollout {idle['rollout']:.0%}"
    )
    advices = (summary["bottleneck"], split_line(summary["split"]), summary["slot_advice"])
    for advice in advices:
        if advice:
            yield advice
    yield f"{'checkpoint':<10} {root / summary['checkpoint']}"
    for what, name in (
        ("summary", "summary.json"),
        ("metrics", "metrics.jsonl"),
        ("timeline", "timeline.json"),
        ("picture", "dynamics.png"),
        ("rollouts", "rollouts"),
        ("traceback", "error.txt"),
    ):
        if (root / name).exists():
            yield f"{what:<10} {root / name}"
    if summary["status"] in RESUMABLE:
        yield f"{'continue':<10} dapo-async train --resume {for_shell(root)}"
    if (root / "mlflow.json").exists():
        yield _mlflow_line(json.loads((root / "mlflow.json").read_text()), root)
    if failed:
        yield end


def _group_counts(groups: dict[str, Any]) -> str:
    counts = {name: count for name, count in groups.items() if name != "rejected"}
    counts |= {f"rejected {reason}": count for reason, count in groups["rejected"].items()}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def _mlflow_line(mlflow: dict[str, str], root: Path) -> str:
    from dapo_async.tracking.mlflow_run import store_uri

    uri, _ = store_uri(mlflow["uri"], root.parent)
    how = f"mlflow ui --backend-store-uri {for_shell(uri)}" if uri.startswith("sqlite") else uri
    return f"{'MLflow':<10} {how}  (run {mlflow['run_id']})"
