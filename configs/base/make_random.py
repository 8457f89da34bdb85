"""Makes `base/random/`: a tiny decoder with random weights and a tokenizer for any text.

It has 29 thousand weights and one token per byte of UTF-8, so it reads problems in every language.
`real_prompts.yaml` uses it to send real prompts through the whole loop.

    python configs/base/make_random.py [--seed 0] [--out configs/base/random]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "random"
EOS, EOS_ID = "<eos>", 256


def write_model(folder: Path, *, seed: int) -> None:
    """Weights as transformers draws them: matrices from N(0, 0.02²), biases 0, norms 1."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(
        vocab_size=EOS_ID + 1,
        **sizes,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )
    make: Any = AutoModelForCausalLM.from_config
    make(config).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE without a single merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {
        character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))
    } | {EOS: EOS_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_model(options.out, seed=options.seed)
    write_tokenizer(options.out)


if __name__ == "__main__":
    main()
