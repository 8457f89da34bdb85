"""The reward room (L1): decoded responses of one group come in, a scored group leaves. The rollout worker calls `score_group`; see README.md.

verdict    what every verifier answers
verifiers  how a response is judged, by name and by source
math       the verifier of mathematical answers, behind it: extraction, spelling, plain, units, blowup, symbolic, claims, pool, verifier_process
overlong   DAPO's soft punishment of long responses
score      verdicts and punishments of a whole group as rewards
"""

from dapo_async.reward.math_verifier.verify import vote_key
from dapo_async.reward.overlong import soft_overlong_punishment
from dapo_async.reward.score import score_group
from dapo_async.reward.verdict import Verdict, Verifier, VerifierFailed
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
