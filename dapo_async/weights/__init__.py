"""Publishing: sends a snapshot of the learner to every engine and checks what each engine serves.

announcement  the records: the learner's announcement, an engine's attestation
collective    transport `broadcast`: one process group of the learner and all engines
disk          transport `disk`: safetensors; also reloads an engine that served wrong weights
handshake     compares an attestation with the announcement: passed, inconclusive or mismatch
publisher     runs a publish, one at a time, during the next learner step
"""

from dapo_async.weights.announcement import BUCKET_BYTES, Announcement, Attestation, Manifest
from dapo_async.weights.collective import WeightGroup
from dapo_async.weights.handshake import HandshakeOutcome, HandshakeResult, check_attestation
from dapo_async.weights.publisher import Publisher

__all__ = [
    "BUCKET_BYTES",
    "Announcement",
    "Attestation",
    "HandshakeOutcome",
    "HandshakeResult",
    "Manifest",
    "Publisher",
    "WeightGroup",
    "check_attestation",
]
