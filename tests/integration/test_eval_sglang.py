"""Evaluation through real SGLang servers: a running one and a new one serve the checkpoint."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_world import NUM_SLOTS, World, request

from dapo_async.config import BaseModelConfig, Config, RolloutConfig
from dapo_async.evaluate.engines import open_engines

pytestmark = pytest.mark.sglang
PROMPT = (7, 11, 13, 17, 19, 23)


def greedy_tokens(config: Config, checkpoint: Path, log: Path) -> list[int]:
    async def generate() -> list[int]:
        async with open_engines(config, checkpoint=checkpoint, max_len=64, seed=0, log=log) as (
            engine,
        ):
            (completion,) = await engine.generate(
                request(-1, PROMPT, max_tokens=10, temperature=0.0)
            )
            return [int(token) for token in completion.token_ids]

    return asyncio.run(generate())


@pytest.mark.parametrize("world", ["qwen3"], indirect=True)
def test_running_and_new_servers_answer_with_the_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        generate: Any = world.other.generate
        ids = generate(torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False)
        generate = world.base.generate
        base = generate(torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False)
    expected = ids[0, len(PROMPT) :].tolist()
    assert expected != base[0, len(PROMPT) :].tolist()  # which the running server may serve
    monkeypatch.setenv("SGLANG_API_KEY", world.server.api_key)
    config = Config(
        model=BaseModelConfig(path=str(world.folder)),
        rollout=RolloutConfig(engine="sglang", num_slots=NUM_SLOTS, servers=world.server.url),
    )
    assert greedy_tokens(config, world.other_folder, tmp_path / "unused.log") == expected
    own = replace(config, rollout=replace(config.rollout, servers=""))
    assert greedy_tokens(own, world.other_folder, tmp_path / "own.log") == expected
    assert (tmp_path / "own.log").stat().st_size > 0
    assert not (tmp_path / "unused.log").exists()
