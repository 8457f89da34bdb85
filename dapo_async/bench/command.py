"""`dapo-async bench`: a config and options come in, a table and a JSON file leave.

It checks all input, also that of a comparison, before anything is loaded. Called by `cli/bench.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dapo_async.bench.about import about
from dapo_async.bench.compare import check_comparable, compare, differences, lines
from dapo_async.bench.figures import BenchResult
from dapo_async.bench.learner import LearnerBench, made_up_groups, recorded_groups
from dapo_async.bench.made_up import (
    DEFAULT_PROMPT_TOKENS,
    DEFAULT_SIGMA,
    ResponseLengths,
    fixed_lengths,
    lengths_of_run,
    lognormal_lengths,
)
from dapo_async.bench.rollout import DECODE_STEPS, RolloutSweep, TorchRolloutBench
from dapo_async.bench.scenario import scenario_line, scenario_of
from dapo_async.bench.session import BenchSubject, Rounds, measure
from dapo_async.bench.sglang_rollout import (
    SGLANG_DECODE_STEPS,
    SPARE_POSITIONS,
    SGLangRolloutBench,
)
from dapo_async.bench.table import tables
from dapo_async.config import Config
from dapo_async.evaluate.engines import check_engines
from dapo_async.model import ModelConfig

EXIT_FAILED = EXIT_WORSE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The options of the command line; None means the default for the config."""

    subject: str
    out: Path | None = None
    compare: Path | None = None
    tolerance: float = 0.05
    repeats: int = 5
    warm_up: int = 1
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    sigma: float | None = None
    lengths_from: Path | None = None
    running: Sequence[int] | None = None  # rollout
    contexts: Sequence[int] | None = None  # rollout
    microbatch_tokens: Sequence[int] | None = None  # learner
    groups: int | None = None  # learner
    recorded: Path | None = None  # learner, end-to-end
    step_s: float | None = None  # replay, end-to-end
    replaced: Sequence[str] | None = None  # end-to-end
    transports: Sequence[str] | None = None  # publish
    modes: Sequence[str] | None = None  # publish


# Options of some subjects only, and how the command line writes them.
OWN_OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "running": (("rollout",), "--running"),
    "contexts": (("rollout",), "--contexts"),
    "microbatch_tokens": (("learner",), "--microbatch-tokens"),
    "groups": (("learner",), "--groups"),
    "recorded": (("learner", "end-to-end"), "--recorded"),
    "step_s": (("replay", "end-to-end"), "--step-s"),
    "replaced": (("end-to-end",), "--replaced"),
    "transports": (("publish",), "--transports"),
    "modes": (("publish",), "--modes"),
}


def run_bench(config: Config, options: BenchOptions, *, say: Callable[[str], None]) -> int:
    """Measures, prints the table and compares.

    Returns 0, 1 when a figure got worse, or 130 or 143 when interrupted. `config.model.path` is a
    folder. Raises ValueError for wrong input.
    """
    _check(config, options)
    config = with_fixed_slots(config, options)
    model = ModelConfig.from_folder(Path(config.model.path))
    torch.set_num_threads(max(1, int(config.model.num_cpus)))
    subject = _subject(config, model, options)
    old = None
    if options.compare is not None:
        old = BenchResult.read(options.compare)
        check_comparable(old, options.subject, subject.cells)
    settings = {"repeats": options.repeats, "warm_up": options.warm_up}
    result = BenchResult(options.subject, about(config, model), settings)
    say(f"bench {options.subject}: {len(subject.cells)} rows, {options.repeats} repetitions each")
    try:
        code = measure(subject, result, out=options.out, say=say)
    except (TimeoutError, RuntimeError) as error:  # of an engine or an actor
        say(f"failed: {' '.join(str(error).split())}")
        code = EXIT_FAILED
    for line in tables(result.rows):
        say(line)
    if result.rows:
        say("median (first - third quartile)")
    if sections := scenario_of(result.rows, slots=config.rollout.fixed_slots):
        say(f"scenario  {scenario_line(sections)}")
    if options.out is not None and result.rows:
        say(f"result    {options.out}")
    if old is not None and result.rows:
        worse = _show_comparison(old, result, tolerance=options.tolerance, say=say)
        code = code or (EXIT_WORSE if worse else 0)
    return code


