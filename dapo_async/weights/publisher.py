"""The order of a publish: announce, send, receive, attest, judge, release. One in flight, overlapping the learner's next step.

Called by the loop; the learner and the engines are ports (their Ray actors in a run, plain objects in tests).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

from dapo_async.weights.announcement import Announcement, Attestation
from dapo_async.weights.handshake import Outcome, Verdict, judge


class Source(Protocol):
    """The learner's side. Both send the snapshot that the announcement belongs to, whatever the learner trains meanwhile."""

    async def broadcast(self, announcement: Announcement) -> None: ...

    async def write(self, announcement: Announcement) -> str: ...  # returns the folder of versions


class Receiver(Protocol):
    """An engine's side. Both return when the engine serves the new weights."""

    name: str

    async def receive(self, announcement: Announcement) -> Attestation: ...

    async def read(self, announcement: Announcement, folder: str) -> Attestation: ...

    async def quarantine(self, on: bool) -> None: ...  # on: nothing is generated there, and what was is given up

    async def confirm(self) -> None: ...  # its weights are proved: what they generated since the update may be offered


class HandshakeError(RuntimeError):
    """An engine served wrong weights twice; the message has both values."""


class Publisher:
    """Publishes announcements to every receiver and tells `on_served` when all of them serve a version."""

    def __init__(
        self, source: Source, receivers: Sequence[Receiver], *, transport: Literal["broadcast", "disk"], tolerance: float, deadline_s: float
    ) -> None:
        self._source, self._receivers, self._transport = source, receivers, transport
        self._tolerance, self._deadline_s = tolerance, deadline_s
        self._in_flight: asyncio.Task[None] | None = None
        self.outcomes: Counter[str] = Counter()  # verdicts by outcome, over the run
        self._waiting_for: set[str] = set()  # receivers of the publish in flight that have not proved themselves
        self._written: asyncio.Task[str] | None = None  # its version on disk
        self.num_served = 0  # versions that every receiver has served
        self.last_verdicts: tuple[Verdict, ...] = ()
        self.last_pause_s = 0.0  # the longest standstill of an engine in the newest publish

    async def start(self, snapshot: Awaitable[Announcement], *, on_served: Callable[[int], Awaitable[None]]) -> None:
        """Waits for the publish before this one, takes the snapshot, then lets its publish run beside the learner's next step.

        In this order: the publish before may still need the snapshot that this one replaces.
        """
        await self.finish()
        announcement = await snapshot
        self._in_flight = asyncio.create_task(self.publish(announcement, on_served=on_served), name=f"publish {announcement.version}")

    async def finish(self) -> None:
        """Waits for the publish in flight; raises what it raised."""
        if self._in_flight is not None:
            task, self._in_flight = self._in_flight, None
            await task

    @property
    def in_flight(self) -> asyncio.Task[None] | None:
        return self._in_flight

    async def publish(self, announcement: Announcement, *, on_served: Callable[[int], Awaitable[None]]) -> None:
        """One whole publish. Raises HandshakeError, or TimeoutError naming who waited for whom."""
        self._waiting_for = {receiver.name for receiver in self._receivers}
        self._written = None
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                attestations = await self._deliver(announcement)
                self.last_pause_s = max(attestation.pause_s for attestation in attestations)
                pairs = zip(self._receivers, attestations, strict=True)
                self.last_verdicts = tuple(await asyncio.gather(*(self._settle(receiver, announcement, attested) for receiver, attested in pairs)))
                self.num_served += 1
                await on_served(announcement.version)
        except TimeoutError as error:
            if not limit.expired():
                raise  # somebody else's deadline, which names who waited for whom
            names = ", ".join(sorted(self._waiting_for)) or "the replay room"
            raise TimeoutError(f"publish of version {announcement.version}: the learner waited {self._deadline_s:g} s for {names}") from error

    async def _deliver(self, announcement: Announcement) -> list[Attestation]:
        if self._transport == "disk":
            folder = await self._write(announcement)
            return await asyncio.gather(*(receiver.read(announcement, folder) for receiver in self._receivers))
        receiving = asyncio.gather(*(receiver.receive(announcement) for receiver in self._receivers))
        _, attestations = await asyncio.gather(self._source.broadcast(announcement), receiving)
        return attestations

    async def _write(self, announcement: Announcement) -> str:
        """The folder of versions; each version is written once, however many engines ask for it."""
        if self._written is None:
            self._written = asyncio.create_task(self._source.write(announcement))
        return await self._written

    async def _settle(self, receiver: Receiver, announcement: Announcement, attested: Attestation) -> Verdict:
        """Judges one engine; a mismatch is quarantined, reloaded from disk and judged once more."""
        verdict = judge(announcement, attested, tolerance=self._tolerance)
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome is Outcome.MISMATCH:
            verdict = await self._reload(receiver, announcement, verdict)
        await receiver.confirm()
        self._waiting_for.discard(receiver.name)
        return verdict

    async def _reload(self, receiver: Receiver, announcement: Announcement, verdict: Verdict) -> Verdict:
        """The remedy for wrong weights: nothing of that engine is kept, and the same version is read from disk, once."""
        await receiver.quarantine(True)
        again = judge(announcement, await receiver.read(announcement, await self._write(announcement)), tolerance=self._tolerance)
        self.outcomes[again.outcome] += 1
        if again.outcome is Outcome.MISMATCH:
            raise HandshakeError(f"wrong weights twice: first {verdict.detail}; after a reload from disk {again.detail}")
        await receiver.quarantine(False)
        return again
