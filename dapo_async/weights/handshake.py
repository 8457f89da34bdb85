"""Law 5: after a publish each engine proves the version and the content that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dapo_async.weights.announcement import Announcement, Attestation


class Outcome(StrEnum):
    PASSED = "passed"  # the content is right, and it could be told from the content before
    INCONCLUSIVE = "inconclusive"  # right, but the content before would have answered alike
    MISMATCH = "mismatch"


@dataclass(frozen=True, slots=True)
class HandshakeResult:
    outcome: Outcome
    engine: str
    detail: str  # both values, for the log and for the error that stops the run
    probe_gap: float  # largest |logprob difference| between engine and learner


def judge(
    announced: Announcement,
    attested: Attestation,
    *,
    tolerance: float,
    peer: Attestation | None = None,
) -> HandshakeResult:
    """Compares what was announced with what the engine attests, and that with `peer`: an engine of the same layout that has proved this version.

    Version and checksum (where the layouts are equal) must be equal, the probe's logprobs within `tolerance` (nats). The answer counts as `passed`
    only if the engine's answer before the update was another one: by checksum, or by more than the tolerance on the probe.
    """
    gap = float(np.abs(attested.probe_after - announced.probe_logprobs).max())
    gap_before = float(np.abs(attested.probe_before - announced.probe_logprobs).max())

    def verdict(outcome: Outcome, detail: str) -> HandshakeResult:
        return HandshakeResult(outcome, attested.engine, detail, gap)

    if (attested.incarnation, attested.version) != (announced.incarnation, announced.version):
        return verdict(
            Outcome.MISMATCH,
            f"{attested.engine} serves version {attested.version} of {attested.incarnation}, "
            f"the learner published version {announced.version} of {announced.incarnation}",
        )
    if attested.checksum_after is not None and attested.checksum_after != announced.checksum:
        detail = f"{attested.engine} serves weights {attested.checksum_after[:12]}, the learner published {announced.checksum[:12]}"
        return verdict(Outcome.MISMATCH, f"{detail} as version {announced.version}")
    if peer is not None and attested.own_checksum != peer.own_checksum:
        sums = f"{attested.engine} serves weights {(attested.own_checksum or 'unknown')[:12]}, {peer.engine} {(peer.own_checksum or 'unknown')[:12]}"
        return verdict(Outcome.MISMATCH, f"{sums}, both as version {announced.version}")
    if not gap <= tolerance:  # nan is a mismatch too
        worst = (
            int(np.nanargmax(np.abs(attested.probe_after - announced.probe_logprobs)))
            if np.isfinite(gap)
            else 0
        )
        values = f"{attested.probe_after[worst]:.6f} against the learner's {announced.probe_logprobs[worst]:.6f}"
        return verdict(
            Outcome.MISMATCH,
            f"{attested.engine} answers the probe of version {announced.version} with {values} (tolerance {tolerance})",
        )
    told_by_checksum = (
        attested.checksum_before is not None and attested.checksum_before != announced.checksum
    )
    if told_by_checksum or not gap_before <= tolerance:
        return verdict(Outcome.PASSED, f"version {announced.version}, probe gap {gap:.1e}")
    return verdict(
        Outcome.INCONCLUSIVE,
        f"version {announced.version}: the weights before answer alike (gap {gap_before:.1e})",
    )
