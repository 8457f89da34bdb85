"""k responses per prompt through one or several engines: prompts in, judged problems out, each as soon as it ends. Called by `command.py`."""

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
class Problem:
    """One prompt's k responses, judged; a list has one entry per sibling."""

    row: int  # of the data file
    gold: str
    num_judged: int  # of the k: a failed verdict is neither right nor wrong
    num_correct: int  # responses with the full verdict
    accuracy: float  # mean verdict of those judged: with partial credit more than num_correct / num_judged; 0 without any
    majority_accuracy: float  # verdict of the most frequent answer; 0 when nobody has one
    accuracies: list[float | None]  # None: the verdict failed
    extracted: list[str | None]  # the answers that the verifier read; None: no answer found
    lengths: list[int]  # response tokens
    truncated: list[bool]  # cut at max_response_tokens

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(
    prompt: Prompt, completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> Problem:
    """What the siblings' verdicts come to."""
    accuracies = [None if verdict.failed else verdict.accuracy for verdict in verdicts]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    extracted = [verdict.extracted for verdict in verdicts]
    winner = majority([None if verdict.failed else verdict.extracted for verdict in verdicts])
    return Problem(
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
    finished: Callable[[Problem], None],
) -> None:
    """Tells `finished` each problem when it ends, in whatever order. Raises what the first failing engine or verdict raised; nothing goes on then.

    The noise of a response is keyed by (seed, row, sibling, token): it does not depend on which other prompts are asked, nor in which order. At most
    `num_slots + 1` prompts are at an engine: then it is full as long as any waits. Verdicts come from a thread of their own, one at a time, for a
    verifier may be slow and may keep state.
    """
    waiting, loop = iter(prompts), asyncio.get_running_loop()
    bench = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")

    def verdicts(prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        return [judge(prompt, completion) for completion in completions]

    async def judge_all(prompt: Prompt, completions: Sequence[Completion]) -> None:
        finished(
            judged(
                prompt,
                completions,
                await loop.run_in_executor(bench, verdicts, prompt, completions),
            )
        )

    async def serve(engine: Engine, group: asyncio.TaskGroup) -> None:
        for prompt in waiting:  # shared by all who serve
            # Negative ids: other noise than that of training with the same seed.
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
        bench.shutdown(
            wait=False, cancel_futures=True
        )  # a verdict that hangs holds up nobody's end
