"""One group's completions and texts come in, the scored group leaves for `replay.offer`. Called by the rollout worker."""

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
    """Judges each sibling's text: accuracy in [0, 1] as the verifier says, reward = 2 · accuracy − 1 + soft overlong punishment (None: off).

    ±1 for right and wrong is DAPO's (2503.14476, equation 7). A truncated response is judged like any other: without an answer it is wrong.
    `shuffle_seed` makes the control experiment: (accuracy, reward) pairs are permuted within the group, keyed by (shuffle_seed, group id),
    so that every statistic of the group stays while a response no longer earns its own reward. Raises ValueError for an empty gold answer, and
    VerifierFailed when a verdict failed: the group can't be trained, for its failed rollout is not known to be wrong.
    """
    assert len(completions) == admission.group_size, (
        f"group {admission.group_id}: {len(completions)} completions for {admission.group_size} siblings"
    )
    verdicts = [verify(text, admission.prompt.answer) for text in texts]
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
