"""The completions and texts of one group come in, the scored group leaves for `replay.offer`.

The rollout worker calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    shuffle_seed: int | None = None,
    incarnation: str,
    temperature: float,
) -> Group:
    """Judges the text of each sibling; its accuracy is the verifier's, in [0, 1].

        reward = 2 · accuracy − 1 + soft overlong punishment

    The rewards ±1 for right and wrong are DAPO's (2503.14476, equation 7). There is no punishment
    when `overlong_cache_tokens` is None. A truncated response is judged like any other: without an
    answer it is wrong. The verifier gets the prompt too, because it may end inside a thinking
    block.

    `shuffle_seed` is for a control experiment: the (accuracy, reward) pairs are permuted within the
    group, keyed by (shuffle_seed, group id). All statistics of the group stay the same, but a
    response no longer gets its own reward.

    Raises ValueError for an empty gold answer. Raises VerifierFailed when one verdict failed: the
    response may be right, so the group can't be trained.
    """
    assert len(completions) == admission.group_size, (
        f"group {admission.group_id}: {len(completions)} completions of {admission.group_size}"
    )
    prompt = admission.prompt
    verdicts = [verify(text, prompt.answer, prompt=prompt.text) for text in texts]
    if any(verdict.failed for verdict in verdicts):
        raise VerifierFailed("verifier failed")
    scores = []
    for completion, verdict in zip(completions, verdicts, strict=True):
        reward = 2.0 * verdict.accuracy - 1.0
        if overlong_cache_tokens is not None:
            reward += soft_overlong_punishment(
                len(completion.token_ids),
                max_tokens=max_response_tokens,
                cache_tokens=overlong_cache_tokens,
            )
        scores.append((verdict.accuracy, reward))
    if shuffle_seed is not None:
        order = np.random.default_rng((shuffle_seed, admission.group_id)).permutation(len(scores))
        scores = [scores[number] for number in order]
    rollouts = [
        Rollout(
            completion=completion,
            text=text,
            accuracy=accuracy,
            reward=reward,
            extracted=verdict.extracted,
            reason=verdict.reason,
        )
        for completion, text, verdict, (accuracy, reward) in zip(
            completions, texts, verdicts, scores, strict=True
        )
    ]
    return Group(
        group_id=admission.group_id,
        prompt=admission.prompt,
        rollouts=tuple(rollouts),
        incarnation=incarnation,
        temperature=temperature,
    )
