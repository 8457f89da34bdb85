"""Input: the decoded responses of one group. Output: a scored group.

The rollout worker calls `score_group`. docs/rewards.md is the page for users.

verdict        `Verdict`, which every verifier returns
thinking       which part of a response is thinking
verifiers      verifiers by name and by data source
own_verifier   the user's function, in processes that have a deadline (`own_process.py`)
math_verifier  the verifier of mathematical answers
math           its public import path for other projects
overlong       DAPO's soft punishment of long responses
score          verdicts and punishments of a group become rewards
grading        verdicts for a file of rows, `dapo-async grade`
"""

from dapo_async.reward.math_verifier.verify import vote_key
from dapo_async.reward.overlong import soft_overlong_punishment
from dapo_async.reward.score import score_group
from dapo_async.reward.verdict import VERIFIER_FAILED, Verdict, Verifier, VerifierFailed
from dapo_async.reward.verifiers import (
    MARKER,
    VERIFIERS,
    VerifierChoice,
    choose_verifiers,
    get_verifier,
    named_sources,
)

__all__ = [
    "MARKER",
    "VERIFIERS",
    "VERIFIER_FAILED",
    "Verdict",
    "Verifier",
    "VerifierChoice",
    "VerifierFailed",
    "choose_verifiers",
    "get_verifier",
    "named_sources",
    "score_group",
    "soft_overlong_punishment",
    "vote_key",
]
