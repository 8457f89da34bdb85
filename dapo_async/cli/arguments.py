"""What the commands share: an argument parser with one-line errors, near names, printed lines."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dapo_async.config import knobs
from dapo_async.utils.paths import check_path

EXAMPLE = "configs/quickstart.yaml"


class Parser(argparse.ArgumentParser):
    """Raises ValueError with one line, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the arguments")


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The options of a command. Overrides may also stand after an option.

    Raises ValueError for an unknown option, and for overrides where a command takes none.
    """
    options, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-"):
            raise ValueError(_unknown_option(parser, word))
    takes = "overrides" in options
    if rest and not takes:
        raise ValueError(f"{parser.prog} does not take {' '.join(rest)}; leave it out")
    if takes:
        options.overrides = [*options.overrides, *rest]
        if (
            options.config is not None
            and "=" in options.config
            and not Path(options.config).exists()
        ):
            if getattr(options, "resume", None) or getattr(
                options, "watch", None
            ):  # there is no CONFIG, so argparse took an override
                options.config, options.overrides = None, [options.config, *options.overrides]
                return options
            raise ValueError(
                f"{options.config} is an override, and the config file is missing; "
                f"give a YAML file before it, such as {EXAMPLE}"
            )
    return options


def add_config(parser: Parser, *, needed: bool) -> None:
    """The arguments CONFIG and key=value."""
    parser.add_argument(
        "config", nargs=None if needed else "?", help=f"YAML file, such as {EXAMPLE}"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted overrides, such as learner.lr=1e-4",
    )


def path(text: str) -> Path:
    """The type of every argument that names a file or folder."""
    try:
        check_path("the path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def say(line: str) -> None:
    """Prints one line at once."""
    print(line, flush=True)


def _unknown_option(parser: Parser, word: str) -> str:
    name, _, value = word.lstrip("-").partition("=")
    if any(knob.name == name for knob in knobs()):
        return f"{name} is a knob, not an option; write {name}={value or '...'}"
    if "." in name:
        return f"unknown option {word}; a knob is written without dashes, as in learner.lr=1e-4"
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
    known = ", ".join(option for option in options if option.startswith("--"))
    return f"unknown option {word}; " + (
        f"did you mean {near[0]}?" if near else f"there are {known}"
    )
