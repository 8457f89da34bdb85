"""What a publish reads of the learner's copy, on the device, while the learner trains on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_learner import groups_of, rank_on
from gpu_place import Place
from torch import Tensor
from torch.distributed import HashStore

from dapo_async.model import ALONE, Decoder, Layout, Mesh, ShardCopy, checksum
from dapo_async.weights import Manifest, hashes_of_copy, send_copy
from dapo_async.weights.collective import SENDER, WeightGroup, receive
from dapo_async.weights.server_hashes import server_hashes
from dapo_async.weights.tensor_proof import ROUND

pytestmark = pytest.mark.gpu
HOST, TIMEOUT_S = "127.0.0.1", 60.0
BUCKET_BYTES = 2**20


def halves_of(decoder: Decoder, place: Place) -> dict[str, Tensor]:
    """The weights in half precision, on the host."""
    return {name: each.detach().to(place.half).cpu() for name, each in decoder.named_parameters()}


def while_training(place: Place, read: Callable[[ShardCopy], object]) -> dict[str, Tensor]:
    """Copies the weights, trains three steps and calls `read` of the copy meanwhile, in a thread of
    its own. Returns the weights that were copied, on the host."""
    decoder = place.decoder()
    decoder.activations = place.half
    rank, groups = rank_on(place, decoder), groups_of(place)
    rank.step(groups)
    expected = {
        name: each.detach().to(place.half).cpu() for name, each in decoder.named_parameters()
    }
    copy = ShardCopy.of(decoder, Layout.of(decoder, Mesh()), place.half)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read, copy)
        for _ in range(3):
            rank.step(groups)
        reading.result(TIMEOUT_S)
    trained = halves_of(decoder, place)
    assert any(not torch.equal(trained[name], each) for name, each in expected.items())
    return expected


def test_checksum_and_hashes_of_a_copy_are_those_of_the_copied_weights(place: Place) -> None:
    found: list[object] = []

    def read(copy: ShardCopy) -> None:
        found.append(copy.checksum())
        hashes: tuple[dict[str, str], ...] = ({}, {})
        for version in range(ROUND):
            some = hashes_of_copy(copy, ALONE, tensor_parallel=2, cuda=True, version=version)
            for own, new in zip(hashes, some, strict=True):
                own.update(new)
        found.append(hashes)
        found.append(copy.whole())

    copied = while_training(place, read)
    config = place.decoder().config
    sums, hashes, whole = found
    assert sums == checksum(copied)
    on_device = {name: each.to(place.device) for name, each in copied.items()}
    assert hashes == server_hashes(on_device, config, tensor_parallel=2, cuda=True)
    assert isinstance(whole, dict)
    assert whole.keys() == copied.keys()
    assert all(torch.equal(whole[name], each) for name, each in copied.items())


@pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="NCCL needs a device for each of two ranks"
)
def test_an_engine_on_another_device_gets_the_copied_weights(place: Place) -> None:
    store = HashStore()
    names = ("cuda:0", "cuda:1") if place.on_gpu else ("cpu", "cpu")

    def join(rank: int) -> WeightGroup:
        return WeightGroup(
            store,
            rank=rank,
            world_size=2,
            host=HOST,
            device=names[rank],
            timeout_s=TIMEOUT_S,
        )

    got: dict[str, Tensor] = {}

    def read(copy: ShardCopy) -> None:
        manifest = Manifest.of_copy(copy)

        def engine() -> None:
            groups = [join(1 - SENDER)]
            got.update(receive(groups, manifest, bucket_bytes=BUCKET_BYTES))
            if place.on_gpu:
                torch.cuda.synchronize(1)

        with ThreadPoolExecutor(1) as thread:
            receiving = thread.submit(engine)
            send_copy(copy, ALONE, join(SENDER), manifest, bucket_bytes=BUCKET_BYTES)
            receiving.result(TIMEOUT_S)

    copied = while_training(place, read)
    assert got.keys() == copied.keys()
    assert all(torch.equal(got[name].cpu(), each) for name, each in copied.items())
