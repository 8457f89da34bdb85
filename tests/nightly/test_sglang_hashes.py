"""The hashes that a real SGLang server computes of its weights, against the learner's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sglang_world import CONFIGS, MIXTURE, PROBE, World, from_disk, start_world

from dapo_async.model import ModelConfig, read_weights
from dapo_async.rollout.sglang.client import ServerHashes
from dapo_async.weights.server_hashes import server_hashes

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]
# The name in a folder, and the server's.
STALE = ("model.layers.1.mlp.down_proj.weight",) * 2
STALE_EXPERT = (
    "model.layers.1.mlp.experts.2.down_proj.weight",
    "model.layers.1.mlp.experts.w2_weight",
)


def served_after(world: World, *folders: Path) -> list[ServerHashes]:
    """What the server says of its weights after it has loaded each folder."""

    async def load() -> list[ServerHashes]:
        hashes = []
        async with world.engine() as engine:
            client = world.client()
            for version, folder in enumerate(folders, start=1):
                await engine.update(from_disk(client, folder), version=version, probe_ids=PROBE)
                found = await client.hashes()
                assert found is not None, "reinstall SGLang: cluster/sglang_cpu/install.sh"
                hashes.append(found)
            await client.close()
        return hashes

    return asyncio.run(load())


def with_one_old_tensor(world: World, folder: Path, name: str) -> Path:
    """The other weights, with one tensor of the base."""
    weights = read_weights(world.other_folder)
    weights[name] = read_weights(world.folder)[name]
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((world.other_folder / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("family", [*CONFIGS, MIXTURE])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_hashes_every_tensor_to_what_the_learner_expects(
    family: str, ranks: int, tmp_path: Path
) -> None:
    world = start_world(family, tmp_path / "world", tensor_parallel=ranks)
    try:
        name, served_name = STALE_EXPERT if family == MIXTURE else STALE
        stale_folder = with_one_old_tensor(world, tmp_path / "stale", name)
        base, other, stale = served_after(world, world.folder, world.other_folder, stale_folder)
    finally:
        asyncio.run(world.server.close())
    assert len({base.checksum, other.checksum, stale.checksum}) == 3
    config = ModelConfig.from_folder(world.folder)
    for served, folder in ((base, world.folder), (other, world.other_folder)):
        weights = read_weights(folder)
        expected = server_hashes(weights, config, tensor_parallel=ranks, cuda=False)
        assert len(served.tensors) == ranks
        for theirs, ours in zip(served.tensors, expected, strict=True):
            assert {name: theirs[name] for name in ours} == ours
    for old, new in zip(other.tensors, stale.tensors, strict=True):
        assert [name for name in old if old[name] != new[name]] == [served_name]
    assert torch.equal(read_weights(stale_folder)[name], read_weights(world.folder)[name])