def _show_comparison(
    old: BenchResult, new: BenchResult, *, tolerance: float, say: Callable[[str], None]
) -> int:
    """Prints the ratios; returns how many figures got worse."""
    compared = compare(old, new, tolerance=tolerance)
    measured = {row.key for row in new.rows}
    say("")
    if line := differences(old, new):
        say(line)
    for line in lines(compared, sum(row.key not in measured for row in old.rows)):
        say(line)
    worse = sum(each.verdict == "worse" for each in compared)
    say(f"{worse} of {len(compared)} figures got worse by more than {tolerance:.0%}")
    return worse


def _check(config: Config, options: BenchOptions) -> None:
    """Raises ValueError for options that no config allows."""
    for name, (subjects, written) in OWN_OPTIONS.items():
        if getattr(options, name) is not None and options.subject not in subjects:
            raise ValueError(
                f"{written} is an option of bench {' and '.join(subjects)}; leave it out"
            )
    numbers: list[tuple[str, float | None, float]] = [
        ("--repeats", options.repeats, 1),
        ("--warm-up", options.warm_up, 0),
        ("--prompt-tokens", options.prompt_tokens, 1),
        ("--response-tokens", options.response_tokens, 1),
        ("--groups", options.groups, 1),
        ("--sigma", options.sigma, 0),
        ("--step-s", options.step_s, 0),
        ("--tolerance", options.tolerance, 0),
    ]
    for written, values in (
        ("--running", options.running),
        ("--contexts", options.contexts),
        ("--microbatch-tokens", options.microbatch_tokens),
    ):
        numbers += [(written, value, 1) for value in values or ()]
    for written, value, least in numbers:
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"{written} ({value:g}) must be at least {least:g}")
    if options.out is not None and not options.out.parent.is_dir():
        raise ValueError(f"--json {options.out} is in no folder; make {options.out.parent} first")
    if options.out is not None and options.out.is_dir():
        raise ValueError(f"--json {options.out} is a folder; give a file")
    if not Path(config.model.path).is_dir():
        raise ValueError(f"model.path ({config.model.path}) does not exist; give an existing path")


def _subject(config: Config, model: ModelConfig, options: BenchOptions) -> BenchSubject:
    rounds = Rounds(options.warm_up, options.repeats)
    without_engine = options.subject in ("learner", "replay")
    rollout = replace(config.rollout, engine="torch") if without_engine else config.rollout
    check_engines(replace(config, rollout=rollout))
    if options.subject == "learner":
        return _learner(config, model, options, rounds)
    if options.subject != "rollout":
        return _loop(config, model, options, rounds)
    return _rollout(config, model, options, rounds)


def with_fixed_slots(config: Config, options: BenchOptions) -> Config:
    """With a number for `rollout.num_slots=auto`: what is measured must not change meanwhile."""
    rollout = config.rollout
    if rollout.num_slots != "auto":
        return config
    slots = max([rollout.fixed_slots, *(options.running or ())])
    return replace(config, rollout=replace(rollout, num_slots=slots))


