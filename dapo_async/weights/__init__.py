"""Publishing (L3): each learner step's weights reach every engine while it generates, and each engine proves which ones it serves.

announcement  what a publish says about itself: version, manifest, checksum, probe
collective    transport 1: one process group of the learner and all engines, broadcast in bounded buckets
disk          transport 2: safetensors by atomic rename; also the remedy for an engine whose content is wrong
handshake     the verdict on an engine's attestation: passed, inconclusive or mismatch (law 5)
publisher     the order of it all: one publish in flight, overlapping the next step
"""

from dapo_async.weights.announcement import BUCKET_BYTES, Announcement, Attestation, Manifest
from dapo_async.weights.collective import WeightGroup
from dapo_async.weights.handshake import HandshakeResult, judge
from dapo_async.weights.publisher import Publisher

__all__ = [
    "BUCKET_BYTES",
    "Announcement",
    "Attestation",
    "HandshakeResult",
    "Manifest",
    "Publisher",
    "WeightGroup",
    "judge",
]
