"""The reward room (L1): decoded responses of one group come in, a scored group leaves. Pure functions; the rollout worker calls `score_group`.

verdict    what every verifier answers
verifiers  how a response is judged, by name
overlong   DAPO's soft punishment of long responses
score      verdicts and punishments of a whole group as rewards
"""

from dapo_async.reward.overlong import soft_overlong_punishment
from dapo_async.reward.score import score_group
from dapo_async.reward.verdict import Verdict, Verifier
from dapo_async.reward.verifiers import MARKER, VERIFIERS, get_verifier

__all__ = ["MARKER", "VERIFIERS", "Verdict", "Verifier", "get_verifier", "score_group", "soft_overlong_punishment"]
