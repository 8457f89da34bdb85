"""The order of a publish: announce, send, receive, attest, judge, release. One in flight, overlapping the learner's next step.

A receiver whose engine is lost (`lose`, or an answer of None instead of an attestation) is left out: it takes no part in a broadcast and nothing
waits for it. `restore` has it read the newest version from disk and prove it. Publishes and restores never overlap, so the learner keeps the snapshot
of the newest publish until both are done. The group of a broadcast is formed anew whenever its members change.

Called by the loop; the learner and the engines are ports (their Ray actors in a run, plain objects in tests).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from dapo_async.weights.announcement import Announcement, Attestation
from dapo_async.weights.handshake import HandshakeOutcome, HandshakeResult, check_attestation


class Source(Protocol):
    """The learner's side. Both send the snapshot that the announcement belongs to, whatever the learner trains meanwhile."""

    async def broadcast(
        self, announcement: Announcement
    ) -> str | None: ...  # why it broke off, where receivers can be lost

    async def write(self, announcement: Announcement) -> str: ...  # returns the folder of versions


class Receiver(Protocol):
    """An engine's side. Both return when the engine serves the new weights."""

    name: str

    async def receive(
        self, announcement: Announcement
    ) -> Attestation | None: ...  # None: its engine was lost over it

    async def read(self, announcement: Announcement, folder: str) -> Attestation | None: ...

    async def quarantine(
        self, on: bool
    ) -> None: ...  # on: nothing is generated there, and what was is given up

    async def confirm(
        self,
    ) -> None: ...  # its weights are proved: what they generated since the update may be offered


class HandshakeError(RuntimeError):
    """An engine served wrong weights twice; the message has both values."""


