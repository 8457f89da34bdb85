"""What the learner's ranks do in a publish, beside their next step.

    copies of the shards ──deal──▶ whole units on the senders ──broadcast──▶ every engine

The senders are the ranks that share the first copy of the model (`tp` of the first `dp` and `cp`).
Each has a group of its own, and sends every n-th unit: SGLang's servers load whole tensors only, so
a sender can't send its shards. All ranks deal at the same time, unit by unit.
"""

from __future__ import annotations

import math

from dapo_async.model import Axis, ShardCopy
from dapo_async.model.expert_names import pieces
from dapo_async.weights.announcement import Manifest
from dapo_async.weights.collective import WeightGroup
from dapo_async.weights.server_hashes import RankHashes, drawn, server_hashes


def send_copy(
    copy: ShardCopy,
    axis: Axis,
    group: WeightGroup | None,
    manifest: Manifest,
    *,
    bucket_bytes: int,
) -> None:
    """Every rank of `axis` calls it; `group` is that of a sender.

    A sender whose group breaks off closes it and goes on dealing, because the others wait for that;
    it raises RuntimeError at the end.
    """
    failure: RuntimeError | None = None
    with copy.beside_the_step():
        for number, weights in copy.stream(axis, num_owners=manifest.num_senders):
            assert group is not None, f"rank {axis.rank} sends unit {number} and has no group"
            if failure is None:
                try:
                    group.send(weights, manifest.of_unit(number), bucket_bytes=bucket_bytes)
                except RuntimeError as error:
                    failure = error
                    group.close()  # or engines would wait here, and other senders for them
    if failure is not None:
        raise failure


def hashes_of_copy(
    copy: ShardCopy,
    axis: Axis,
    *,
    tensor_parallel: int,
    expert_parallel: int = 1,
    cuda: bool,
    version: int,
) -> tuple[RankHashes, ...]:
    """This rank's share of the `server_hashes` of the tensors that are `drawn` for the version;
    every rank of `axis` calls it.

    Only these tensors are brought together, each on one of the ranks.
    """
    layout, width = copy.layout, copy.flat.element_size()
    sizes, index = dict[str, int](), dict[str, int]()
    for number, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
        for piece in pieces(name, shape, layout.config):
            sizes[piece.name], index[piece.name] = math.prod(piece.shape) * width, number
    units = [
        tuple(sorted({index[part] for part in parts}))
        for parts in drawn(sizes, version=version).values()
    ]
    ranks: list[dict[str, str]] = [{} for _ in range(tensor_parallel)]
    with copy.beside_the_step():
        for _, weights in copy.stream(axis, num_owners=axis.size, units=units):
            hashed = server_hashes(
                weights,
                layout.config,
                tensor_parallel=tensor_parallel,
                expert_parallel=expert_parallel,
                cuda=cuda,
            )
            for own, found in zip(ranks, hashed, strict=True):
                own.update(found)
    return tuple(ranks)
