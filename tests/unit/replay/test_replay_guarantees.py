"""The guarantees of the replay buffer under random orders of events.

These are the staleness bound, conservation, no deadlock, and no eviction in a healthy run. Code
that breaks one of them by one line fails these checks.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from journal_world import Crashing, Recorded
from replay_breakers import (
    AdmitsPastTheEnd,
    DropsARelease,
    EndsTwice,
    ForgetsAnEnding,
    ForgetsToCloseAnAdmission,
    LosesTheCreditOfARejectedGroup,
    ReleasesBeforeServing,
    SkipsAPublish,
    TakesInOrderOfCompletion,
    TakesWithoutWaitingForStragglers,
    with_ledger,
)
from replay_world import MIXED, RIGHT, WRONG, World, make_buffer, make_group, wander

from dapo_async.replay import OfferOutcome, Refusal, ReplayBuffer

WORKERS = ("worker-0", "worker-1")


class Interleavings(RuleBasedStateMachine):
    """Hypothesis chooses the next event and shrinks a failing order.

    Every example goes on to the end of its run.
    """

    kind: type[ReplayBuffer] = ReplayBuffer

    def world_of(self, buffer: ReplayBuffer) -> World:
        return World(buffer, workers=WORKERS)

    @initialize(
        groups_per_take=st.integers(1, 4),
        num_minibatches=st.integers(1, 3),
        max_staleness=st.integers(0, 3),
        num_steps=st.integers(1, 8),
    )
    def start(
        self, groups_per_take: int, num_minibatches: int, max_staleness: int, num_steps: int
    ) -> None:
        self.world = self.world_of(
            make_buffer(
                self.kind,
                groups_per_step=groups_per_take * num_minibatches,
                num_minibatches=num_minibatches,
                max_staleness=max_staleness,
                num_steps=num_steps,
            )
        )

    @precondition(lambda self: self.world.buffer.admissible())
    @rule(worker=st.sampled_from(WORKERS), burst=st.integers(1, 8))
    def admit(self, worker: str, burst: int) -> None:
        for _ in range(min(burst, self.world.buffer.admissible())):
            self.world.admit(worker)

    @precondition(lambda self: self.world.generating)
    @rule(
        pick=st.integers(0),
        burst=st.integers(1, 4),
        accuracies=st.sampled_from((MIXED, MIXED, RIGHT, WRONG)),
        newer=st.integers(0, 3),
    )
    def offer(self, pick: int, burst: int, accuracies: tuple[float, ...], newer: int) -> None:
        for _ in range(min(burst, len(self.world.generating))):
            group_ids = tuple(self.world.generating)
            self.world.offer(group_ids[pick % len(group_ids)], accuracies=accuracies, newer=newer)

    @rule(group_id=st.integers(-1, 40))
    def offer_of_an_unknown_group_is_refused(self, group_id: int) -> None:
        if group_id not in self.world.generating:
            group = make_group(group_id)
            result = self.world.buffer.offer(group, "junk")
            assert result.outcome is OfferOutcome.REFUSED
            if result.reason is Refusal.ENDED:  # it was generated, and is too late
                self.world.offered_tokens += group.num_response_tokens
                self.world.ended_tokens["evicted"] += group.num_response_tokens

    @precondition(lambda self: self.world.generating)
    @rule(pick=st.integers(0))
    def fail(self, pick: int) -> None:
        group_ids = tuple(self.world.generating)
        self.world.fail(group_ids[pick % len(group_ids)])

    @precondition(lambda self: self.world.generating)
    @rule(pick=st.integers(0), burst=st.integers(1, 8), with_partial_completions=st.booleans())
    def hand_back(self, pick: int, burst: int, with_partial_completions: bool) -> None:
        for _ in range(min(burst, len(self.world.generating))):
            group_ids = tuple(self.world.generating)
            self.world.hand_back(
                group_ids[pick % len(group_ids)], with_partial_completions=with_partial_completions
            )

    @rule(worker=st.sampled_from(WORKERS))
    def lose_worker(self, worker: str) -> None:
        self.world.lose_worker(worker)

    @precondition(lambda self: self.world.training is None and not self.world.done)
    @rule()
    def take(self) -> None:
        self.world.take()

    @precondition(lambda self: self.world.training is not None)
    @rule(finite=st.booleans())
    def finish_minibatch(self, finite: bool) -> None:
        if self.world.can_finish(finite=finite):
            self.world.finish_minibatch(finite=finite)

    @precondition(lambda self: self.world.publishing is not None)
    @rule(worker=st.sampled_from(WORKERS))
    def update_engine(self, worker: str) -> None:
        self.world.update_engine(worker)

    @precondition(lambda self: self.world.publishing is not None)
    @rule()
    def finish_publish(self) -> None:
        self.world.finish_publish()

    @rule()
    def resume(self) -> None:
        self.world.resume()

    @invariant()
    def staleness_bound_and_conservation_hold(self) -> None:
        if hasattr(self, "world"):  # invariants run before `start` too
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()
            counts = self.world.buffer.close()
            counts.check()
            assert counts.in_flight == 0
            assert (counts.evicted, counts.unused) == (0, 0) or self.world.missing
            assert (
                counts.trained + counts.skipped
                == self.world.buffer.num_steps * self.world.buffer.groups_per_step
                - self.world.missing
            )


TestInterleavings = pytest.mark.slow(Interleavings.TestCase)
TestInterleavings.settings = settings(
    max_examples=1500,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class CrashingInterleavings(Interleavings):
    """All events of a replay buffer, and the death of its process between any two of them."""

    kind = Recorded

    def world_of(self, buffer: ReplayBuffer) -> World:
        self.folder = Path(tempfile.mkdtemp())
        return Crashing(buffer, self.folder, workers=WORKERS)

    @rule()
    def crash(self) -> None:
        assert isinstance(self.world, Crashing)
        self.world.crash()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if hasattr(self, "folder"):
                assert isinstance(self.world, Crashing)
                self.world.end()
                shutil.rmtree(self.folder)


TestCrashingInterleavings = pytest.mark.slow(CrashingInterleavings.TestCase)
TestCrashingInterleavings.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def healthy_run(
    seed: int, kind: type[ReplayBuffer] = ReplayBuffer, world_kind: type[World] = World
) -> World:
    """One random run to its end; every guarantee is checked after every event."""
    rng = random.Random(seed)
    num_minibatches = rng.randint(1, 3)
    knobs = {
        "groups_per_step": rng.randint(1, 4) * num_minibatches,
        "num_minibatches": num_minibatches,
        "max_staleness": rng.randint(0, 3),
        "num_steps": rng.randint(2, 8),
    }
    world = world_kind(make_buffer(kind, **knobs), workers=WORKERS)
    unbroken = (kind, world_kind) == (ReplayBuffer, World)
    wander(world, rng, num_events=60, resumes=unbroken)  # a resume would repair some breakers
    world.drain()
    assert world.buffer.close().unused == 0 or world.missing
    return world


@pytest.mark.slow
def test_two_thousand_random_runs_keep_bound_and_conservation_and_end() -> None:
    endings = {ending for seed in range(2000) for ending in healthy_run(seed).endings}
    # Every way in which a group of a healthy run can end did occur.
    assert endings - {"evicted"} == {"trained", "skipped", "rejected", "failed"}


class LyingEngines(World):
    """Engines that sometimes attest up to three versions less than the one they served."""

    def __init__(self, buffer: ReplayBuffer, rng: random.Random) -> None:
        super().__init__(buffer, workers=WORKERS, healthy=False)
        self.rng = rng

    def admit(self, worker: str) -> None:
        super().admit(worker)
        group_id, (_, version) = self.generating.popitem()
        self.generating[group_id] = (worker, max(0, version - self.rng.choice((0, 0, 1, 3))))


def test_engines_that_attest_old_versions_only_cause_evictions() -> None:
    evicted = 0
    for seed in range(500):
        rng = random.Random(seed)
        world = LyingEngines(
            make_buffer(
                groups_per_step=rng.randint(1, 4), max_staleness=rng.randint(0, 3), num_steps=8
            ),
            rng,
        )
        wander(world, rng, num_events=80)
        world.drain()
        assert world.buffer.close().unused == 0
        evicted += world.endings["evicted"]
    assert evicted > 100


# Code that breaks a guarantee by one line.

BREAKERS: dict[str, tuple[Callable[[int], object], str]] = {
    "a dropped release": (
        lambda seed: healthy_run(seed, DropsARelease),
        "credits are held by|deadlock",
    ),
    "a lost credit": (
        lambda seed: healthy_run(seed, LosesTheCreditOfARejectedGroup),
        "credits are held by",
    ),
    "no wait for stragglers": (
        lambda seed: healthy_run(seed, TakesWithoutWaitingForStragglers),
        "evicted",
    ),
    "order of completion": (
        lambda seed: healthy_run(seed, TakesInOrderOfCompletion),
        "staleness bound broken",
    ),
    "admission past the end": (lambda seed: healthy_run(seed, AdmitsPastTheEnd), "outstanding for"),
    "a group counted twice": (
        lambda seed: healthy_run(seed, with_ledger(EndsTwice)),
        "conservation broken",
    ),
    "a group never counted": (
        lambda seed: healthy_run(seed, with_ledger(ForgetsAnEnding)),
        "conservation broken",
    ),
    "an admission never closed": (
        lambda seed: healthy_run(seed, with_ledger(ForgetsToCloseAnAdmission)),
        "conservation broken",
    ),
    "a skipped publish": (lambda seed: healthy_run(seed, world_kind=SkipsAPublish), "evicted"),
    "a release before its weights": (
        lambda seed: healthy_run(seed, world_kind=ReleasesBeforeServing),
        "is served",
    ),
}


def run_until_it_breaks(run: Callable[[int], object]) -> None:
    for seed in range(300):
        run(seed)


@pytest.mark.parametrize("name", BREAKERS)
def test_code_that_breaks_a_guarantee_by_one_line_is_noticed(name: str) -> None:
    run, message = BREAKERS[name]
    with pytest.raises(AssertionError, match=message):
        run_until_it_breaks(run)


def test_dropped_release_ends_in_a_deadlock_that_names_the_held_credits() -> None:
    class BlindToLeaks(DropsARelease):
        def check(self) -> None:
            pass

    buffer = make_buffer(BlindToLeaks, groups_per_step=2, max_staleness=1, num_steps=4)
    world = World(buffer)
    world.check = lambda: None  # type: ignore[method-assign]
    message = (
        "deadlock: take at version 2 waits: 0 of 2 groups finished"
        ".*4 credits held by trained groups"
    )
    with pytest.raises(AssertionError, match=message):
        world.drain()
