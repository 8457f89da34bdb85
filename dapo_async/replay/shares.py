"""Shares a batch among the data-parallel ranks.

The replay actor and the driver's handle of the learner call it.
"""

from __future__ import annotations

from collections.abc import Sequence


def share_groups(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The groups that each data-parallel rank trains, as ascending positions in the batch.

    Ranks get about equal numbers of tokens: the groups are assigned from the largest to the
    smallest, each to the rank with the fewest tokens so far (of equal ranks, the lowest). Every
    rank gets at least one group.
    """
    assert len(num_tokens) >= num_ranks, (num_tokens, num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    filled = [0] * num_ranks
    largest_first = sorted(range(len(num_tokens)), key=lambda each: (-num_tokens[each], each))
    for position in largest_first:
        rank = min(range(num_ranks), key=lambda rank: (filled[rank], rank))
        shares[rank].append(position)
        filled[rank] += num_tokens[position]
    return [sorted(share) for share in shares]
