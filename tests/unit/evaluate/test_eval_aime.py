"""AIME 2024 as DAPO evaluates it: 30 problems, 32 responses each, temperature 1, top-p 0.7.

The model is random: the test is about the path of the data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from dapo_async.cli.main import main

AIME = SHARED / "data" / "aime24" / "data.jsonl"
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "dtype": "float32",
    "bos_token_id": None,
}  # fmt: skip


def byte_model(folder: Path) -> Path:
    """A random model whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(
            vocab={letter: number for number, letter in enumerate([*letters, "<end>"])}, merges=[]
        )
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    make(Qwen3Config(**SIZES, vocab_size=257, eos_token_id=256)).save_pretrained(folder)
    return folder


@pytest.mark.skipif(
    not AIME.is_file(),
    reason="AIME 2024, shared/data/aime24 beside the checkout or in DAPO_ASYNC_SHARED, is absent",
)
def test_aime_2024_is_thirty_problems_of_thirty_two_responses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: {byte_model(tmp_path / 'model')}}}\n"
        f"data: {{train: {AIME}, heldout: {AIME}, prompt_key: problem,\n"
        "  template: 'Solve: {problem}'}\n"
        "rollout: {max_response_tokens: 4, num_slots: 256}\n"
    )
    assert (
        main(
            [
                "eval",
                str(tmp_path / "config.yaml"),
                "--data",
                str(AIME),
                "--json",
                str(tmp_path / "aime.json"),
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "aime.json").read_text())
    settings, totals, problems = result["settings"], result["totals"], result["problems"]
    assert (settings["k"], settings["temperature"], settings["top_p"]) == (32, 1.0, 0.7)
    assert (totals["problems"], totals["responses"], any(totals["left_out"].values())) == (
        30,
        960,
        False,
    )
    assert {len(problem["lengths"]) for problem in problems} == {32}
    rows = [json.loads(line) for line in AIME.read_text().splitlines()]
    assert [problem["gold"] for problem in problems] == [str(row["answer"]) for row in rows]
    assert totals["avg@32"] == {
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
    }  # four bytes hold no marker and answer
    assert "avg@32    0.000  [0.000, 0.000]" in capsys.readouterr().out
