"""The replay room: who may generate, which groups are kept, and when the learner may take them. Pure state machines without a clock.

credits.py     law 1: how many groups may be out, and which deadlines a take must leave room for
ledger.py      law 2: every admitted group ends exactly once, and the counts add up at every instant
filters.py     dynamic sampling and the user's own filter: keep a group or say why not
patience.py    nothing but rejects: the task is solved, or the run is stuck
acceptance.py  what was offered, kept and rejected per step
buffer.py      `ReplayBuffer` joins them; the replay actor drives it
lineage.py     what of all this survives a resume
explain.py     one line on who waits for whom
"""

from dapo_async.replay.buffer import ReplayBuffer
from dapo_async.replay.filters import Filter, custom_filter, dynamic_sampling, has_tokens
from dapo_async.replay.ledger import Counts, GroupOutcome
from dapo_async.replay.lineage import BufferState, freeze
from dapo_async.replay.offers import OfferOutcome, OfferResult, Refusal
from dapo_async.replay.step_stats import StepAcceptance
from dapo_async.replay.stop_rule import StopReason

__all__ = [
    "BufferState",
    "Counts",
    "Filter",
    "GroupOutcome",
    "OfferOutcome",
    "OfferResult",
    "Refusal",
    "ReplayBuffer",
    "StepAcceptance",
    "StopReason",
    "custom_filter",
    "dynamic_sampling",
    "freeze",
    "has_tokens",
]
