"""The command line (L5): `dapo-async train CONFIG [key=value …]`, `grade`, `config [CONFIG]`. The outermost frame: errors become one line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from dapo_async import config as knobs
from dapo_async.cli import evaluate as cli_measure

EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


def console() -> None:
    """The console script: `main`, then the end of the process with its exit code.

    Without the interpreter's teardown: everything is written by now, and Ray's extension can abort there after a cancelled wait, which would turn
    exit code 143 into 134.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 the run failed, 2 wrong input, 130/143 interrupted."""
    # Ray's workers and torch both look at it when they start: several threads per process on few cores cost a multiple in speed.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        options = _options(arguments)
        code: int = options.run(options)
        return code
    except (
        KeyboardInterrupt
    ):  # before the run begins or after it has ended; what comes between is the run's own affair
        print("dapo-async: SIGINT received", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        print(f"dapo-async: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_WRONG_INPUT


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, as all others are, and name the help instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help tells more")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also stand after an option, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            parser.error(f"unknown option {word}")
    options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dapo-async",
        description="Asynchronous off-policy actor-learner training of reasoning language models.",
    )
    commands = parser.add_subparsers(
        required=True
    )  # no metavar: the error for a missing command lists the commands
    train = commands.add_parser("train", help="train a model; writes a run directory")
    train.add_argument("config", nargs="?", help="YAML file, such as configs/quickstart.yaml")
    train.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted overrides, such as learner.lr=1e-4",
    )
    train.add_argument(
        "--resume",
        type=Path,
        metavar="RUN_DIR",
        help="go on with the run in this folder instead; its own config is used",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print what would start, and start nothing"
    )
    train.set_defaults(run=_train)
    cli_measure.add_commands(commands)
    replay = commands.add_parser(
        "replay", help="the learner alone on a run's recorded batches: the same losses?"
    )
    replay.add_argument(
        "run_dir", type=Path, help="a run directory with recorded/ (train.record=true)"
    )
    replay.set_defaults(run=_replay, overrides=[])
    grade = commands.add_parser("grade", help="judge predictions by their gold answers, row by row")
    grade.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="IN.jsonl",
        help="rows with prediction, gold and maybe extraction",
    )
    grade.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUT.jsonl",
        help="the same rows with correct, extracted and reason",
    )
    grade.add_argument(
        "--timeout-s",
        type=float,
        default=5.0,
        metavar="S",
        help="deadline of one symbolic comparison (5)",
    )
    grade.add_argument(
        "--verifier",
        default="math",
        metavar="NAME",
        help="math (the default), marker, exact, or your own module:function",
    )
    grade.set_defaults(run=_grade, overrides=[])
    config = commands.add_parser(
        "config", help="print a resolved config, or every knob with --explain"
    )
    config.add_argument("config", type=Path, nargs="?")
    config.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    config.add_argument(
        "--explain", action="store_true", help="print every knob with its default and its line"
    )
    config.set_defaults(run=_config)
    return parser


def _train(options: argparse.Namespace) -> int:
    from dapo_async.runtime.cluster.address import choose
    from dapo_async.runtime.cluster.environment import prepare, run_root
    from dapo_async.runtime.resume import START, find_resume_point, resumed_config

    if options.resume:
        root = options.resume.resolve()
        # Without a config the first override stands in its place.
        config = resumed_config(
            root, [*([options.config] if options.config else []), *options.overrides]
        )
    elif options.config is None:
        raise ValueError(
            "which config? give a YAML file, such as configs/quickstart.yaml, or --resume RUN_DIR"
        )
    else:
        config = knobs.load(options.config, options.overrides)
        name = f"{Path(options.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        root = run_root(config.run_dir, name=name)
        config = replace(config, run_dir=str(root))
    from dapo_async.runtime.local_model import with_local_model

    config, saved = with_local_model(config, download=not options.dry_run)
    choice = choose(config.ray.address)
    # The run knows where it is; a resumed one decides anew.
    config = replace(config, ray=replace(config.ray, address=choice.address))
    prepare(choice.address)
    from dapo_async.runtime.preflight import (
        check_inputs,
    )  # torch, transformers and Ray take seconds to import: only for those who train

    inputs = check_inputs(config, dry_run=options.dry_run)
    point = find_resume_point(config, train_data=inputs.fingerprint) if options.resume else START
    for note in filter(None, (choice.note, *inputs.notes)):
        _say(note)
    if inputs.train and options.dry_run:  # else the replay actor tells
        _say(f"training   {inputs.train.summary}")
    if inputs.heldout and (options.dry_run or inputs.heldout.left_out.counts):
        _say(f"held-out   {inputs.heldout.summary}")
    if options.dry_run:
        return _dry_run(config, root, first_step=point.version)
    from dapo_async.runtime.run import run_training
    from dapo_async.tracking.run_dir import RunDir
    from dapo_async.tracking.sinks import open_progress

    run_dir = RunDir(root) if options.resume else RunDir.create(root)
    run_dir.lock()
    if options.resume:
        run_dir.reopen(point.version)
        _say(
            f"resuming at step {point.version} from {point.checkpoint or 'the base model: there is no checkpoint yet'}"
        )
    run_dir.write(run_dir.config, knobs.to_yaml(saved))
    _say(f"run directory {root}")
    with open_progress(
        num_steps=config.train.num_steps, max_staleness=config.replay.max_staleness
    ) as progress:
        code = run_training(
            config,
            run_dir=run_dir,
            progress=progress,
            resume=point,
            train_data=inputs.fingerprint or "",
        )
    _print_summary(root, progress.say)
    return code


def _dry_run(config: knobs.Config, root: Path, *, first_step: int) -> int:
    from dapo_async.runtime.cluster.planned_actors import planned_actors

    _say(f"would write {root}")
    where = (
        "an own Ray on this machine"
        if config.ray.address == "local"
        else f"the Ray cluster at {config.ray.address}"
    )
    actors = list(planned_actors(config))
    _say(f"would start {len(actors)} actors, one process each, on {where}, and this driver:")
    for actor in actors:
        _say(f"  {actor.name:<10} {actor.num_cpus:g} CPU {actor.num_gpus:g} GPU  {actor.detail}")
    if (
        knobs.parse_source(config.model.path).hub is None
    ):  # a model that is not here yet has no sizes
        _say(_memory_line(config))
    per_step = config.replay.groups_per_step * config.replay.group_size
    _say(
        f"would train {config.train.num_steps - first_step} steps of {per_step} rollouts of at most {config.rollout.max_response_tokens} tokens"
    )
    return 0


def _memory_line(config: knobs.Config) -> str:
    """What each learner rank will hold, in the worst case: the longest microbatch, all of it response."""
    import torch

    from dapo_async.learner import predict_memory
    from dapo_async.model import ModelConfig

    learner, cuda = config.learner, config.model.torch_device == "cuda"
    model = ModelConfig.from_folder(Path(config.model.path))
    memory = predict_memory(
        model,
        num_tokens=max(
            learner.microbatch_tokens,
            config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        ),
        dp=learner.data_parallel,
        tp=learner.tensor_parallel,
        activations=getattr(torch, config.model.dtype),
        recompute_layers=model.num_layers if learner.recompute else 0,
        offload_optimizer=learner.offload_optimizer and cuda,
        cuda=cuda,
    )
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.parts().items())
    return f"each learner rank would hold up to {memory.on_device / 2**20:,.0f} MiB, and {memory.host / 2**20:,.0f} in its host's memory: {parts}"


def _replay(options: argparse.Namespace) -> int:
    """Exit code 0 when every recorded step gives the run's numbers again, 1 when one does not."""
    from dapo_async.tracking.run_dir import RunDir

    run_dir = RunDir(options.run_dir.resolve())
    if not run_dir.config.is_file():
        raise ValueError(
            f"{run_dir.root} has no config.yaml, so it is no run directory; give the folder that a run has printed"
        )
    if options.overrides:
        raise ValueError(
            f"replay takes no overrides ({' '.join(options.overrides)}): it repeats the run as it was; leave them away"
        )
    from dapo_async.learner.rerun import recorded_steps, rerun, tolerance_for
    from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder

    config = knobs.load(run_dir.config)
    first = recorded_steps(run_dir.recorded)[0]
    state = CheckpointFolder(run_dir.checkpoints).path(first) / STATE / "learner" if first else None
    if state is not None and not state.is_dir():
        raise ValueError(
            f"recording began at step {first}, and {state} is gone; keep that checkpoint (train.keep_checkpoints) to replay from there"
        )
    different = 0
    comparisons = rerun(
        config, run_dir.recorded, rows={row["step"]: row for row in run_dir.rows()}, state=state
    )
    for compared in comparisons:
        name, (before, now) = next(iter(compared.differing.items()), ("", (None, None)))
        verdict = (
            f"DIFFERS by up to {compared.largest:.1e}: {name} was {before}, is {now}"
            if name
            else "equal"
        )
        norm = compared.values.get("grad_norm", float("nan"))
        _say(
            f"step {compared.step + 1:>4}  loss {compared.values['loss']:+.6f}  grad norm {norm:.6f}  {verdict}"
        )
        different += bool(name)
    how = (
        f"to {tolerance:g} of each number"
        if (tolerance := tolerance_for(config))
        else "bit for bit"
    )
    _say(
        f"{different} of {compared.step + 1 - first} steps differ"
        if different
        else f"all {compared.step + 1 - first} steps are equal, {how}"
    )
    return int(bool(different))


