"""`dapo-async eval`: a config and a checkpoint come in, avg@k, pass@k and maj@k leave. Without Ray.

It checks all input, reads the problems that an earlier evaluation finished, starts the engines,
records each further problem as it ends, and prints the totals with their intervals.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_async import config as knobs
from dapo_async.config import Config
from dapo_async.data import (
    PromptSet,
    check_fit,
    check_template,
    check_tokenizer,
    load_set,
    response_decoder,
    usable_tokenizer,
)
from dapo_async.evaluate.engines import check_engines, open_engines
from dapo_async.evaluate.estimates import Estimate, bootstrap, pass_at
from dapo_async.evaluate.record import Record, digest
from dapo_async.evaluate.sampled import ProblemResult, answer_all
from dapo_async.model import ModelConfig, find_weights, weight_paths, with_positions
from dapo_async.reward import Verdict, choose_verifiers
from dapo_async.rollout.engine import SamplingParams
from dapo_async.types import Completion, Prompt

SAY_EVERY_S = 2.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command line; None means the value of the config."""

    checkpoint: Path | None
    data: str | None  # written as data.heldout
    k: int
    temperature: float
    top_p: float
    seed: int | None
    max_problems: int | None
    out: Path | None


@dataclass(frozen=True, slots=True)
class Job:
    """An evaluation after all its input is checked."""

    config: Config
    checkpoint: Path
    judge: Callable[[Prompt, Completion], Verdict]
    problems: PromptSet
    prompts: Sequence[Prompt]
    num_siblings: int
    sampling: SamplingParams
    settings: dict[str, Any]  # an evaluation continues an earlier one only with equal settings


def run(
    file: str, overrides: Sequence[str], options: Options, *, say: Callable[[str], None]
) -> int:
    """Evaluates and returns the exit code: 0; 1 when an engine failed; 130 or 143 when interrupted.

    Raises ValueError for wrong input.
    """
    return measure(prepare_evaluation(file, overrides, options), out=options.out, say=say)


def measure(job: Job, *, out: Path | None, say: Callable[[str], None]) -> int:
    """Evaluates into `out`; the exit code as of `run`. Raises ValueError for a wrong `out`."""
    config = job.config
    say(
        f"{job.settings['checkpoint']}, {config.rollout.engine} engine: {len(job.prompts)} "
        f"problems of {config.data.heldout} x {job.num_siblings} responses"
    )
    with Record(out, job.settings) as record:
        if record.done:
            path = out if record.finished else record.partial
            say(f"{len(record.done)} problems are done already, in {path}")
        todo = [prompt for prompt in job.prompts if prompt.row not in record.done]
        stop = Interrupt()
        try:
            if todo:
                asyncio.run(_answer(job, todo, record, log=_log(out), say=say, stop=stop))
            problems = [record.done[prompt.row] for prompt in job.prompts]
            totals = evaluation_totals(
                problems, num_siblings=job.num_siblings, seed=job.sampling.seed
            )
        except asyncio.CancelledError:
            assert stop.first is not None
            say(f"{stop.first.name}: {_kept(record)}")
            return 128 + stop.first
        except (TimeoutError, RuntimeError) as error:  # EngineFault is a RuntimeError
            say(f"failed: {' '.join(str(error).split())}; {_kept(record)}")
            return 1
        totals["left_out"] = dict(job.problems.left_out.counts)
        if not record.finished:
            record.finish(
                {
                    "settings": job.settings,
                    "totals": totals,
                    "problems": [problem.to_json() for problem in problems],
                }
            )
    for line in _table(totals, num_siblings=job.num_siblings, out=out):
        say(line)
    return 0


