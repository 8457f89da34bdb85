"""The handshake: after a publish each engine proves the version and the weights that it serves.

In: the learner's announcement and an engine's attestation. Out: a result with its reason. Called by
the publisher, and by the runtime for evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dapo_async.weights.announcement import Announcement, Attestation


class HandshakeOutcome(StrEnum):
    """The three outcomes of a handshake."""

    PASSED = "passed"  # the weights are right, and the weights before would have answered otherwise
    INCONCLUSIVE = "inconclusive"  # right, but the weights before would have answered alike
    MISMATCH = "mismatch"  # wrong version or wrong weights


@dataclass(frozen=True, slots=True)
class HandshakeResult:
    """The outcome of one handshake."""

    outcome: HandshakeOutcome
    engine: str
    detail: str  # both values, for the log and for the error that stops the run
    probe_gap: float  # largest |logprob difference| between engine and learner, in nats


def check_attestation(
    announced: Announcement,
    attested: Attestation,
    *,
    tolerance: float,
    peer: Attestation | None = None,
    before: Attestation | None = None,
) -> HandshakeResult:
    """Compares an engine's attestation with the learner's announcement.

    Version and checksum (where the layouts are equal) must be equal, and the probe's logprobs
    within `tolerance` (nats). `peer` is an engine of the same layout that has proved this version:
    if both have sent a checksum of their own, it must be equal, too. The outcome is `passed` only
    if the weights before the update differed: by checksum, by the engine's own checksum in its last
    attestation `before`, or by more than the tolerance on the probe.
    """
    assert announced.checksum is not None, "a handshake needs the learner's checksum"
    gap = float(np.abs(attested.probe_after - announced.probe_logprobs).max())
    wrong = _mismatch(announced, attested, gap=gap, tolerance=tolerance, peer=peer)
    if wrong is not None:
        return HandshakeResult(HandshakeOutcome.MISMATCH, attested.engine, wrong, gap)
    version = f"version {announced.version}"
    gap_before = float(np.abs(attested.probe_before - announced.probe_logprobs).max())
    other_checksum = attested.checksum_before not in (None, announced.checksum)
    if before is not None and None not in (before.own_checksum, attested.own_checksum):
        other_checksum = other_checksum or before.own_checksum != attested.own_checksum
    if other_checksum or not gap_before <= tolerance:
        outcome, detail = HandshakeOutcome.PASSED, f"{version}, probe gap {gap:.1e}"
    else:
        outcome = HandshakeOutcome.INCONCLUSIVE
        detail = f"{version}: the weights before answer alike (gap {gap_before:.1e})"
    return HandshakeResult(outcome, attested.engine, detail, gap)


def _mismatch(
    announced: Announcement,
    attested: Attestation,
    *,
    gap: float,
    tolerance: float,
    peer: Attestation | None,
) -> str | None:
    """What is wrong, with both values; None where nothing is."""
    engine, version = attested.engine, announced.version
    if (attested.incarnation, attested.version) != (announced.incarnation, announced.version):
        return (
            f"{engine} serves version {attested.version} of {attested.incarnation}, "
            f"the learner published version {version} of {announced.incarnation}"
        )
    if attested.checksum_after not in (None, announced.checksum):
        return (
            f"{engine} serves weights {_short(attested.checksum_after)}, "
            f"the learner published {_short(announced.checksum)} as version {version}"
        )
    sums = {attested.own_checksum, peer.own_checksum if peer is not None else None} - {None}
    if peer is not None and len(sums) == 2:  # a server may refuse a call once
        return (
            f"{engine} serves weights {_short(attested.own_checksum)}, "
            f"{peer.engine} {_short(peer.own_checksum)}, both as version {version}"
        )
    if not gap <= tolerance:  # also where gap is NaN
        gaps = np.abs(attested.probe_after - announced.probe_logprobs)
        worst = int(np.nanargmax(gaps)) if np.isfinite(gap) else 0
        return (
            f"{engine} answers the probe of version {version} with "
            f"{attested.probe_after[worst]:.6f} against the learner's "
            f"{announced.probe_logprobs[worst]:.6f} (tolerance {tolerance})"
        )
    return None


def _short(checksum: str | None) -> str:
    return (checksum or "unknown")[:12]
