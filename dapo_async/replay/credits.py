"""The staleness bound: credits limit how many groups are out; a take must keep every deadline.

Called by the buffer. With n groups per step and a bound of S versions there are (S + 1)·n credits.
A group that starts when every engine serves at least version s has no token older than s, so its
deadline is s + S: the last learner version that may take it.

**Why a healthy run evicts nothing.** Let the learner be before the take at version t ≥ s. The
batches that make versions s + 1 … t are not served yet, so they hold (t − s)·n credits, and at most
(S + 1 − (t − s))·n groups are outstanding (generating or finished, not taken). The takes at
t … s + S have room for as many. So at the last admission with deadline d, and until the next take,
at most (d − t + 1)·n outstanding groups have a deadline of d or earlier. A take at t is allowed
only if it leaves at most (d − t)·n of them, which is the same statement for t + 1. Hence it holds
for every d at every later version, and for d = t − 1 it says that no deadline is missed. Groups
that end early, and engines that are ahead of the version that all serve, only lower these counts.

**Why a take never blocks for good.** When nothing generates any more and n groups are finished, the
n earliest deadlines leave max(0, N(d) − n) ≤ (d − t)·n for every d, where N(d) counts the
outstanding groups with a deadline of d or earlier: the take is allowed. When fewer than n are
finished, publishing ends and its credits return; then at most n − 1 of at least n credits are held,
and admission goes on. At S = 0, n groups start at version t and are the batch at t.

**Minibatches.** A step of several minibatches takes its n groups in as many takes at one version t.
After c of them are taken, version t has room for n − c more; both statements hold with that room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Credits:
    """`total` rights to have a group out; each is held by one group id."""

    def __init__(self, total: int) -> None:
        assert total > 0, total
        self.total = total
        self._holders: set[int] = set()

    @property
    def free(self) -> int:
        return self.total - len(self._holders)

    @property
    def held(self) -> int:
        return len(self._holders)

    def spend(self, group_id: int) -> None:
        assert self.free > 0, f"group {group_id}: all {self.total} credits are held"
        assert group_id not in self._holders, f"group {group_id} holds a credit already"
        self._holders.add(group_id)

    def give_back(self, group_id: int) -> None:
        assert group_id in self._holders, f"group {group_id} holds no credit"
        self._holders.remove(group_id)


class Outstanding(NamedTuple):
    """A group that is generating or finished and not yet taken.

    Sorts in the order of takes: earliest deadline first, then earliest admission.
    """

    deadline: int  # last learner version that may take it
    group_id: int
    generating: bool


def first_overload(
    deadlines: Mapping[int, int], *, next_version: int, groups_per_step: int, taken: int = 0
) -> int | None:
    """The earliest deadline d that takes of n groups at `next_version`, `next_version` + 1, … lose.

    `deadlines`: number of groups by deadline. `taken`: groups that were taken at `next_version`
    already. None when all can be kept. These are unit jobs on one machine of capacity n per
    version: earliest deadline first keeps all iff for every d ≥ next_version at most
    (d − next_version + 1)·n − taken deadlines are ≤ d (Jackson 1955).
    """
    count = 0
    for deadline in sorted(deadlines):
        count += deadlines[deadline]
        if count > _capacity(deadline, next_version, groups_per_step, taken):
            return deadline
    return None


class DeadlineCounts:
    """Deadlines of the outstanding groups, counted, so that no take looks at single groups.

    There are about `max_staleness` + 1 different deadlines, however many groups are out.
    """

    def __init__(self) -> None:
        self.outstanding: Counter[int] = Counter()  # generating or finished groups by deadline
        self.finished: Counter[int] = Counter()  # finished groups by deadline

    def start(self, deadline: int) -> None:
        """A group starts to generate."""
        self.outstanding[deadline] += 1

    def stop(self, deadline: int) -> None:
        """A generating group ends or is to be admitted again."""
        _decrement(self.outstanding, deadline)

    def keep(self, deadline: int) -> None:
        """A group is finished and accepted."""
        self.outstanding[deadline] += 1
        self.finished[deadline] += 1

    def give(self, deadline: int) -> None:
        """A finished group is taken or evicted."""
        _decrement(self.outstanding, deadline)
        _decrement(self.finished, deadline)

    def clear(self) -> None:
        self.outstanding.clear()
        self.finished.clear()

    def after_take(self, num_groups: int) -> Counter[int]:
        """The outstanding groups without the finished ones of the earliest deadlines."""
        left, rest = num_groups, self.outstanding.copy()
        for deadline in sorted(self.finished):
            taken = min(left, self.finished[deadline])
            rest[deadline] -= taken
            left -= taken
        return rest


def _decrement(counts: Counter[int], deadline: int) -> None:
    assert counts[deadline] > 0, f"no group with deadline {deadline} is counted"
    counts[deadline] -= 1
    if not counts[deadline]:
        del counts[deadline]


def doomed(
    groups: Iterable[Outstanding], *, next_version: int, groups_per_step: int, taken: int = 0
) -> tuple[int, ...]:
    """The fewest groups to give up so that all others can be taken in time.

    Empty in a healthy run. In order of deadlines, each overload gives up one group (Moore 1968,
    unit jobs). To lose the least work, a group that is still generating goes before a finished one,
    and the latest admitted first.
    """
    kept: list[Outstanding] = []
    lost: list[int] = []
    for group in sorted(groups):
        kept.append(group)
        if len(kept) > _capacity(group.deadline, next_version, groups_per_step, taken):
            victim = max(kept, key=lambda candidate: (candidate.generating, candidate.group_id))
            kept.remove(victim)
            lost.append(victim.group_id)
    return tuple(sorted(lost))


def _capacity(deadline: int, next_version: int, groups_per_step: int, taken: int) -> int:
    return max(0, (deadline - next_version + 1) * groups_per_step - taken)
