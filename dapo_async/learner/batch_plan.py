"""Deals the rollouts of a minibatch to passes and ranks, before a tensor is built.

In: the token counts of every rollout. Out: for each pass and data-parallel rank the rollouts of its
microbatch. Pure and deterministic. The replay actor plans each minibatch, because it sends every
rank its rollouts only. `LearnerRank` plans by itself when it gets whole groups.

All ranks run the same number of passes: FSDP exchanges parameters in each. A pass takes as long as
its largest microbatch on any rank, so the microbatches of one pass should cost the same.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import NamedTuple

from dapo_async.model.config import ModelConfig
from dapo_async.model.cost import MOST_ATTENDED, head_flops, pair_flops, token_flops
from dapo_async.types import Group, GroupFacts

# What a pass costs beside its tokens, as a share of a full microbatch: gathered weights, launches.
PASS_COST = 0.03
GOOD = 1.01  # times the even share of the cost: a finer plan is not tried
FINER = 1.5  # times as many units: a finer plan may be better
FEW_PASSES = 16  # with so many, the last one matters


@dataclass(frozen=True, slots=True)
class GroupShare:
    """The rollouts of one group that a rank trains."""

    position: int  # of the group in the minibatch
    first_row: int  # number of the group's first rollout among all rollouts of the minibatch
    siblings: tuple[int, ...]  # their places in the whole group, ascending
    rewards: tuple[float, ...]  # of the whole group: advantages compare with all siblings

    def part_of(self, group: Group) -> Group:
        """`group` with these rollouts only."""
        return replace(group, rollouts=tuple(group.rollouts[each] for each in self.siblings))


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one data-parallel rank trains of a minibatch."""

    groups: tuple[GroupShare, ...]  # ascending positions
    # Per pass the numbers of its rollouts among all rollouts of the minibatch. Empty: a filler.
    passes: tuple[tuple[int, ...], ...]
    # Time of the minibatch by the plan / its work evenly spread over the ranks; 1 is ideal.
    imbalance: float


def pair_cost(model: ModelConfig) -> float:
    """Cost of one attended pair (query, key), in units of the cost of one token.

    A token costs 2 FLOPs per weight that it uses, of the layers and the head. A pair costs 2
    products of 2 FLOPs per number of a query, in every layer.
    """
    return pair_flops(model) / (token_flops(model) + head_flops(model))


def share_minibatch(
    groups: Sequence[GroupFacts], *, num_ranks: int, max_tokens: int, pair_cost: float
) -> list[RankShare]:
    """The share of each data-parallel rank: together all rollouts, each once.

    A microbatch has at most `max_tokens` tokens, where siblings count their prompt once; a longer
    rollout gets a microbatch of its own. Microbatches of one pass cost about the same, and siblings
    share a microbatch as far as that allows.
    """
    sizes = _Sizes(groups, num_ranks=num_ranks, max_tokens=max_tokens, pair_cost=pair_cost)
    packs = sorted(_best_packs(sizes), key=lambda each: -each.cost)
    packs += [_Pack() for _ in range(-len(packs) % num_ranks)]  # all ranks run all passes
    slowest, total = sum(pack.cost for pack in packs[::num_ranks]), sum(pack.cost for pack in packs)
    first_rows = [*accumulate((len(group.response_tokens) for group in groups), initial=0)]
    shares = []
    for number in range(num_ranks):
        passes = [sorted(sizes.rows(pack)) for pack in packs[number::num_ranks]]
        siblings: dict[int, list[int]] = {}
        for group, sibling in sorted(chain.from_iterable(passes)):
            siblings.setdefault(group, []).append(sibling)
        shares.append(
            RankShare(
                tuple(
                    GroupShare(group, first_rows[group], tuple(places), groups[group].rewards)
                    for group, places in siblings.items()
                ),
                tuple(tuple(first_rows[group] + each for group, each in rows) for rows in passes),
                imbalance=slowest * num_ranks / total,
            )
        )
    return shares