def _grade(options: argparse.Namespace) -> int:
    """Exit code 0 when every row has a verdict, 1 when the verifier died over one."""
    from dapo_async.reward.grading import grade
    from dapo_async.reward.math_verifier.verify import MOST_TIMEOUT_S

    if options.overrides:
        raise ValueError(f"grade takes no overrides ({' '.join(options.overrides)}); remove them")
    if not 0 < options.timeout_s <= MOST_TIMEOUT_S:
        raise ValueError(
            f"--timeout-s ({options.timeout_s:g}) must be positive and at most "
            f"{MOST_TIMEOUT_S:g} (a day); leave it out for 5"
        )
    grades = grade(
        options.input, options.output, verifier=options.verifier, timeout_s=options.timeout_s
    )
    reasons = ", ".join(f"{count} {reason}" for reason, count in grades.reasons.most_common())
    _say(f"{grades.num_rows} rows: {reasons or 'none'}; accuracy {grades.accuracy:.4f}")
    return int(grades.num_failed > 0)


def _config(options: argparse.Namespace) -> int:
    if options.explain:
        from dapo_async.config.explain import listing

        for line in listing():
            _say(line)
        return 0
    if options.config is None:
        raise ValueError(
            "which config? give a YAML file, such as configs/quickstart.yaml, or --explain for every knob"
        )
    _say(knobs.to_yaml(knobs.load(options.config, options.overrides)).rstrip())
    return 0


