"""Publishing: sends a snapshot of the learner to every engine and checks what each engine serves.

announcement  the records: the learner's announcement, an engine's attestation
collective    transport `broadcast`: a process group of each sending learner rank and all engines
sending       the learner's side of it: whole weights, unit by unit, beside the step
disk          transport `disk`: safetensors; also reloads an engine that served wrong weights
server_hashes what an SGLang server must hash the weights to
tensor_proof  compares these hashes with those of the servers
handshake     compares an attestation with the announcement: passed, inconclusive or mismatch
publisher     runs a publish, one at a time, during the next learner step
"""

from typing import TYPE_CHECKING

from dapo_async.utils.lazy import lazy_names
from dapo_async.weights.announcement import (
    BUCKET_BYTES,
    Announcement,
    Attestation,
    BrokenOff,
    Manifest,
)
from dapo_async.weights.handshake import HandshakeOutcome, HandshakeResult, check_attestation
from dapo_async.weights.publisher import Publisher

if TYPE_CHECKING:  # these modules import torch
    from dapo_async.weights.collective import SENDER, WeightGroup, group_name, receive
    from dapo_async.weights.disk import write_version
    from dapo_async.weights.sending import hashes_of_copy, send_copy
    from dapo_async.weights.server_hashes import expert_parallel_of
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "collective": ("SENDER", "WeightGroup", "group_name", "receive"),
            "disk": ("write_version",),
            "sending": ("hashes_of_copy", "send_copy"),
            "server_hashes": ("expert_parallel_of",),
        },
    )

__all__ = [
    "BUCKET_BYTES",
    "SENDER",
    "Announcement",
    "Attestation",
    "BrokenOff",
    "HandshakeOutcome",
    "HandshakeResult",
    "Manifest",
    "Publisher",
    "WeightGroup",
    "check_attestation",
    "expert_parallel_of",
    "group_name",
    "hashes_of_copy",
    "receive",
    "send_copy",
    "write_version",
]
