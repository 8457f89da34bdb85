"""The order of a publish: announce, send, receive, attest, compare, release the credits.

In: a snapshot of the learner. Out: every engine serves it and has proved that. One publish is in
flight at a time, beside the learner's next step. Called by the loop; the learner and the engines
are Ray actors in a run, plain objects in tests.

An engine is lost when `lose` says so, or when it answers None instead of an attestation. It takes
no part in a broadcast, and nothing waits for it. `restore` has it read the newest version from disk
and prove it. Publishes and restores never overlap, so the learner keeps the snapshot of the newest
publish until both are done. The group of a broadcast is formed again when its members change. When
an engine is lost while the group forms or sends, the other engines read this version from disk.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dapo_async.weights.announcement import Announcement, Attestation
from dapo_async.weights.handshake import HandshakeOutcome, HandshakeResult, check_attestation
from dapo_async.weights.tensor_proof import TensorProof

OnServed = Callable[[int], Awaitable[None]]


class WeightSource(Protocol):
    """The learner. All methods read the snapshot of the announcement, whatever it trains now."""

    async def checksum(self, announcement: Announcement) -> str:
        """The checksum of the weights as sent."""
        ...

    async def probe(self, announcement: Announcement) -> NDArray[np.float32]:
        """The learner's answer to the probe, by the announced weights."""
        ...

    async def server_hashes(self, announcement: Announcement) -> tuple[Mapping[str, str], ...]:
        """What SGLang servers must hash some of the weights to; empty: there are no servers."""
        ...

    async def broadcast(self, announcement: Announcement) -> str | None:
        """Returns None, or why the broadcast broke off: a receiver or the source was lost."""
        ...

    async def write(self, announcement: Announcement) -> str:
        """Writes the version to disk; returns the folder of all versions."""
        ...


class WeightReceiver(Protocol):
    """An engine. `receive` and `read` return when it serves the weights.

    `read` returns None when the engine is lost, `receive` also when the broadcast broke off.
    """

    name: str

    async def receive(self, announcement: Announcement) -> Attestation | None:
        """Takes part in the broadcast."""
        ...

    async def read(self, announcement: Announcement, folder: str) -> Attestation | None:
        """Reads the version from disk."""
        ...

    async def quarantine(self) -> None:
        """Its weights are wrong: drops its groups and generates nothing before `confirm`."""
        ...

    async def confirm(self) -> None:
        """Its weights are proved: groups that finished since the update may be offered."""
        ...


MOST_UNCHANGED = 3  # updates in a row after which an engine may answer its probe bit for bit alike
MOST_INCONCLUSIVE = 10  # handshakes in a row in which the learner's weights changed
NEARER = 0.5  # of the gap before an update: an answer that is nearer shows that something changed


class HandshakeError(RuntimeError):
    """An engine served wrong weights twice; the message has both values."""


