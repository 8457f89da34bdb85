"""`dapo-async bench`: arguments for `bench.command`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

from dapo_async.cli.arguments import EXAMPLE, Parser, path, say
from dapo_async.config import Config, load

HELP = "measure one part of the system on your config, model and hardware; without data"
LOOP_SUBJECTS = ("replay", "publish", "end-to-end")  # they start Ray
SUBJECTS = ("rollout", "learner", *LOOP_SUBJECTS)
TRANSPORTS, MODES = ("broadcast", "disk"), ("recompute", "keep_kv", "drain")
REPLACED = ("learner", "rollout", "nothing")


def add_arguments(parser: Parser) -> None:
    """Adds what `bench` takes."""
    parser.epilog = "exit code: 0 done, 1 a figure got worse than in --compare, 130 interrupted"
    parser.add_argument("config", help=f"YAML file, such as {EXAMPLE}")
    parser.add_argument("subject", choices=SUBJECTS, metavar="{" + ",".join(SUBJECTS) + "}")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides"
    )
    parser.add_argument(
        "--json",
        type=path,
        metavar="OUT",
        help="write the result there, after each row",
    )
    parser.add_argument(
        "--compare", type=path, metavar="OLD.json", help="print ratios to an older result"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="a figure may be worse by this share (default: 0.05)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="counted rounds (default: 5)"
    )
    parser.add_argument(
        "--warm-up", type=int, default=1, metavar="N", help="rounds before them (default: 1)"
    )
    _add_lengths(parser)
    rollout = parser.add_argument_group("rollout")
    rollout.add_argument(
        "--running",
        type=_numbers,
        metavar="1,8,64",
        help="sequences that run at once (default: powers of 4 up to rollout.num_slots)",
    )
    rollout.add_argument(
        "--contexts",
        type=_numbers,
        metavar="128,1024",
        help="tokens of a sequence (default: an eighth, half and all of the longest sequence)",
    )
    learner = parser.add_argument_group("learner")
    learner.add_argument(
        "--microbatch-tokens",
        type=_numbers,
        metavar="4096,16384",
        help="sizes (default: a quarter, half and all of learner.microbatch_tokens)",
    )
    learner.add_argument(
        "--groups", type=int, metavar="N", help="groups of a step (default: four microbatches)"
    )
    learner.add_argument(
        "--recorded",
        type=path,
        metavar="RUN_DIR",
        help="a batch that this run has recorded; also the responses of end-to-end",
    )
    loop = parser.add_argument_group("replay, publish and end-to-end")
    loop.add_argument(
        "--transports", type=_words(TRANSPORTS), metavar=",".join(TRANSPORTS), help="default: all"
    )
    loop.add_argument("--modes", type=_words(MODES), metavar=",".join(MODES), help="default: all")
    loop.add_argument(
        "--step-s", type=float, metavar="S", help="a step of the learner that sleeps (default: 0)"
    )
    loop.add_argument(
        "--replaced",
        type=_words(REPLACED),
        metavar=",".join(REPLACED),
        help="rows of end-to-end (default: all)",
    )


def _add_lengths(parser: Parser) -> None:
    lengths = parser.add_argument_group("made-up prompts and responses")
    lengths.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="tokens of a prompt (default: 256 at most)"
    )
    lengths.add_argument(
        "--response-tokens",
        type=int,
        metavar="N",
        help="mean tokens of a response (default: a quarter of rollout.max_response_tokens)",
    )
    lengths.add_argument(
        "--sigma",
        type=float,
        help="of the lognormal distribution of response lengths (default: 1); 0: all are equal",
    )
    lengths.add_argument(
        "--lengths-from", type=path, metavar="RUN_DIR", help="draw the lengths from this run"
    )


def run(options: argparse.Namespace) -> int:
    """Measures one subject and prints a table."""
    # A benchmark reads no data. The config may lack it, or name what is on another machine.
    data = ("data.train=unused", "data.heldout=unused", "data.contamination=off")
    config = load(options.config, [*options.overrides, *data], files=False)

    from dapo_async.model import with_positions
    from dapo_async.runtime.local_model import with_local_model

    config, _ = with_local_model(config, download=True)
    config = config.with_model(with_positions(config.model.path, config.model.max_positions))
    if options.subject in LOOP_SUBJECTS:
        config = _with_ray(config)

    from dapo_async.bench.command import BenchOptions, run_bench  # takes seconds to import

    asked = BenchOptions(
        subject=options.subject,
        out=options.json and options.json.resolve(),
        compare=options.compare,
        tolerance=options.tolerance,
        repeats=options.repeats,
        warm_up=options.warm_up,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        sigma=options.sigma,
        lengths_from=options.lengths_from,
        running=options.running,
        contexts=options.contexts,
        microbatch_tokens=options.microbatch_tokens,
        groups=options.groups,
        recorded=options.recorded,
        step_s=options.step_s,
        replaced=options.replaced,
        transports=options.transports,
        modes=options.modes,
    )
    return run_bench(config, asked, say=say)


def _with_ray(config: Config) -> Config:
    """The config with the address of its Ray; prepares the environment before Ray is imported."""
    from dapo_async.runtime.cluster.address import choose
    from dapo_async.runtime.cluster.environment import prepare

    choice = choose(config.ray.address, allow_unauthenticated=config.ray.allow_unauthenticated)
    if choice.note:
        say(choice.note)
    prepare(choice.address)
    return replace(config, ray=replace(config.ray, address=choice.address))


def _words(known: Sequence[str]) -> Callable[[str], Sequence[str]]:
    """The type of an option that takes some of the `known` words."""

    def parse(text: str) -> Sequence[str]:
        words = text.split(",")
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word} must be one of {', '.join(known)}")
        return words

    return parse


def _numbers(text: str) -> Sequence[int]:
    """`1,8,64` as numbers."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text} must be numbers separated by commas, such as 1,8,64"
        ) from error
