"""`dapo-async submit`: runs `dapo-async train` as a Ray job, follows it, shows it or stops it."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_async.cli.arguments import EXAMPLE, Parser, add_config, path, say
from dapo_async.config import Config, load
from dapo_async.utils.paths import for_shell

if TYPE_CHECKING:  # Ray takes seconds to import
    from dapo_async.runtime.cluster.jobs import Job, JobServer, JobState

HELP = "run train as a job of a Ray cluster; follow, show or stop the job"
ADDRESS = "http://127.0.0.1:8265"  # of ray start --head on this machine
EXIT_INTERRUPTED = 130
EXIT_RUNNING = 3  # of --status, as of the command status
LAST_LINES = 12  # of a job whose run directory can't be read here
RUN_DIR = re.compile(r"^run directory (.+)$", re.MULTILINE)  # that `train` has printed
NOT_IN_AN_ID = re.compile(r"[^\w.-]+")


def add_arguments(parser: Parser) -> None:
    """Adds what `submit` takes."""
    add_config(parser, needed=False)
    parser.epilog = (
        "The job runs dapo-async train with CONFIG, the overrides, --resume, --from and "
        "--supervise. The exit code is that of train."
    )
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS,
        help=f"URL of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else {ADDRESS})",
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="as of train; a path of the cluster")
    parser.add_argument("--from", dest="at", metavar="STEP", help="as of train")
    parser.add_argument("--supervise", action="store_true", help="as of train")
    parser.add_argument(
        "--follow", action="store_true", help="print the job's log until its end (default)"
    )
    parser.add_argument("--wait", action="store_true", help="wait for the job without its log")
    parser.add_argument("--detach", action="store_true", help="end once the job is submitted")
    parser.add_argument(
        "--status", metavar="ID", help="show this job and its run; with --follow its log first"
    )
    parser.add_argument("--stop", metavar="ID", help="stop this job; its run saves a checkpoint")
    parser.add_argument(
        "--submission-id",
        metavar="ID",
        help="name of the job (default: name of run_dir, else of CONFIG); a number is added to "
        "the name of a job that is over",
    )
    parser.add_argument(
        "--runtime-env",
        type=path,
        metavar="FILE",
        help="YAML file with Ray's runtime environment, such as env_vars, pip, working_dir",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="variable that the job gets from this environment, such as WANDB_API_KEY; repeatable",
    )


def run(options: argparse.Namespace) -> int:
    """Submits, follows, shows or stops a job."""
    from dapo_async.runtime.cluster import jobs, ray_variables

    _check_modes(options)
    job = None if options.stop or options.status else _job(options)
    if (fault := ray_variables.fault()) is not None:
        raise ValueError(fault)
    server = jobs.connect(options.address)
    if options.stop:
        server.stop(options.stop)
        _show(server, options.stop)
        return 0
    if job is None:
        return _status(server, options)
    name = server.submit(job)
    about = ", ".join(f"{key} {value}" for key, value in job.metadata.items())
    say(f"job {name} submitted to {server.address}: {about}")
    if options.detach:
        for line in _commands(server, name):
            say(line)
        return 0
    try:
        if options.wait:
            server.wait(name, lambda state: say(f"job {name}: {state.state}"))
        else:
            server.follow(name, _write)
    except KeyboardInterrupt:
        return _leave(server, name)
    return _show(server, name).exit_code


def _check_modes(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    modes = [mode for mode in ("stop", "status") if getattr(options, mode)]
    ways = [way for way in ("follow", "wait", "detach") if getattr(options, way)]
    given = options.config or options.resume
    if len(modes) > 1 or len(ways) > 1:
        both = " and ".join(f"--{each}" for each in (modes if len(modes) > 1 else ways))
        raise ValueError(f"{both} do not go together; give one of them")
    if modes and (given or any(way != "follow" for way in ways)):
        raise ValueError(f"--{modes[0]} takes the id of a job and nothing to submit; leave it out")
    if not modes and not given:
        raise ValueError(
            f"what to submit? give a YAML file, such as {EXAMPLE}, or --resume RUN_DIR, or "
            "--status ID or --stop ID"
        )
    if options.resume and options.config:
        raise ValueError(
            f"--resume uses the config of the run; leave out {options.config}, and give "
            "changes as key=value"
        )
    if options.at is not None and not options.resume:
        raise ValueError(f"--from {options.at} needs --resume RUN_DIR; add it")


def _job(options: argparse.Namespace) -> Job:
    """What is submitted, checked as far as this machine can. Raises ValueError."""
    from dapo_async.runtime.cluster.jobs import Job, job_environment

    environment = job_environment(_given_environment(options.runtime_env), options.env)
    folder = str(environment["working_dir"])
    config: Config | None = None
    words = ["dapo-async", "train"]
    if options.resume:
        name = Path(options.resume).name
        words += ["--resume", options.resume, *(["--from", options.at] if options.at else [])]
    else:
        words.append(_config_in(folder, options.config))
        config = _checked(options) if "://" not in folder else None
        given = config.run_dir if config is not None else ""
        name = Path(given).name if given else Path(options.config).stem
    words += options.overrides
    if options.supervise:
        words.append("--supervise")
    metadata = {"run": name, "config": options.config or options.resume, "commit": _commit(folder)}
    return Job(
        name=NOT_IN_AN_ID.sub("-", options.submission_id or name),
        command=shlex.join(words),
        runtime_env=environment,
        metadata={key: value for key, value in metadata.items() if value},
        alone=bool(options.resume or options.submission_id or (config and config.run_dir)),
    )


def _checked(options: argparse.Namespace) -> Config:
    """The config as `train` will read it; model and data may be on the cluster only."""
    config = load(options.config, options.overrides, files=False)
    if config.train.resume == "auto" and not config.run_dir:
        raise ValueError("train.resume=auto needs a fixed run_dir; set run_dir=NAME")
    return config


def _config_in(folder: str, config: str) -> str:
    """`config` as the job finds it in its copy of the working directory `folder`."""
    if "://" in folder:  # the copy comes from elsewhere
        return config
    try:
        return Path(config).resolve().relative_to(Path(folder).resolve()).as_posix()
    except ValueError as error:
        raise ValueError(
            f"{config} must be in the working directory ({Path(folder).resolve()}), because the "
            "job has only a copy of it; start in a folder above it, or set working_dir in the "
            "file of --runtime-env"
        ) from error


def _given_environment(file: Path | None) -> Mapping[str, Any]:
    import yaml

    if file is None:
        return {}
    try:
        given = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"--runtime-env {file} can't be read: {why}; correct the file") from error
    if not isinstance(given, dict):
        raise ValueError(f"--runtime-env {file} must have keys such as env_vars; correct the file")
    return given


def _commit(folder: str) -> str:
    """The commit of the working directory, with -dirty if it has changes; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _status(server: JobServer, options: argparse.Namespace) -> int:
    if options.follow:
        try:
            server.follow(options.status, _write)
        except KeyboardInterrupt:
            return _leave(server, options.status)
    state = _show(server, options.status)
    return state.exit_code if state.is_over else EXIT_RUNNING


