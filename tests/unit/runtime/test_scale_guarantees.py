"""Workers that join, leave, die and lose their nodes in any order, on a real replay buffer.

Conservation of groups and the staleness bound hold after each event, and the run comes to its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from replay_world import MIXED, RIGHT, World, make_buffer

from dapo_async.runtime.scale_plan import Member, next_change

NODES = ("a", "b", "c")


class Scaled(World):
    """`next_change` decides who starts and who leaves; `wanted` is asked for."""

    def __init__(self, rng: random.Random, **options: Any) -> None:
        super().__init__(
            make_buffer(groups_per_step=4, num_steps=5, max_staleness=2, **options),
            workers=("rollout-0", "rollout-1"),
            healthy=False,  # a death may make a group late
        )
        self.rng, self.wanted = rng, 2
        self.node_of = {"rollout-0": "a", "rollout-1": "b"}
        self.starting: set[str] = set()
        self.draining: set[str] = set()
        self.going: set[str] = set()
        self.num_left = 0

    @property
    def serving(self) -> list[str]:
        return [name for name in self.engine_versions if name not in self.draining]

    def mine(self, worker: str) -> list[int]:
        return [each for each, (owner, _) in self.generating.items() if owner == worker]

    def apply(self) -> None:
        """What the fleet does once a second."""
        names = [*self.serving, *self.starting]
        members = [Member(name, name in self.serving, self.node_of.get(name)) for name in names]
        change = next_change(self.wanted, members, leaving=self.draining, going_nodes=self.going)
        self.starting |= set(change.start)
        for name in change.drain:
            if name in self.starting:
                self.starting.discard(name)
            else:
                self.draining.add(name)

    def scale(self) -> None:
        self.wanted = self.rng.randint(1, 4)
        self.apply()

    def join(self) -> None:
        """A worker proves the newest weights; no publish overlaps with that."""
        name = self.rng.choice(sorted(self.starting))
        self.starting.discard(name)
        self.node_of[name] = self.rng.choice([node for node in NODES if node not in self.going])
        self.engine_versions[name] = self.version

    def give_back(self) -> None:
        """One group of a worker that leaves: it was finished, or goes to another worker."""
        worker = self.rng.choice(sorted(self.draining))
        for group_id in self.mine(worker)[:1]:
            if self.rng.random() < 0.3:
                self.offer(group_id, accuracies=self.rng.choice((MIXED, RIGHT)))
            else:
                self.hand_back(group_id, with_partial_completions=self.rng.random() < 0.9)
        if not self.mine(worker):
            self.leave(worker)

    def leave(self, worker: str) -> None:
        self.draining.discard(worker)
        del self.engine_versions[worker]
        self.node_of.pop(worker, None)
        self.num_left += 1

    def die(self) -> None:
        """A process dies: its groups go to others, also in the midst of its drain."""
        worker = self.rng.choice([*self.engine_versions])
        self.lose_worker(worker)
        if worker in self.draining:
            self.leave(worker)
        else:
            del self.engine_versions[worker]
            self.starting.add(worker)

    def node_goes(self) -> None:
        self.going = {self.rng.choice(NODES)} if self.rng.random() < 0.7 else set()
        self.apply()

    def events(self) -> list[tuple[float, Callable[[], object]]]:
        """Those that can happen now, each with its weight."""
        events: list[tuple[float, Callable[[], object]]] = [
            (0.3, self.scale),
            (0.1, self.node_goes),
        ]
        if self.engine_versions:
            events.append((0.1, self.die))
        if self.starting and self.publishing is None:
            events.append((1.0, self.join))
        if self.draining:
            events.append((1.0, self.give_back))
        if self.serving and self.buffer.admissible():
            events.append((3.0, lambda: self.admit(self.rng.choice(self.serving))))
        if self.generating:
            group_id = self.rng.choice([*self.generating])
            events.append((2.0, lambda: self.offer(group_id, newer=self.rng.randrange(3))))
        if self.training is None and not self.done:
            events.append((1.0, self.take))
        if self.can_finish():
            events.append((1.0, self.finish_minibatch))
        if self.publishing is not None:
            events.append((1.0, self.finish_publish))
        return events


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2]))
def test_any_sequence_of_joins_drains_and_deaths_keeps_groups_and_staleness(
    seed: int, num_minibatches: int
) -> None:
    world = Scaled(random.Random(seed), num_minibatches=num_minibatches)
    for _ in range(120):
        weights, actions = zip(*world.events(), strict=True)
        world.rng.choices(actions, weights)[0]()
        world.check()
        assert world.buffer.num_generating == sum(
            len(world.mine(name)) for name in world.engine_versions
        ), "a group belongs to a worker that has left"
    if world.publishing is not None:
        world.finish_publish()
    world.wanted = 2
    world.going = set()
    world.apply()
    while world.draining:
        world.give_back()
    while world.starting:
        world.join()
    assert len(world.engine_versions) == 2
    world.drain()
    assert world.steps == 5
    assert world.buffer.counts.trained == 5 * world.buffer.groups_per_step


def test_the_world_really_scales() -> None:
    world = Scaled(random.Random(3))
    for _ in range(400):
        weights, actions = zip(*world.events(), strict=True)
        world.rng.choices(actions, weights)[0]()
    assert world.num_left > 5
