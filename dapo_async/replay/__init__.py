"""The replay buffer. It decides which groups may be generated, kept and trained.

Workers ask for admissions and offer scored groups; the learner takes batches. All classes
are pure state machines without a clock. `runtime/actors/replay.py` calls them.

buffer.py        `ReplayBuffer`, which uses all the parts below
state.py         the states of a group, the answers to an offer, the snapshot for a checkpoint
credits.py       staleness bound: number of admitted groups, deadlines of a batch
pacing.py        just-in-time admission: how many groups should be out
ledger.py        conservation: every admitted group has exactly one outcome
token_flow.py    what became of the generated tokens, in exact counts
filters.py       dynamic sampling and the user's own filter
stop_rule.py     stops the run after many consecutive rejects: solved or stuck
step_stats.py    what was offered, accepted and rejected per step
stall_report.py  one line about what the learner waits for
group_io.py      groups in a safetensors file, or packed for transport
slot_demand.py   how many groups a worker asks for, by the sequences of its engine
state_io.py      counts of the replay part of a checkpoint
"""

from dapo_async.replay.buffer import ReplayBuffer
from dapo_async.replay.filters import Filter, custom_filter, dynamic_sampling, has_tokens
from dapo_async.replay.ledger import Counts, GroupOutcome
from dapo_async.replay.pacing import Pacer
from dapo_async.replay.state import BufferState, OfferOutcome, OfferResult, Refusal
from dapo_async.replay.step_stats import StepAcceptance
from dapo_async.replay.stop_rule import StopReason
from dapo_async.replay.token_flow import TokenBook, TokenCounts, TokenOutcome, num_tokens

__all__ = [
    "BufferState",
    "Counts",
    "Filter",
    "GroupOutcome",
    "OfferOutcome",
    "OfferResult",
    "Pacer",
    "Refusal",
    "ReplayBuffer",
    "StepAcceptance",
    "StopReason",
    "TokenBook",
    "TokenCounts",
    "TokenOutcome",
    "custom_filter",
    "dynamic_sampling",
    "has_tokens",
    "num_tokens",
]