class Publisher:
    """Publishes announcements to every receiver and tells `on_served` when all of them serve a version."""

    def __init__(
        self,
        source: Source,
        receivers: Sequence[Receiver],
        *,
        transport: Literal["broadcast", "disk"],
        tolerance: float,
        deadline_s: float,
        regroup: Callable[[Sequence[str]], Awaitable[None]] | None = None,
    ) -> None:
        """`regroup` forms the group of a broadcast, of the source and the receivers named; None where there is nothing to form."""
        self._source, self._receivers, self._transport = source, receivers, transport
        self._tolerance, self._deadline_s = tolerance, deadline_s
        self._in_flight: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # of a publish, its snapshot included, or of a restore
        self._regroup = regroup
        self._members: tuple[str, ...] = ()  # receivers in the group of a broadcast
        self._lost: set[str] = set()
        self.newest: Announcement | None = None  # of the publish that was started last
        self.outcomes: Counter[str] = Counter()  # verdicts by outcome, over the run
        self._waiting_for: set[str] = (
            set()
        )  # receivers of the publish in flight that have not proved themselves
        self._written: asyncio.Task[str] | None = None  # its version on disk
        self._proved: Attestation | None = None  # the first of the newest version that was right
        self.num_served = 0  # versions that every receiver has served
        self.last_verdicts: tuple[HandshakeResult, ...] = ()
        self.last_pause_s = 0.0  # the longest standstill of an engine in the newest publish

    async def start(
        self, snapshot: Awaitable[Announcement], *, on_served: Callable[[int], Awaitable[None]]
    ) -> None:
        """Waits for the publish before this one, takes the snapshot, then lets its publish run beside the learner's next step.

        In this order: the publish before may still need the snapshot that this one replaces.
        """
        await self.finish()
        await self._turn.acquire()
        try:
            self.newest = announcement = await snapshot
        except BaseException:
            self._turn.release()
            raise
        self._in_flight = asyncio.create_task(
            self._publish_in_turn(announcement, on_served), name=f"publish {announcement.version}"
        )

    async def finish(self) -> None:
        """Waits for the publish in flight; raises what it raised."""
        if self._in_flight is not None:
            task, self._in_flight = self._in_flight, None
            await task

    @property
    def present(self) -> tuple[Receiver, ...]:
        """Those whose engine is not lost."""
        return tuple(receiver for receiver in self._receivers if receiver.name not in self._lost)

    def lose(self, receiver: Receiver) -> None:
        """Passes `receiver` over, and waits for it no longer, until `restore`. The engine that comes back is a new member of the group."""
        self._lost.add(receiver.name)
        self._members = ()
        self._waiting_for.discard(receiver.name)

    async def restore(self, receiver: Receiver) -> bool:
        """Brings a lost `receiver`, whose engine runs again, to the newest published version; False when it was lost over that. Raises like it."""
        async with self._turn:
            if self.newest is not None:
                self._waiting_for = {receiver.name}
                async with self._deadline(
                    f"return of {receiver.name} with version {self.newest.version}"
                ):
                    attested = await receiver.read(self.newest, await self._write(self.newest))
                    if (
                        attested is None
                        or await self._settle(receiver, self.newest, attested) is None
                    ):
                        return False
            self._lost.discard(receiver.name)
            return True

    @property
    def in_flight(self) -> asyncio.Task[None] | None:
        return self._in_flight

    async def publish(
        self, announcement: Announcement, *, on_served: Callable[[int], Awaitable[None]]
    ) -> None:
        """One whole publish, in its turn. Raises HandshakeError, or TimeoutError naming who waited for whom."""
        async with self._turn:
            await self._publish(announcement, on_served)

    async def _publish(
        self, announcement: Announcement, on_served: Callable[[int], Awaitable[None]]
    ) -> None:
        self.newest = announcement
        present = self.present
        self._waiting_for = {receiver.name for receiver in present}
        self._written = None
        async with self._deadline(f"publish of version {announcement.version}"):
            attestations = await self._deliver(announcement, present)
            pairs = [
                (receiver, attested)
                for receiver, attested in zip(present, attestations, strict=True)
                if attested is not None
            ]
            for receiver, attested in zip(present, attestations, strict=True):
                if attested is None:
                    self.lose(receiver)
            self.last_pause_s = max((attested.pause_s for _, attested in pairs), default=0.0)
            verdicts = await asyncio.gather(
                *(self._settle(receiver, announcement, attested) for receiver, attested in pairs)
            )
            self.last_verdicts = tuple(verdict for verdict in verdicts if verdict is not None)
            self.num_served += 1
            await on_served(announcement.version)

    async def _publish_in_turn(
        self, announcement: Announcement, on_served: Callable[[int], Awaitable[None]]
    ) -> None:
        try:
            await self._publish(announcement, on_served)
        finally:
            self._turn.release()

    @asynccontextmanager
    async def _deadline(self, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise  # somebody else's deadline, which names who waited for whom
            names = ", ".join(sorted(self._waiting_for)) or "the replay room"
            raise TimeoutError(
                f"{what}: the learner waited {self._deadline_s:g} s for {names}"
            ) from error

    async def _deliver(
        self, announcement: Announcement, receivers: Sequence[Receiver]
    ) -> list[Attestation | None]:
        """Sends the weights to `receivers`; returns the attestation of each."""
        if self._transport == "disk":
            folder = await self._write(announcement)
            return await asyncio.gather(
                *(receiver.read(announcement, folder) for receiver in receivers)
            )
        members = tuple(sorted(receiver.name for receiver in receivers))
        if not members:
            return []
        if members != self._members and self._regroup is not None:
            self._members = members  # first: whoever is lost meanwhile makes it worthless
            await self._regroup(members)
        receiving = asyncio.gather(*(receiver.receive(announcement) for receiver in receivers))
        broken, attestations = await asyncio.gather(self._source.broadcast(announcement), receiving)
        if broken is not None:
            self._members = ()
            if None not in attestations:
                raise RuntimeError(
                    f"the broadcast of version {announcement.version} broke off, though every engine took part: {broken}"
                )
        return attestations

    async def _write(self, announcement: Announcement) -> str:
        """The folder of versions; each version is written once, however many engines ask for it."""
        if self._written is None:
            self._written = asyncio.create_task(self._source.write(announcement))
        return await self._written

    async def _settle(
        self, receiver: Receiver, announcement: Announcement, attested: Attestation
    ) -> HandshakeResult | None:
        """Judges one engine; a mismatch is quarantined, reloaded from disk and judged once more. None when the engine was lost over that."""
        verdict = self._judge(announcement, attested)
        if verdict.outcome is HandshakeOutcome.MISMATCH:
            again = await self._reload(receiver, announcement, verdict)
            if again is None:
                self.lose(receiver)
                return None
            verdict = again
        await receiver.confirm()
        self._waiting_for.discard(receiver.name)
        return verdict

    def _judge(self, announcement: Announcement, attested: Attestation) -> HandshakeResult:
        """The first engine that proves a version is the one that the others are held against."""
        peer = (
            self._proved
            if self._proved is not None and self._proved.version == announcement.version
            else None
        )
        verdict = check_attestation(announcement, attested, tolerance=self._tolerance, peer=peer)
        self.outcomes[verdict.outcome] += 1
        if peer is None and verdict.outcome is not HandshakeOutcome.MISMATCH:
            self._proved = attested
        return verdict

    async def _reload(
        self, receiver: Receiver, announcement: Announcement, verdict: HandshakeResult
    ) -> HandshakeResult | None:
        """The remedy for wrong weights: nothing of that engine is kept, and the same version is read from disk, once."""
        await receiver.quarantine(True)
        attested = await receiver.read(announcement, await self._write(announcement))
        if attested is None:
            await receiver.quarantine(False)  # it is closed for being lost by now
            return None
        again = self._judge(announcement, attested)
        if again.outcome is HandshakeOutcome.MISMATCH:
            raise HandshakeError(
                f"wrong weights twice: first {verdict.detail}; after a reload from disk {again.detail}"
            )
        await receiver.quarantine(False)
        return again
