"""`dapo-async eval` (L3): a config and a checkpoint in, avg@k, pass@k and maj@k out; called by the command line. No Ray.

check everything ─▶ what an earlier try has done ─▶ engines ─▶ the other problems, each kept as it ends ─▶ totals with intervals
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
from dapo_async.data import PromptSet, check_fit, load_set, usable_tokenizer
from dapo_async.evaluate.engines import check_engines, open_engines
from dapo_async.evaluate.estimates import Estimate, bootstrap, pass_at
from dapo_async.evaluate.record import Record, digest
from dapo_async.evaluate.sampled import Problem, answer_all
from dapo_async.model import ModelConfig, check_weights
from dapo_async.reward import Verdict, choose_verifiers
from dapo_async.rollout.engine import SamplingParams
from dapo_async.types import Completion, Prompt

SAY_EVERY_S = 2.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked for besides the config; None: what the config says."""

    checkpoint: Path | None
    data: str | None  # as data.heldout
    k: int
    temperature: float
    top_p: float
    seed: int | None
    max_problems: int | None
    out: Path | None


@dataclass(frozen=True, slots=True)
class Job:
    """An evaluation whose input is checked."""

    config: Config
    checkpoint: Path
    judge: Callable[[Prompt, Completion], Verdict]
    problems: PromptSet
    prompts: Sequence[Prompt]
    num_siblings: int
    sampling: SamplingParams
    settings: dict[str, Any]  # what another try has to have alike


def run(
    file: str, overrides: Sequence[str], options: Options, *, say: Callable[[str], None]
) -> int:
    """Evaluates; the exit code: 0, 1 when an engine failed, 130 or 143 when interrupted. Raises ValueError for what the user has to change."""
    job = prepare(file, overrides, options)
    config = job.config
    say(
        f"{job.checkpoint}, {config.rollout.engine} engine: {len(job.prompts)} problems of {config.data.heldout} x {job.num_siblings} responses"
    )
    with Record(options.out, job.settings) as record:
        if record.done:
            say(
                f"{len(record.done)} problems are done already, in {options.out if record.finished else record.partial}"
            )
        todo = [prompt for prompt in job.prompts if prompt.row not in record.done]
        stop = Interrupt()
        try:
            if todo:
                asyncio.run(_answer(job, todo, record, log=_log(options.out), say=say, stop=stop))
            problems = [record.done[prompt.row] for prompt in job.prompts]
            totals = summarise(problems, num_siblings=job.num_siblings, seed=job.sampling.seed)
        except asyncio.CancelledError:
            assert stop.first is not None
            say(f"{stop.first.name}: {_kept(record)}")
            return 128 + stop.first
        except (TimeoutError, RuntimeError) as error:  # EngineFault is one
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
    for line in _table(totals, num_siblings=job.num_siblings, out=options.out):
        say(line)
    return 0


