"""Compares the hashes of single tensors of SGLang servers with those that the learner expects.

In: the learner's announcement and the attestations of the servers. Out: which tensor of which rank
is not the learner's. Called by the publisher.

A server may hold tensors in a form that the learner does not know: some kernels pack them. So the
learner's expectation is compared only for the kinds of tensors that were proved to have the known
form. A kind, such as the down projections of all layers, is proved when one of its tensors, on any
rank of any server, has the expected hash: no two forms of random weights have the same bits. From
then on each tensor of this kind must have its expected hash, on every rank of every server: also
one that was never right. All servers of a run have the same form, as their checksums do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from dapo_async.weights.announcement import Announcement, Attestation

ROUND = 8  # publishes that together hash every tensor once


def kind_of(name: str) -> str:
    """The kind of the server's tensor `name`: without its layer. All norms are one kind."""
    module = name.split(".")[-2]
    if module.endswith("norm"):
        return "norm"
    return re.sub(r"\.\d+\.", ".", name)


class TensorProof:
    """The kinds that are proved so far, of a run."""

    def __init__(self) -> None:
        self._proved: set[str] = set()
        self._seen: set[str] = set()
        self._num_publishes = 0

    def note(self, announcement: Announcement, attestations: Iterable[Attestation]) -> None:
        """Notes what the hashes of a publish prove; before `wrong` is asked about any of them."""
        pairs = [pair for each in attestations for pair in _pairs(announcement, each)]
        self._num_publishes += bool(pairs)
        self._seen |= {kind_of(name) for _, name, _, _ in pairs}
        self._proved |= {kind_of(name) for _, name, expected, found in pairs if found == expected}

    def uncompared(self) -> tuple[str, ...]:
        """Once, when every tensor was hashed twice: the kinds that are not compared, because none
        of their tensors had the expected hash. Else nothing."""
        if self._num_publishes != 2 * ROUND:
            return ()
        self._num_publishes += 1
        return tuple(sorted(self._seen - self._proved))

    def wrong(self, announcement: Announcement, attested: Attestation) -> str | None:
        """Which tensor is not the learner's, with both hashes; None: all that compare are."""
        for rank, name, expected, found in _pairs(announcement, attested):
            if found != expected and kind_of(name) in self._proved:
                return (
                    f"{attested.engine} serves another {name} on its rank {rank} (hash {found}) "
                    f"than the learner published as version {announcement.version} (hash "
                    f"{expected})"
                )
        return None


def _pairs(
    announcement: Announcement, attested: Attestation
) -> Iterator[tuple[int, str, str, str | None]]:
    """Rank, name, expected and found hash of each tensor that the learner has hashed."""
    # Without hashes, which a server may refuse once, there is nothing to compare.
    ranks = zip(announcement.server_hashes, attested.hashes, strict=False)
    for rank, (ours, theirs) in enumerate(ranks):
        for name, expected in ours.items():
            yield rank, name, expected, theirs.get(name)
