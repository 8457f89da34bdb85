"""`dapo-async config`: prints a resolved config, or every knob."""

from __future__ import annotations

import argparse

from dapo_async.cli.arguments import EXAMPLE, Parser, add_config, say
from dapo_async.config import load, to_yaml
from dapo_async.config.explain import listing

HELP = "print a resolved config, or every knob with --explain"


def add_arguments(parser: Parser) -> None:
    """Adds what `config` takes."""
    add_config(parser, needed=False)
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print every knob with type, allowed values and default; with a config, mark what "
        "differs from the defaults",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the resolved config, or with --explain every knob."""
    config = None if options.config is None else load(options.config, options.overrides)
    if options.explain:
        for line in listing(config):
            say(line)
        return 0
    if config is None:
        raise ValueError(
            f"which config? give a YAML file, such as {EXAMPLE}, or --explain for every knob"
        )
    say(to_yaml(config).rstrip())
    return 0