class Publisher:
    """Publishes versions to all receivers; calls `on_served` when all of them serve a version."""

    def __init__(
        self,
        source: WeightSource,
        receivers: Sequence[WeightReceiver],
        *,
        transport: Literal["broadcast", "disk"],
        tolerance: float,
        deadline_s: float,
        regroup: Callable[[Sequence[str]], Awaitable[frozenset[str] | None]] | None = None,
    ) -> None:
        """`regroup` forms the process group of a broadcast from the source and the named receivers.
        Where that fails, because one of them was lost, it returns the receivers that were lost.

        None: there is no group to form. `tolerance` is that of the handshake's probe, in nats.
        """
        self._source, self._receivers, self._transport = source, [*receivers], transport
        self._tolerance, self._deadline_s = tolerance, deadline_s
        self._regroup = regroup
        self._in_flight: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # held by a publish, its snapshot included, or by a restore
        self._members: tuple[str, ...] = ()  # receivers in the process group of a broadcast
        self._lost: set[str] = set()
        self._num_source_losses, self._is_source_lost = 0, False
        self._limits: set[asyncio.Timeout] = set()  # of what runs now
        self._unproved: set[str] = set()  # receivers whose handshake is awaited
        self._written: asyncio.Task[str] | None = None  # the newest version on disk
        self._proved: Attestation | None = None  # the first right one of the newest version
        # By engine: the learner's checksum and the attestation of its last right handshake, and how
        # many updates since then changed no answer.
        self._before: dict[str, tuple[str | None, Attestation]] = {}
        self._num_unchanged: Counter[str] = Counter()
        self._num_inconclusive: Counter[str] = Counter()
        self._tensors = TensorProof()
        self.newest: Announcement | None = None  # of the publish that was started last
        self.outcomes: Counter[str] = Counter()  # of all handshakes of the run
        self.num_served = 0  # versions that every receiver has served
        self.last_results: tuple[HandshakeResult, ...] = ()  # handshakes of the last publish
        self.last_pause_s = 0.0  # the longest pause of an engine in the last publish
        self.last_publish_s = 0.0  # from its start until every engine served it

    @property
    def in_flight(self) -> asyncio.Task[None] | None:
        """The publish that runs beside the learner's step, None after `finish`."""
        return self._in_flight

    def uncompared(self) -> tuple[str, ...]:
        """See `TensorProof.uncompared`."""
        return self._tensors.uncompared()

    @property
    def serving(self) -> tuple[WeightReceiver, ...]:
        """The receivers that are not lost."""
        return tuple(receiver for receiver in self._receivers if receiver.name not in self._lost)

    async def start(
        self,
        snapshot: Awaitable[Announcement],
        *,
        on_served: OnServed,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Waits for the last publish, takes the snapshot and starts to publish it.

        `before` is awaited in between: the snapshot is the newest one, and nothing is sent yet.
        The last publish comes first, because it may need the snapshot that this one replaces.
        """
        await self.finish()
        await self._turn.acquire()
        try:
            self.newest = announcement = await snapshot
            if before is not None:
                await before()
        except BaseException:
            self._turn.release()
            raise
        self._in_flight = asyncio.create_task(
            self._publish_and_release_turn(announcement, on_served),
            name=f"publish {announcement.version}",
        )
        # A run that ends does not wait for it: without this asyncio prints its failure.
        self._in_flight.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def finish(self) -> None:
        """Waits for the publish in flight; raises what it raised."""
        if self._in_flight is not None:
            task, self._in_flight = self._in_flight, None
            await task

    async def publish(self, announcement: Announcement, *, on_served: OnServed) -> None:
        """One whole publish.

        Raises HandshakeError, or TimeoutError that names the receivers that were not ready.
        """
        await self._turn.acquire()
        await self._publish_and_release_turn(announcement, on_served)

    def lose(self, receiver: WeightReceiver) -> None:
        """Leaves `receiver` out until `restore`; its engine will be a new member of the group."""
        self._lost.add(receiver.name)
        self._members = ()
        self._unproved.discard(receiver.name)

    def add(self, receiver: WeightReceiver) -> None:
        """A new engine, which is left out until `restore`."""
        self._receivers.append(receiver)
        self.lose(receiver)

    async def leave(self, receiver: WeightReceiver) -> None:
        """`receiver` gets no weights any more, after the publish in flight."""
        async with self._turn:
            self.drop(receiver)

    def drop(self, receiver: WeightReceiver) -> None:
        """As `leave`, at once: its process is gone."""
        self.lose(receiver)
        if receiver in self._receivers:
            self._receivers.remove(receiver)
            self._lost.discard(receiver.name)

    def lose_source(self) -> None:
        """The learner is being restarted. Its calls wait for that; its process group is gone. The
        deadlines of a publish and of a restore wait, too."""
        self._members = ()
        self._num_source_losses += 1
        self._is_source_lost = True
        for limit in self._limits:
            limit.reschedule(None)

    def source_is_back(self) -> None:
        """The learner works again: the deadlines start anew."""
        self._is_source_lost = False
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time() + self._deadline_s)

    async def restore(self, receiver: WeightReceiver) -> bool:
        """Brings a lost `receiver`, whose engine runs again, to the newest version.

        Returns False when it was lost again meanwhile. Raises as `publish` does.
        """
        async with self._turn:
            newest = self.newest
            if newest is not None:
                self._unproved = {receiver.name}
                async with self._deadline(
                    f"return of {receiver.name} with version {newest.version}"
                ):
                    attested = await receiver.read(newest, await self._write(newest))
                    if attested is None:
                        return False
                    if await self._shake_hands(receiver, newest, attested) is None:
                        return False
            self._lost.discard(receiver.name)
            return True

    async def _publish_and_release_turn(
        self, announcement: Announcement, on_served: OnServed
    ) -> None:
        try:
            await self._publish(announcement, on_served)
        finally:
            self._turn.release()

    async def _publish(self, announcement: Announcement, on_served: OnServed) -> None:
        self.newest, self._written = announcement, None
        receivers = self.serving
        self._unproved = {receiver.name for receiver in receivers}
        began_s = time.monotonic()
        async with self._deadline(f"publish of version {announcement.version}"):
            # The loop waits for none of these: the learner computes them beside its next step, and
            # the answer to the probe before it.
            attestations, checksum, answer, hashes = await asyncio.gather(
                self._deliver(announcement, receivers),
                self._source.checksum(announcement),
                self._source.probe(announcement),
                self._source.server_hashes(announcement),
            )
            self.newest = announcement = replace(
                announcement, checksum=checksum, probe_logprobs=answer, server_hashes=hashes
            )
            self._tensors.note(announcement, filter(None, attestations))
            pauses, handshakes = [], []
            for receiver, attested in zip(receivers, attestations, strict=True):
                if attested is None:
                    self.lose(receiver)
                else:
                    pauses.append(attested.pause_s)
                    handshakes.append(self._shake_hands(receiver, announcement, attested))
            self.last_pause_s = max(pauses, default=0.0)
            results = await asyncio.gather(*handshakes)
            self.last_results = tuple(result for result in results if result is not None)
            self.num_served += 1
            await on_served(announcement.version)
            self.last_publish_s = time.monotonic() - began_s

    @asynccontextmanager
    async def _deadline(self, what: str) -> AsyncIterator[None]:
        try:
            first_s = None if self._is_source_lost else self._deadline_s
            async with asyncio.timeout(first_s) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError as error:
            if not limit.expired():
                raise  # another deadline, which has its own message
            names = ", ".join(sorted(self._unproved)) or "the replay buffer"
            raise TimeoutError(
                f"{what}: the learner waited {self._deadline_s:g} s for {names}"
            ) from error

    async def _deliver(
        self, announcement: Announcement, receivers: Sequence[WeightReceiver]
    ) -> list[Attestation | None]:
        """Sends the weights to `receivers`; returns the attestation of each."""
        if self._transport == "disk":
            return await self._deliver_by_disk(announcement, receivers)
        members = tuple(sorted(receiver.name for receiver in receivers))
        if not members:
            return []
        if members != self._members and self._regroup is not None:
            self._members = members  # before the await: `lose` during it must clear this
            absent = await self._regroup(members)
            if absent is not None:
                self._members = ()
                return await self._deliver_by_disk(announcement, receivers, absent=absent)
        source_losses = self._num_source_losses
        receiving = asyncio.gather(*(receiver.receive(announcement) for receiver in receivers))
        failure, attestations = await asyncio.gather(
            self._source.broadcast(announcement), receiving
        )
        if failure is None and None not in attestations:
            return attestations
        self._members = ()
        attestations = await self._complete_by_disk(announcement, receivers, attestations)
        is_explained = None in attestations or self._num_source_losses > source_losses
        if failure is not None and not is_explained:
            raise RuntimeError(
                f"the broadcast of version {announcement.version} broke off, though neither an "
                f"engine nor the learner was lost: {failure}"
            )
        return attestations

    async def _complete_by_disk(
        self,
        announcement: Announcement,
        receivers: Sequence[WeightReceiver],
        attestations: Sequence[Attestation | None],
    ) -> list[Attestation | None]:
        """After a broadcast that broke off: the engines that it did not reach read from disk. None:
        the engine is lost."""
        folder = await self._write(announcement)

        async def read(receiver: WeightReceiver, done: Attestation | None) -> Attestation | None:
            if done is not None or receiver.name in self._lost:
                return done  # a lost one may run again already; `restore` waits for this publish
            return await receiver.read(announcement, folder)

        return await asyncio.gather(*map(read, receivers, attestations))

    async def _deliver_by_disk(
        self,
        announcement: Announcement,
        receivers: Sequence[WeightReceiver],
        *,
        absent: frozenset[str] = frozenset(),
    ) -> list[Attestation | None]:
        """As `_deliver`. The receivers named in `absent` are lost."""
        folder = await self._write(announcement)

        async def read(receiver: WeightReceiver) -> Attestation | None:
            if receiver.name in absent:
                return None
            return await receiver.read(announcement, folder)

        return await asyncio.gather(*map(read, receivers))

    async def _write(self, announcement: Announcement) -> str:
        """The folder of versions; a version is written once, however many engines need it."""
        if self._written is None or _has_failed(self._written):
            self._written = asyncio.create_task(self._source.write(announcement))
        return await asyncio.shield(self._written)

    async def _shake_hands(
        self, receiver: WeightReceiver, announcement: Announcement, attested: Attestation
    ) -> HandshakeResult | None:
        """The handshake of one engine, with one reload after a mismatch; None: it was lost."""
        result = self._check(announcement, attested)
        if result.outcome is HandshakeOutcome.MISMATCH:
            reloaded = await self._reload(receiver, announcement, result)
            if reloaded is None:
                self.lose(receiver)
                return None
            result = reloaded
        await receiver.confirm()
        self._unproved.discard(receiver.name)
        return result

    def _check(self, announcement: Announcement, attested: Attestation) -> HandshakeResult:
        """Also compares with the first engine that proved this version, and with the engine's own
        last handshake."""
        first = self._proved
        peer = first if first is not None and first.version == announcement.version else None
        _, before = self._before.get(attested.engine, (None, None))
        result = check_attestation(
            announcement, attested, tolerance=self._tolerance, peer=peer, before=before
        )
        if result.outcome is not HandshakeOutcome.MISMATCH:
            wrong = (
                self._stale(announcement, attested)
                or self._tensors.wrong(announcement, attested)
                or self._undecided(announcement, attested, result)
            )
            if wrong is not None:
                result = replace(result, outcome=HandshakeOutcome.MISMATCH, detail=wrong)
        self.outcomes[result.outcome] += 1
        if result.outcome is not HandshakeOutcome.MISMATCH:
            self._before[attested.engine] = announcement.checksum, attested
            # One with a checksum, if there is any: a server may refuse that call once.
            if peer is None or peer.own_checksum is None:
                self._proved = attested
        return result

    def _stale(self, announcement: Announcement, attested: Attestation) -> str | None:
        """Why the engine still serves the weights before, although its probe is near enough.

        The learner's weights have changed, so the engine's own checksum must change. Without one,
        its answers to the probe must: bit for bit equal ones in several updates are no accident.
        """
        engine = attested.engine
        if engine not in self._before:
            return None
        checksum, before = self._before[engine]
        if checksum == announcement.checksum:  # the learner skipped a step
            return None
        version = f"version {announcement.version}"
        if attested.own_checksum is not None:
            if attested.own_checksum != before.own_checksum:
                return None
            return f"{engine} has the same checksum of its weights before and after {version}"
        if not np.array_equal(attested.probe_before, attested.probe_after):
            self._num_unchanged[engine] = 0
            return None
        self._num_unchanged[engine] += 1
        count = self._num_unchanged[engine]
        if count < MOST_UNCHANGED:
            return None
        return (
            f"{engine} answers its probe bit for bit alike before and after {version}, for the "
            f"{count}th update in a row in which the learner's weights changed"
        )

    def _undecided(
        self, announcement: Announcement, attested: Attestation, result: HandshakeResult
    ) -> str | None:
        """Why an engine is not trusted any more that no handshake could prove, several times.

        Answers that came much nearer to the learner's with the update are no proof, but they end
        the row.
        """
        engine = attested.engine
        checksum, _ = self._before.get(engine, (None, attested))
        gap_before = float(np.abs(attested.probe_before - announcement.probe_logprobs).max())
        nearer = result.probe_gap < NEARER * gap_before
        if result.outcome is not HandshakeOutcome.INCONCLUSIVE or nearer:
            self._num_inconclusive[engine] = 0
        elif checksum is not None and checksum != announcement.checksum:
            self._num_inconclusive[engine] += 1
        count = self._num_inconclusive[engine]
        if count < MOST_INCONCLUSIVE:
            return None
        return (
            f"the handshake of {engine} was inconclusive {count} times in a row although the "
            "learner's weights changed: it sends no checksum, and no update brought its answers to "
            "the probe nearer to the learner's; use an SGLang server whose /weights_checker works, "
            "such as 0.5.21"
        )

    async def _reload(
        self, receiver: WeightReceiver, announcement: Announcement, mismatch: HandshakeResult
    ) -> HandshakeResult | None:
        """After a mismatch: quarantines the engine, which reads the version from disk, once.

        Raises HandshakeError after a second mismatch. None: the engine was lost.
        """
        await receiver.quarantine()
        attested = await receiver.read(announcement, await self._write(announcement))
        if attested is None:
            return None
        result = self._check(announcement, attested)
        if result.outcome is HandshakeOutcome.MISMATCH:
            raise HandshakeError(
                f"wrong weights twice: first {mismatch.detail}; after a reload from disk "
                f"{result.detail}"
            )
        return result


def _has_failed(task: asyncio.Task[str]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