def prepare_evaluation(file: str, overrides: Sequence[str], options: Options) -> Job:
    """Reads and checks everything that needs no engine. Raises ValueError for wrong input."""
    config = _config(file, overrides, options)
    check_engines(config)
    named = (options.checkpoint or Path(config.model.path)).resolve()
    is_source = named == Path(config.model.path).resolve()
    config = config.with_model(with_positions(config.model.path, config.model.max_positions))
    source = Path(config.model.path)
    checkpoint = source.resolve() if is_source else named
    model = ModelConfig.from_folder(checkpoint, tokenizer=source)
    misread = find_weights(checkpoint, model).misread_by_sglang
    if misread and config.rollout.engine == "sglang" and config.rollout.server_urls:
        raise ValueError(
            f"the servers of rollout.servers would misread {checkpoint}, because they also read "
            f"{misread[0]}; move the files that are no part of the model out of the folder"
        )
    tokenizer = usable_tokenizer(source)
    check_tokenizer(tokenizer, model, folder=source)
    check_template(config, tokenizer, stop_token_ids=model.eos_token_ids)
    sampling = SamplingParams(
        max_tokens=config.rollout.max_response_tokens,
        temperature=options.temperature,
        stop_token_ids=model.eos_token_ids,
        seed=config.seed if options.seed is None else options.seed,
        top_p=options.top_p,
    )
    problems = load_set(config, config.data.heldout, tokenizer)
    check_fit(problems, model, folder=source, max_response_tokens=sampling.max_tokens)
    prompts = problems.prompts[: options.max_problems]
    settings = {
        "checkpoint": str(named),
        "weights_sha256": _digest_of_model(checkpoint, source),
        "data": config.data.heldout,
        "problems_sha256": _digest_of_prompts(prompts),
        "verifier": config.reward.verifier,
        "engine": config.rollout.engine,
        "dtype": config.model.dtype,
        "max_response_tokens": sampling.max_tokens,
        "problems": len(prompts),
        "k": options.k,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    verifiers = choose_verifiers(config.reward.verifier)
    response_text = response_decoder(tokenizer)

    def judge(prompt: Prompt, completion: Completion) -> Verdict:
        response = response_text(completion.token_ids.tolist())
        return verifiers.of(prompt.source)(response, prompt.answer, prompt=prompt.text)

    return Job(config, checkpoint, judge, problems, prompts, options.k, sampling, settings)


def _config(file: str, overrides: Sequence[str], options: Options) -> Config:
    """The config with the options applied."""
    for name, value, least in (
        ("--k", options.k, 1),
        ("--max-problems", options.max_problems, 1),
        ("--seed", options.seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}; give a larger number")
    given = []
    if options.data is not None:
        given.append(f"data.heldout={json.dumps(options.data)}")
    # A checkpoint without a tokenizer takes that of the base model.
    if options.checkpoint is not None and _tokenizer_files(options.checkpoint):
        given.append(f"model.path={json.dumps(str(options.checkpoint))}")
    return knobs.load(file, [*overrides, *given])


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _digest_of_model(checkpoint: Path, source: Path) -> str:
    """SHA-256 of the weights, the config and the tokenizer."""
    files = [*weight_paths(checkpoint), *sorted(checkpoint.glob("*.json"))]
    return digest([*files, *_tokenizer_files(source)])


def _digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the rows, the texts after the template and the gold answers, in order."""
    whole = hashlib.sha256()
    for prompt in prompts:
        whole.update(json.dumps([prompt.row, prompt.text, prompt.answer]).encode())
    return whole.hexdigest()


def evaluation_totals(
    problems: Sequence[ProblemResult], *, num_siblings: int, seed: int
) -> dict[str, Any]:
    """avg@k, pass@1 … pass@k and maj@k with their intervals, and statistics of the responses.

    Responses whose verdict failed are not counted. A problem with n < k judged responses gives its
    pass@n as pass@k; a problem without any is left out. Raises RuntimeError when there is no
    verdict at all.
    """
    known = [problem for problem in problems if problem.num_judged]
    if not known:
        raise RuntimeError("the verifier failed on every response, so there is no result")
    k = num_siblings
    names = [f"avg@{k}", *(f"pass@{number}" for number in range(1, k + 1)), f"maj@{k}"]
    columns = [
        [
            problem.accuracy,
            *(
                pass_at(
                    min(n, problem.num_judged),
                    num_correct=problem.num_correct,
                    num_responses=problem.num_judged,
                )
                for n in range(1, k + 1)
            ),
            problem.majority_accuracy,
        ]
        for problem in known
    ]
    estimates: list[Estimate] = bootstrap(np.array(columns), seed=seed)
    num_responses = k * len(problems)
    return {
        "problems": len(problems),
        "responses": num_responses,
        "unjudged": num_responses - sum(problem.num_judged for problem in problems),
        **{name: asdict(estimate) for name, estimate in zip(names, estimates, strict=True)},
        "mean_response_tokens": sum(sum(problem.lengths) for problem in problems) / num_responses,
        "truncated": sum(sum(problem.truncated) for problem in problems) / num_responses,
        "answered": sum(answer is not None for problem in problems for answer in problem.extracted)
        / num_responses,
    }


class Interrupt:
    """The first SIGINT or SIGTERM cancels the task and is kept as `first`.

    A second one ends the process as usual.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None

    def listen(self) -> None:
        """Installs the handlers for the calling task."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def receive(number: signal.Signals) -> None:
            self.first = number
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, receive, number)


async def _answer(
    job: Job,
    todo: Sequence[Prompt],
    record: Record,
    *,
    log: Path,
    say: Callable[[str], None],
    stop: Interrupt,
) -> None:
    """Answers the problems of `todo` and adds them to the record."""
    stop.listen()
    longest = max(len(prompt.token_ids) for prompt in todo) + job.sampling.max_tokens
    async with open_engines(
        job.config, checkpoint=job.checkpoint, max_len=longest, seed=job.sampling.seed, log=log
    ) as engines:
        progress = _Progress(record, num_problems=len(job.prompts), say=say)
        await answer_all(
            engines,
            todo,
            num_siblings=job.num_siblings,
            sampling=job.sampling,
            judge=job.judge,
            finished=progress.finished,
        )


class _Progress:
    """Records each problem and prints the progress. Create it when the engines are ready."""

    def __init__(self, record: Record, *, num_problems: int, say: Callable[[str], None]) -> None:
        self._record, self._num_problems, self._say = record, num_problems, say
        self._num_before, self._num_tokens = len(record.done), 0
        self._began_s = self._said_s = time.monotonic()

    def finished(self, problem: ProblemResult) -> None:
        self._record.add(problem)
        done, now_s = self._record.done, time.monotonic()
        self._num_tokens += sum(problem.lengths)
        if len(done) < self._num_problems and now_s - self._said_s < SAY_EVERY_S:
            return
        self._said_s, spent_s = now_s, now_s - self._began_s
        mean = sum(each.accuracy for each in done.values()) / len(done)
        rest_s = spent_s * (self._num_problems - len(done)) / (len(done) - self._num_before)
        speed = self._num_tokens / spent_s
        self._say(
            f"{len(done):>5}/{self._num_problems} problems  avg {mean:.3f} so far  "
            f"{speed:6.0f} tok/s  {rest_s:5.0f} s left"
        )


def _kept(record: Record) -> str:
    if record.out is None:
        return "nothing is kept without --json"
    return (
        f"{len(record.done)} finished problems are kept in {record.partial}; "
        "the same command continues from there"
    )


def _log(out: Path | None) -> Path:
    """The log of an SGLang server: beside the result, else in the folder for temporary files."""
    if out:
        return out.with_name(out.name + ".sglang.log")
    return Path(tempfile.gettempdir()) / f"dapo-async-eval-{os.getpid()}.sglang.log"


def _table(totals: dict[str, Any], *, num_siblings: int, out: Path | None) -> list[str]:
    """The totals as lines; pass@k for powers of two and for the largest k."""
    powers = [2**power for power in range(num_siblings.bit_length())]
    names = [
        f"avg@{num_siblings}",
        *(f"pass@{number}" for number in sorted({*powers, num_siblings})),
        f"maj@{num_siblings}",
    ]
    lines = []
    for name in names:
        mean, low, high = (totals[name][key] for key in ("mean", "low", "high"))
        lines.append(f"{name:<9} {mean:.3f}  [{low:.3f}, {high:.3f}]")
    shares = f"{totals['truncated']:.1%} truncated, {totals['answered']:.1%} with an answer"
    lines.append(f"{'length':<9} {totals['mean_response_tokens']:.1f} tokens, {shares}")
    if totals["unjudged"]:
        lines.append(
            f"unjudged  {totals['unjudged']} of {totals['responses']} responses, "
            "on which the verifier failed; they are not counted"
        )
    left_out = {name: count for name, count in totals["left_out"].items() if count}
    lines += [f"left out  {count} {name} problems" for name, count in left_out.items()]
    lines.append(
        f"in brackets: 95 % of the means of a bootstrap over {totals['problems']} problems"
    )
    return [*lines, f"result    {out}"] if out else lines
