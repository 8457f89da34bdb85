"""The completions and texts of one group come in, the scored group leaves for `replay.offer`.

The rollout worker calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dapo_async.reward.overlong import soft_overlong_punishment
from dapo_async.reward.verdict import TOO_FEW_VERDICTS, Verdict, Verifier, VerifierFailed
from dapo_async.types import Admission, Completion, Group, Rollout

LEAST_ROLLOUTS = 2  # of a group: advantages compare siblings
FAILED_AT_FIRST = 3  # verdicts; the others are not judged, for each may wait for a deadline


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

    A response whose verdict failed may be right, so it is left out of the group, which is compared
    without it.

    Raises ValueError for an empty gold answer. Raises VerifierFailed when fewer than
    `LEAST_ROLLOUTS` are left, or when the first `FAILED_AT_FIRST` verdicts have failed.
    """
    assert len(completions) == admission.group_size, (
        f"group {admission.group_id}: {len(completions)} completions of {admission.group_size}"
    )
    prompt = admission.prompt
    verdicts: list[Verdict] = []
    for text in texts:
        verdicts.append(verify(text, prompt.answer, prompt=prompt.text))
        failed = [each for each in verdicts if each.failed]
        if len(failed) == len(verdicts) in (FAILED_AT_FIRST, len(texts)):
            raise VerifierFailed(detail=failed[-1].detail)
    if len(verdicts) - len(failed) < min(LEAST_ROLLOUTS, len(texts)):
        raise VerifierFailed(TOO_FEW_VERDICTS, failed[-1].detail)
    rollouts = []
    for completion, text, verdict in zip(completions, texts, verdicts, strict=True):
        if verdict.failed:
            continue
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
        num_failed=len(failed),
    )
