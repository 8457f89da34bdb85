"""The outermost frame of `dapo-async`: errors become one line and an exit code."""

from __future__ import annotations

import difflib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import ModuleType

from dapo_async.cli import (
    bench,
    config,
    dump,
    evaluate,
    grade,
    launch,
    plan,
    report,
    rerun,
    scale,
    simulate,
    status,
    submit,
    trace,
    train,
    verify,
)
from dapo_async.cli.arguments import Parser, parse
from dapo_async.tracking.terminal import lasting_streams
from dapo_async.utils.files import is_disk_full

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130

# Each module has HELP, `add_arguments(parser)` and `run(options)`, which returns the exit code.
COMMANDS: Mapping[str, ModuleType] = {
    "train": train,
    "submit": submit,
    "status": status,
    "dump": dump,
    "scale": scale,
    "eval": evaluate,
    "report": report,
    "verify": verify,
    "trace": trace,
    "rerun": rerun,
    "grade": grade,
    "bench": bench,
    "plan": plan,
    "simulate": simulate,
    "launch": launch,
    "config": config,
}
RENAMED = {"replay": "rerun"}  # commands of earlier versions


def console() -> None:
    """The console script: `main`, then the end of the process with its exit code.

    Skips the interpreter's teardown: all output is written by now, and Ray's extension can abort
    there after a cancelled wait, which would turn exit code 143 into 134.
    """
    os._exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0 done, 1 the run failed, 2 wrong input, 130 or 143 interrupted; `status` has more. A reader
    that has ended, such as head, changes nothing: the command goes on without it.
    """
    # Ray's workers and torch read it when they start. Several threads per process on few cores
    # are several times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with lasting_streams():
        return _exit_code(sys.argv[1:] if arguments is None else arguments)


def _exit_code(words: Sequence[str]) -> int:
    try:
        return _run(words)
    except SystemExit as end:  # of --help
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # outside of a run, which handles its own signals
        print("dapo-async: SIGINT received", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ValueError as error:
        print(f"dapo-async: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = f"{error.filename} can't be written: " if error.filename else ""
        what = (error.strerror or "no space left").lower()
        print(f"dapo-async: {where}{what}; free some space on that disk", file=sys.stderr)
        return EXIT_FAILED


def _run(words: Sequence[str]) -> int:
    names = ", ".join(COMMANDS)
    if not words:
        raise ValueError(f"which command? give one of {names}; dapo-async --help describes them")
    name, *rest = words
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(
            f"dapo-async {version('dapo_async')}, Python {platform.python_version()}, "
            + ", ".join(f"{each} {version(each)}" for each in ("torch", "ray"))
        )
        return 0
    if name in RENAMED:
        raise ValueError(f"the command {name} was renamed: write dapo-async {RENAMED[name]}")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? There are {names}" if near else f"there are {names}"
        raise ValueError(f"unknown command {name}; {hint}")
    command = COMMANDS[name]
    parser = Parser(prog=f"dapo-async {name}", description=command.HELP, allow_abbrev=False)
    command.add_arguments(parser)
    code: int = command.run(parse(parser, rest))
    return code


def _help() -> str:
    lines = ["usage: dapo-async COMMAND ...", ""]
    lines += ["Asynchronous off-policy actor-learner training of reasoning language models.", ""]
    lines += [f"  {name:<8} {command.HELP}" for name, command in COMMANDS.items()]
    lines += ["", "dapo-async COMMAND --help lists the arguments of a command."]
    return "\n".join([*lines, "dapo-async --version prints the versions of this and of its parts."])
