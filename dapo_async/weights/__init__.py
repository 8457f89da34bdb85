"""Publishing: a snapshot of the learner goes to every engine, which proves what it serves.

announcement  the records: the learner's announcement, an engine's attestation
collective    transport `broadcast`: one process group of the learner and all engines
disk          transport `disk`: safetensors; also reloads an engine that served wrong weights
handshake     compares an attestation with the announcement: passed, inconclusive or mismatch
publisher     the order of a publish: one in flight, beside the next learner step
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