def prepare(file: str, overrides: Sequence[str], options: Options) -> Job:
    """Reads and checks everything that needs no engine. Raises ValueError with rule, values and remedy."""
    for name, value, least in (
        ("--k", options.k, 1),
        ("--max-problems", options.max_problems, 1),
        ("--seed", options.seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(
                f"{name} ({value}) must be at least {least}; leave it out or give a larger number"
            )
    given = []
    if options.data is not None:
        given.append(f"data.heldout={json.dumps(options.data)}")
    if options.checkpoint is not None and any(
        (options.checkpoint / name).is_file() for name in TOKENIZER_FILES
    ):
        given.append(
            f"model.path={json.dumps(str(options.checkpoint))}"
        )  # else the tokenizer is that of the base model
    config = knobs.load(file, [*overrides, *given])
    check_engines(config)
    source, checkpoint = (
        Path(config.model.path),
        (options.checkpoint or Path(config.model.path)).resolve(),
    )
    model = ModelConfig.from_folder(checkpoint)
    check_weights(checkpoint, model)
    if not model.eos_token_ids:
        raise ValueError(
            f"model {checkpoint} has no eos_token_id in its config.json; a response could never stop: add it"
        )
    seed = config.seed if options.seed is None else options.seed
    sampling = SamplingParams(
        max_tokens=config.rollout.max_response_tokens,
        temperature=options.temperature,
        stop_token_ids=model.eos_token_ids,
        seed=seed,
        top_p=options.top_p,
    )
    tokenizer = usable_tokenizer(source)
    problems = load_set(config, config.data.heldout, tokenizer)
    check_fit(problems, model, folder=source, max_response_tokens=sampling.max_tokens)
    prompts = problems.prompts[: options.max_problems]
    weights = sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.json")])
    settings = {
        "checkpoint": str(checkpoint),
        "weights_sha256": digest(
            [*weights, *(source / name for name in TOKENIZER_FILES if (source / name).is_file())]
        ),
        "data": config.data.heldout,
        "problems_sha256": _digest_of(prompts),
        "verifier": config.reward.verifier,
        "engine": config.rollout.engine,
        "dtype": config.model.dtype,
        "max_response_tokens": sampling.max_tokens,
        "problems": len(prompts),
        "k": options.k,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
    }
    verifiers = choose_verifiers(config.reward.verifier)

    def judge(prompt: Prompt, completion: Completion) -> Verdict:
        return verifiers.of(prompt.source)(
            tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True), prompt.answer
        )

    return Job(config, checkpoint, judge, problems, prompts, options.k, sampling, settings)


def _digest_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all that an evaluation sees of its problems, in order: rows, texts after the template, gold answers."""
    whole = hashlib.sha256()
    for prompt in prompts:
        whole.update(json.dumps([prompt.row, prompt.text, prompt.answer]).encode())
    return whole.hexdigest()


def summarise(problems: Sequence[Problem], *, num_siblings: int, seed: int) -> dict[str, Any]:
    """avg@k, pass@1 … pass@k and maj@k with their intervals, and what the responses are like.

    Responses without a verdict count nowhere; a problem with only n < k judged ones gives its pass@n for pass@k, one with none is left out.
    Raises RuntimeError when there is no verdict at all.
    """
    known = [problem for problem in problems if problem.num_judged]
    if not known:
        raise RuntimeError(
            "the verifier failed over every response, so that nothing is known of the model"
        )
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
    """SIGINT or SIGTERM, once: it cancels the task, and is `first`. One more ends the process as it would have without this."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None

    def listen(self) -> None:
        """Takes both over, for the calling task."""
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
    """Every problem of `todo` into the record."""
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
    """Keeps each problem and says now and then how far it is. It begins when the engines are up."""

    def __init__(self, record: Record, *, num_problems: int, say: Callable[[str], None]) -> None:
        self._record, self._num_problems, self._say = record, num_problems, say
        self._num_before, self._num_tokens = len(record.done), 0
        self._began_s = self._said_s = time.monotonic()

    def finished(self, problem: Problem) -> None:
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
            f"{len(done):>5}/{self._num_problems} problems  avg {mean:.3f} so far  {speed:6.0f} tok/s  {rest_s:5.0f} s left"
        )


def _kept(record: Record) -> str:
    if record.out is None:
        return "nothing is kept without --json"
    return f"{len(record.done)} finished problems are kept in {record.partial}; the same command goes on from there"


def _log(out: Path | None) -> Path:
    """Of an SGLang server: beside the result, which is absolute, or for the time being."""
    return (
        out.with_name(out.name + ".sglang.log")
        if out
        else Path(tempfile.gettempdir()) / f"dapo-async-eval-{os.getpid()}.sglang.log"
    )


def _table(totals: dict[str, Any], *, num_siblings: int, out: Path | None) -> list[str]:
    """The totals for a person; of pass@k the powers of two."""
    powers = [2**power for power in range(num_siblings.bit_length())]
    names = [
        f"avg@{num_siblings}",
        *(f"pass@{number}" for number in sorted({*powers, num_siblings})),
        f"maj@{num_siblings}",
    ]
    lines = [
        f"{name:<9} {totals[name]['mean']:.3f}  [{totals[name]['low']:.3f}, {totals[name]['high']:.3f}]"
        for name in names
    ]
    shares = f"{totals['truncated']:.1%} truncated, {totals['answered']:.1%} with an answer"
    lines.append(f"{'length':<9} {totals['mean_response_tokens']:.1f} tokens, {shares}")
    if totals["unjudged"]:
        lines.append(
            f"unjudged  {totals['unjudged']} of {totals['responses']} responses, over which the verifier failed: they count nowhere"
        )
    left_out = {name: count for name, count in totals["left_out"].items() if count}
    lines += [f"left out  {count} {name} problems" for name, count in left_out.items()]
    lines.append(
        f"in brackets: 95 % of the means of a bootstrap over {totals['problems']} problems"
    )
    return [*lines, f"result    {out}"] if out else lines
