"""k responses per prompt through one or several engines: prompts come in, judged problems leave.

`command.py` calls it and gets each problem as soon as it is judged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from dapo_async.evaluate.estimates import majority
from dapo_async.reward import Verdict
from dapo_async.rollout.engine import Engine, GroupRequest, SamplingParams
from dapo_async.types import Completion, FinishReason, Prompt


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """The verdicts on the k responses to one prompt; lists have one entry per sibling."""

    row: int  # in the data file, from 0
    gold: str
    num_judged: int  # responses with a verdict that did not fail
    num_correct: int  # responses with accuracy 1
    accuracy: float  # mean accuracy of the judged responses, with partial credit; 0 without any
    majority_accuracy: float  # accuracy of the most frequent answer; 0 without an answer
    accuracies: list[float | None]  # None: the verdict failed
    extracted: list[str | None]  # the answers that the verifier read; None: no answer found
    lengths: list[int]  # response tokens
    truncated: list[bool]  # cut at max_response_tokens

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(
    prompt: Prompt, completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> ProblemResult:
    """The result of one prompt from the verdicts of its siblings."""
    accuracies = [None if verdict.failed else verdict.accuracy for verdict in verdicts]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    extracted = [verdict.extracted for verdict in verdicts]
    winner = majority([None if verdict.failed else verdict.extracted for verdict in verdicts])
    return ProblemResult(
        row=prompt.row,
        gold=prompt.answer,
        num_judged=len(known),
        num_correct=known.count(1.0),
        accuracy=sum(known) / max(1, len(known)),
        majority_accuracy=0.0 if winner is None else verdicts[winner].accuracy,
        accuracies=accuracies,
        extracted=extracted,
        lengths=[len(completion.token_ids) for completion in completions],
        truncated=[completion.finish_reason is FinishReason.LENGTH for completion in completions],
    )


async def answer_all(
    engines: Sequence[Engine],
    prompts: Sequence[Prompt],
    *,
    num_siblings: int,
    sampling: SamplingParams,
    judge: Callable[[Prompt, Completion], Verdict],
    finished: Callable[[ProblemResult], None],
) -> None:
    """Calls `finished` with each problem as it ends, in any order.

    The noise of a response is keyed by (seed, row, sibling, token), so it does not depend on the
    other prompts or their order. An engine has at most `num_slots + 1` prompts at a time, so it is
    full as long as prompts wait. One extra thread makes the verdicts, one at a time, because a
    verifier may be slow and may keep state. When an engine or a verdict fails, everything is
    cancelled and its error is raised.
    """
    waiting, loop = iter(prompts), asyncio.get_running_loop()
    judges = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")

    def verdicts(prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        return [judge(prompt, completion) for completion in completions]

    async def judge_all(prompt: Prompt, completions: Sequence[Completion]) -> None:
        found = await loop.run_in_executor(judges, verdicts, prompt, completions)
        finished(judged(prompt, completions, found))

    async def serve(engine: Engine, group: asyncio.TaskGroup) -> None:
        for prompt in waiting:  # an iterator that all tasks share
            # Negative ids give other noise than training with the same seed.
            completions = await engine.generate(
                GroupRequest(-1 - prompt.row, prompt.token_ids, num_siblings, sampling)
            )
            group.create_task(judge_all(prompt, completions))

    try:
        async with asyncio.TaskGroup() as group:
            for engine in engines:
                for _ in range(min(engine.num_slots + 1, len(prompts))):
                    group.create_task(serve(engine, group))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        # Without waiting: a verdict may hang.
        judges.shutdown(wait=False, cancel_futures=True)