def _show(server: JobServer, job: str) -> JobState:
    """Prints the status of the job's run, then of the job."""
    state = server.state(job)
    for line in _run_lines(server.log(job)):
        say(line)
    if not state.is_over:
        for line in _commands(server, job):
            say(line)
    say(_job_line(state))
    return state


def _job_line(state: JobState) -> str:
    about = ", ".join(
        f"{key} {state.metadata[key]}"
        for key in ("run", "config", "commit")
        if key in state.metadata
    )
    time = f" after {state.seconds:.0f} s" if state.seconds is not None else ""
    code = f", exit code {state.exit_code}" if state.is_over else ""
    reason = f": {state.reason}" if state.reason else ""
    return f"job {state.id}{f' ({about})' if about else ''}: {state.state}{time}{code}{reason}"


def _run_lines(log: str) -> Iterator[str]:
    """What `dapo-async status` shows of the run, or the end of the log if the run directory is on
    the cluster only."""
    from dapo_async.tracking.run_status import lines, read_status

    match = RUN_DIR.findall(log)
    if not match:  # the run did not begin
        return
    root = Path(match[-1])
    try:
        yield from lines(read_status(root))
    except (OSError, ValueError):
        yield f"{'run':<10} {root} (not on this machine); the newest lines of the job:"
        yield from log.splitlines()[-LAST_LINES:]


def _commands(server: JobServer, job: str) -> Iterator[str]:
    start = f"dapo-async submit --address {for_shell(server.address)}"
    yield f"{'follow':<10} {start} --status {job} --follow"
    yield f"{'stop':<10} {start} --stop {job}"


def _leave(server: JobServer, job: str) -> int:
    *_, stop = _commands(server, job)
    say(f"\nthe job {job} goes on; to stop it: {stop.split(maxsplit=1)[1]}")
    return EXIT_INTERRUPTED


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
