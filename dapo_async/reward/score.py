"""The completions and texts of one group come in, the scored group leaves for `replay.offer`.

The rollout worker calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dapo_async.reward.overlong import soft_overlong_punishment
from dapo_async.reward.verdict import Verifier, VerifierFailed
from dapo_async.types import Admission, Completion, Group, Rollout


def score_group(
    admission: Admission,
    completions: Sequence[Completion],
    *,
    texts: Sequence[str],
    verify: Verifier,
    max_response_tokens: int,
    overlong_cache_tokens: int | None = None,
    incarnation: str,
    temperature: float,
) -> Group:
    """Judges the text of each sibling; its accuracy is the verifier's, in [0, 1].

        reward = 2 · accuracy − 1 + soft overlong punishment

    The rewards ±1 for right and wrong are DAPO's (2503.14476, equation 7). There is no punishment
    when `overlong_cache_tokens` is None. A truncated response is judged like any other: without an
    answer it is wrong. The verifier gets the prompt too, because it may end inside a thinking
    block.

    Raises ValueError for an empty gold answer. Raises VerifierFailed when one verdict failed: the
    response may be right, so the group can't be trained.
    """
    assert len(completions) == admission.group_size, (
        f"group {admission.group_id}: {len(completions)} completions of {admission.group_size}"
    )
    prompt = admission.prompt
    verdicts = []
    for text in texts:
        verdicts.append(verify(text, prompt.answer, prompt=prompt.text))
        if verdicts[-1].failed:  # it may have waited for a deadline: the others are not judged
            raise VerifierFailed(detail=verdicts[-1].detail)
    rollouts = []
    for completion, text, verdict in zip(completions, texts, verdicts, strict=True):
        reward = 2.0 * verdict.accuracy - 1.0
        if overlong_cache_tokens is not None:
            reward += soft_overlong_punishment(
                len(completion.token_ids),
                max_tokens=max_response_tokens,
                cache_tokens=overlong_cache_tokens,
            )
        rollouts.append(
            Rollout(
                completion=completion,
                text=text,
                accuracy=verdict.accuracy,
                reward=reward,
                extracted=verdict.extracted,
                reason=verdict.reason,
            )
        )
    return Group(
        group_id=admission.group_id,
        prompt=admission.prompt,
        rollouts=tuple(rollouts),
        incarnation=incarnation,
        temperature=temperature,
    )
