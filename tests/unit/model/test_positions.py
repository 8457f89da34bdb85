"""`model.max_positions`: one number for learner, engines, servers and exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from paths import CONFIGS, QUICKSTART

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.config import Config
from dapo_async.model import (
    ModelConfig,
    export_folder,
    load_decoder,
    special_tokens,
    with_positions,
)
from dapo_async.model.weight_files import folder_for_sglang
from dapo_async.runtime.resume import _check_same_model

BASE = CONFIGS / "base" / "quickstart"


def config_of(*overrides: str) -> Config:
    return knobs.load(QUICKSTART, [*overrides])


def made(config: Config, folder: Path) -> Path:
    return Path(with_positions(config.model.path, config.model.max_positions, folder))


def test_without_the_knob_the_model_is_used_where_it_is() -> None:
    config = config_of()
    assert with_positions(config.model.path, config.model.max_positions) == config.model.path


@pytest.mark.parametrize("positions", [40, 5000])
def test_decoder_server_and_export_have_the_positions(positions: int, tmp_path: Path) -> None:
    folder = made(config_of(f"model.max_positions={positions}"), tmp_path / "model")
    assert folder == tmp_path / "model"
    decoder, base = load_decoder(folder), load_decoder(BASE)
    assert decoder.config.max_positions == len(decoder.rope_cos) == positions
    shared = min(positions, base.config.max_positions)
    assert torch.equal(decoder.rope_cos[:shared], base.rope_cos[:shared])
    assert all(map(torch.equal, decoder.parameters(), base.parameters()))
    # What SGLang's server reads.
    served = folder_for_sglang(folder, decoder.config, scratch=tmp_path / "scratch")
    values = json.loads((served / "config.json").read_text())
    assert values["max_position_embeddings"] == positions
    weights = decoder.state_dict()
    export_folder(
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        lambda names: {name: weights[name] for name in names},
        dtype=torch.float32,
        base=folder,
        out=tmp_path / "out",
    )
    assert ModelConfig.from_folder(tmp_path / "out").max_positions == positions
    assert special_tokens(folder).stop == special_tokens(BASE).stop
    original = json.loads((BASE / "config.json").read_text())
    assert {**values, "max_position_embeddings": 0} == {**original, "max_position_embeddings": 0}


def test_the_folder_is_made_anew(tmp_path: Path) -> None:
    for positions in (40, 50):
        config = config_of(f"model.max_positions={positions}")
        path = made(config, tmp_path / "model")
        assert ModelConfig.from_folder(path).max_positions == positions
        (path / "left").touch()
    assert (path / "left").exists()
    made(config, path)
    assert not (path / "left").exists()


def test_a_model_that_is_still_on_the_hub_is_left_there() -> None:
    config = config_of("model.max_positions=100", "model.path=hub:nobody/nothing")
    assert with_positions(config.model.path, 100) == "hub:nobody/nothing"


def test_a_number_that_is_no_number_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.max_positions"):
        config_of("model.max_positions=1")


def test_a_run_is_refused_or_accepted_by_the_positions_of_the_knob(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def dry_run(*overrides: str) -> tuple[int, str]:
        long = ("rollout.max_response_tokens=3000", *overrides)
        code = main(["train", str(QUICKSTART), "--dry-run", *long])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, printed = dry_run()
    assert code == 2
    assert "lower rollout.max_response_tokens or data.max_prompt_tokens, or raise " in printed
    assert "model.max_positions" in printed
    code, printed = dry_run("model.max_positions=3100")
    assert code == 0
    assert "of at most 3000 tokens" in printed


def test_a_moved_base_model_is_compared_without_its_positions(tmp_path: Path) -> None:
    used = made(config_of("model.max_positions=40"), tmp_path / "model")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in used.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    _check_same_model(str(BASE), checkpoint, 40)
    with pytest.raises(ValueError, match=r"config\.json differs from"):
        _check_same_model(str(BASE), checkpoint, None)