def halved(share: RankShare) -> RankShare:
    """The same rollouts in twice as many passes of half as many.

    Loss and gradient do not depend on it (token-mean exactness). The second half of a pass of one
    rollout is empty: all data-parallel ranks must have the same number of passes.
    """
    passes: list[tuple[int, ...]] = []
    for rows in share.passes:
        middle = -(-len(rows) // 2)
        passes += [rows[:middle], rows[middle:]]
    return replace(share, passes=tuple(passes))


Row = tuple[int, int]  # group, sibling


class _Unit(NamedTuple):
    """Siblings that stay together, without their prompt: neighbours by length."""

    group: int
    first: int  # of the group's rollouts in ascending length
    last: int  # the one behind the unit
    tokens: int
    cost: float


class _Pack:
    """A microbatch while units are put into it."""

    __slots__ = ("attended", "cost", "groups", "tokens", "units")

    def __init__(self) -> None:
        self.units: list[_Unit] = []
        self.groups: set[int] = set()
        self.tokens = 0  # the prompt of siblings counts once
        self.attended = 0  # it counts for each of them
        self.cost = 0.0

    def has_room(self, unit: _Unit, sizes: _Sizes) -> bool:
        """An empty one has room for everything."""
        if not self.units:
            return True
        prompt = sizes.prompts[unit.group]
        tokens = unit.tokens + (prompt if unit.group not in self.groups else 0)
        attended = unit.tokens + prompt * (unit.last - unit.first)
        return (
            self.tokens + tokens <= sizes.max_tokens
            and self.attended + attended <= sizes.most_attended
        )

    def add(self, unit: _Unit, sizes: _Sizes) -> None:
        prompt = sizes.prompts[unit.group]
        if unit.group not in self.groups:
            self.groups.add(unit.group)
            self.tokens += prompt
            self.cost += sizes.prompt_costs[unit.group]
        self.units.append(unit)
        self.tokens += unit.tokens
        self.attended += unit.tokens + prompt * (unit.last - unit.first)
        self.cost += unit.cost


class _Sizes:
    """Tokens and costs of a minibatch."""

    def __init__(
        self, groups: Sequence[GroupFacts], *, num_ranks: int, max_tokens: int, pair_cost: float
    ) -> None:
        self.num_ranks, self.max_tokens = num_ranks, max_tokens
        self.most_attended = MOST_ATTENDED * max_tokens
        self.prompts = [group.prompt_tokens for group in groups]
        self.prompt_costs = [count * (1 + pair_cost * count / 2) for count in self.prompts]
        # The last token of a response predicts nothing: no pass computes it.
        own = [[count - 1 for count in group.response_tokens] for group in groups]
        self._by_length = [sorted(range(len(each)), key=each.__getitem__) for each in own]
        ascending = [sorted(each) for each in own]
        # Per group sums over its first rollouts by length: of tokens, attended tokens and costs.
        self._tokens = [[*accumulate(each, initial=0)] for each in ascending]
        self._attended = [
            [*accumulate((prompt + count for count in each), initial=0)]
            for prompt, each in zip(self.prompts, ascending, strict=True)
        ]
        self._costs = [
            [
                *accumulate(
                    (count * (1 + pair_cost * (prompt + count / 2)) for count in each), initial=0.0
                )
            ]
            for prompt, each in zip(self.prompts, ascending, strict=True)
        ]
        self.num_rows = sum(map(len, own))
        self.tokens = sum(self.prompts) + sum(each[-1] for each in self._tokens)
        self.cost = sum(self.prompt_costs) + sum(each[-1] for each in self._costs)

    def units(self, most: int) -> list[_Unit]:
        """Neighbours by length in units of at most `most` tokens with their prompt, or one rollout.

        From the most to the least cost.
        """
        units = []
        sums = zip(self._tokens, self._attended, self._costs, strict=True)
        for group, (tokens, attended, costs) in enumerate(sums):
            room, first = most - self.prompts[group], 0
            while first < len(tokens) - 1:
                last = min(  # behind the unit
                    bisect.bisect_right(tokens, tokens[first] + room, lo=first),
                    bisect.bisect_right(attended, attended[first] + self.most_attended, lo=first),
                )
                last = max(last - 1, first + 1)
                units.append(
                    _Unit(
                        group,
                        first,
                        last,
                        tokens[last] - tokens[first],
                        costs[last] - costs[first],
                    )
                )
                first = last
        return sorted(units, key=self.unit_cost, reverse=True)

    def rows(self, pack: _Pack) -> Iterator[Row]:
        """The rollouts of a microbatch."""
        for unit in pack.units:
            for sibling in self._by_length[unit.group][unit.first : unit.last]:
                yield unit.group, sibling

    def unit_cost(self, unit: _Unit) -> float:
        """With its prompt."""
        return unit.cost + self.prompt_costs[unit.group]

    def time(self, packs: Sequence[_Pack]) -> float:
        """Of all passes, if each waits for its slowest rank."""
        slowest = sorted((pack.cost for pack in packs), reverse=True)[:: self.num_ranks]
        return sum(slowest) + len(slowest) * self.pass_cost

    @property
    def pass_cost(self) -> float:
        return PASS_COST * self.max_tokens

    def lower_bound(self, num_passes: int) -> float:
        """No plan with so many passes takes less time."""
        return self.cost / self.num_ranks + num_passes * self.pass_cost

    def num_passes(self, tokens: int) -> int:
        """The fewest passes that have room for so many tokens."""
        return max(1, -(-tokens // (self.num_ranks * self.max_tokens)))


def _best_packs(sizes: _Sizes) -> list[_Pack]:
    """Tries whole groups first, then ever smaller units, until the time is near the least one."""
    good = GOOD * sizes.cost / sizes.num_ranks + sizes.num_passes(sizes.tokens) * sizes.pass_cost
    best: list[_Pack] = []
    best_time = math.inf
    for units in _ever_finer(sizes):
        for packs in _dealt(sizes, units):
            time = sizes.time(packs)
            if time < best_time:
                best, best_time = packs, time
            if time <= good:
                return best
    return best


def _ever_finer(sizes: _Sizes) -> Iterator[list[_Unit]]:
    """The minibatch in units: whole groups where they fit, …, single rollouts."""
    most, num_units = sizes.max_tokens, 0
    while num_units < sizes.num_rows:
        units = sizes.units(most)
        if len(units) * FINER > sizes.num_rows:
            units = sizes.units(0)
        if len(units) > num_units * FINER or len(units) == sizes.num_rows:
            num_units = len(units)
            yield units
        most = min(most, sizes.tokens // sizes.num_ranks) // 2


def _dealt(sizes: _Sizes, units: Sequence[_Unit]) -> Iterator[list[_Pack]]:
    """In as few passes as possible; then, where those are few, spread evenly over as many.

    Among many passes it does not matter that the last ones are not full.
    """
    packs = _fill(sizes, units)
    yield packs
    num_passes = -(-len(packs) // sizes.num_ranks)
    for more in range(2 if num_passes <= FEW_PASSES else 0):
        spread = _spread(sizes, units, _levels(sizes, units, num_passes + more))
        if spread is not None:
            yield spread


def _fill(sizes: _Sizes, units: Sequence[_Unit]) -> list[_Pack]:
    """Puts each unit into the fullest microbatch that has room for it, or into a new one."""
    packs: list[_Pack] = []
    by_room: list[tuple[int, int]] = []  # free tokens and number of each microbatch, ascending
    for unit in units:
        tokens = unit.tokens + sizes.prompts[unit.group]
        for place in range(bisect.bisect_left(by_room, (tokens, -1)), len(by_room)):
            number = by_room[place][1]
            if packs[number].has_room(unit, sizes):
                del by_room[place]
                break
        else:
            number = len(packs)
            packs.append(_Pack())
        packs[number].add(unit, sizes)
        bisect.insort(by_room, (sizes.max_tokens - packs[number].tokens, number))
    return packs


def _levels(sizes: _Sizes, units: Sequence[_Unit], num_passes: int) -> list[float]:
    """The cost that the microbatches of each pass should have.

    All passes the same, but a pass with a unit of more cost is filled up to that on all ranks.
    """
    left, levels = sum(map(sizes.unit_cost, units)), []
    for number in range(num_passes):
        largest = sizes.unit_cost(units[min(number * sizes.num_ranks, len(units) - 1)])
        even = left / (sizes.num_ranks * (num_passes - number))
        levels.append(max(even, largest))
        left = max(0.0, left - levels[-1] * sizes.num_ranks)
    return levels


def _spread(sizes: _Sizes, units: Sequence[_Unit], levels: Sequence[float]) -> list[_Pack] | None:
    """Puts each unit into the microbatch that is farthest below its level; None if none has room.

    `levels` per pass.
    """
    wanted = [level for level in levels for _ in range(sizes.num_ranks)]
    packs = [_Pack() for _ in wanted]
    emptiest = [(-level, number) for number, level in enumerate(wanted)]
    heapq.heapify(emptiest)
    for unit in units:
        full: list[tuple[float, int]] = []
        while emptiest and not packs[emptiest[0][1]].has_room(unit, sizes):
            full.append(heapq.heappop(emptiest))
        if not emptiest:
            return None
        number = emptiest[0][1]
        packs[number].add(unit, sizes)
        heapq.heapreplace(emptiest, (packs[number].cost - wanted[number], number))
        for entry in full:
            heapq.heappush(emptiest, entry)
    return packs