def _rollout(
    config: Config, model: ModelConfig, options: BenchOptions, rounds: Rounds
) -> BenchSubject:
    rollout = config.rollout
    most = model.max_positions - (SPARE_POSITIONS if rollout.engine == "sglang" else 0)
    max_len = min(config.data.max_prompt_tokens + rollout.max_response_tokens, most)
    steps = DECODE_STEPS if rollout.engine == "torch" else SGLANG_DECODE_STEPS
    most_context = max_len - steps
    if most_context < 1:
        raise ValueError(
            f"the longest sequence ({max_len} tokens) must have more than {steps} tokens; "
            "raise rollout.max_response_tokens"
        )
    slots = rollout.fixed_slots
    running = options.running or _powers_of_4(slots)
    if max(running) > slots:
        raise ValueError(
            f"--running ({max(running)}) must be at most rollout.num_slots ({slots}); "
            "raise the knob or lower the option"
        )
    contexts = options.contexts or sorted(
        {max(1, most_context // 8), max(1, most_context // 2), most_context}
    )
    if max(contexts) > most_context:
        raise ValueError(
            f"--contexts ({max(contexts)}) must be at most {most_context}: the longest sequence "
            f"({max_len} tokens) less the {steps} steps of a repetition; raise "
            "rollout.max_response_tokens or lower the option"
        )
    prompt_tokens, lengths = _lengths(config, options, max_len=max_len)
    kinds = [lengths]
    if lengths.sigma or lengths.observed:
        kinds = [fixed_lengths(round(lengths.mean)), lengths]
    sweep = RolloutSweep(running, contexts, kinds, prompt_tokens, max_len)
    kind = TorchRolloutBench if rollout.engine == "torch" else SGLangRolloutBench
    return kind(config, model, sweep, rounds)


def _learner(
    config: Config, model: ModelConfig, options: BenchOptions, rounds: Rounds
) -> BenchSubject:
    most = config.learner.fixed_microbatch_tokens
    sizes = options.microbatch_tokens or sorted({max(1, most // 4), max(1, most // 2), most})
    if options.recorded is not None:
        groups, label = recorded_groups(options.recorded, model), "recorded"
    else:
        prompt_tokens, lengths = _lengths(config, options, max_len=model.max_positions)
        label = lengths.label
        groups = made_up_groups(
            config,
            model,
            lengths,
            prompt_tokens=prompt_tokens,
            microbatch_tokens=max(sizes),
            count=options.groups,
        )
    return LearnerBench(config, groups, label, sizes, rounds)


def _loop(
    config: Config, model: ModelConfig, options: BenchOptions, rounds: Rounds
) -> BenchSubject:
    from dapo_async.bench.loop import MODES, REPLACED, TRANSPORTS, LoopBench  # imports Ray

    max_len = min(
        config.data.max_prompt_tokens + config.rollout.max_response_tokens, model.max_positions
    )
    prompt_tokens, lengths = _lengths(config, options, max_len=max_len)
    if config.model.is_shared:
        raise ValueError(
            f"dapo-async bench CONFIG {options.subject} measures both sides while they overlap; "
            "set model.placement=separate, or measure a side alone with learner or rollout"
        )
    if options.recorded is not None:
        recorded_groups(options.recorded, model)  # before anything starts
    return LoopBench(
        config,
        options.subject,
        rounds,
        lengths,
        prompt_tokens,
        options.step_s or 0.0,
        options.recorded and options.recorded.resolve(),
        options.transports or TRANSPORTS,
        options.modes or MODES,
        options.replaced or REPLACED,
    )


def _lengths(config: Config, options: BenchOptions, *, max_len: int) -> tuple[int, ResponseLengths]:
    """Tokens of the made-up prompts, and the lengths of the responses."""
    data, most = config.data, config.rollout.max_response_tokens
    prompt_tokens = options.prompt_tokens or min(DEFAULT_PROMPT_TOKENS, data.max_prompt_tokens)
    longest = min(most, max_len - prompt_tokens)
    if longest < 1:
        raise ValueError(
            f"--prompt-tokens ({prompt_tokens}) leaves no room for a response in {max_len} tokens; "
            "lower it"
        )
    if options.lengths_from is not None:
        return prompt_tokens, lengths_of_run(options.lengths_from, longest=longest)
    mean = options.response_tokens or max(1, most // 4)
    if mean > longest:
        raise ValueError(
            f"--response-tokens ({mean}) must be at most {longest}, what rollout."
            "max_response_tokens and the prompt leave; lower it"
        )
    sigma = DEFAULT_SIGMA if options.sigma is None else options.sigma
    if sigma == 0:
        return prompt_tokens, fixed_lengths(mean)
    return prompt_tokens, lognormal_lengths(mean, sigma=sigma, longest=longest)


def _powers_of_4(most: int) -> list[int]:
    """1, 4, 16, …, and `most`."""
    powers = [4**power for power in range(16) if 4**power < most]
    return [*powers, most]