def _print_summary(root: Path, say: Callable[[str], None]) -> None:
    import json

    summary = json.loads((root / "summary.json").read_text())
    say(f"\n{summary['status']}: {summary['reason']}")
    if summary["final_accuracy"] is not None:
        lengths = f"length {summary['initial_response_tokens']:.1f} -> {summary['final_response_tokens']:.1f}"
        accuracies = f"held-out accuracy {summary['initial_accuracy']:.3f} -> {summary['final_accuracy']:.3f}"
        say(f"{accuracies}, {lengths}, in {summary['train_s']:.1f} s of training")
    counts = {name: count for name, count in summary["groups"].items() if name != "rejected"}
    counts |= {
        f"rejected {reason}": count for reason, count in summary["groups"]["rejected"].items()
    }
    groups = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    say(f"{summary['steps']} steps, {summary['tokens']} tokens; groups: {groups or 'none'}")
    idle, staleness = summary["idle"], summary["staleness"]
    say(
        f"staleness mean {staleness['mean']:.2f} max {staleness['max']}; idle learner {idle['learner']:.0%}, rollout {idle['rollout']:.0%}"
    )
    for what, path in (
        ("checkpoint", Path(summary["checkpoint"])),
        ("summary", root / "summary.json"),
        ("metrics", root / "metrics.jsonl"),
    ):
        say(f"{what:<10} {path}")
    if summary["status"] in ("interrupted", "out_of_time", "failed"):
        say(f"go on with  dapo-async train --resume {root}")
    for what, name in (
        ("timeline", "timeline.json"),
        ("picture", "dynamics.png"),
        ("rollouts", "rollouts"),
        ("traceback", "error.txt"),
    ):
        if (root / name).exists():
            say(f"{what:<10} {root / name}")
    if (root / "mlflow.json").exists():
        mlflow = json.loads((root / "mlflow.json").read_text())
        how = (
            f"mlflow ui --backend-store-uri {mlflow['uri']}"
            if mlflow["uri"].startswith("sqlite:")
            else mlflow["uri"]
        )
        say(f"{'MLflow':<10} {how}  (run {mlflow['run_id']})")


def _say(line: str) -> None:
    print(line, flush=True)
