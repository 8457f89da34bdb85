"""Responses as text: special tokens are left out, thinking markers never."""

from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer as Core
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AddedToken, PreTrainedTokenizerFast

from dapo_async.data import Tokenizer, load_tokenizer, response_decoder

WORDS = {"a": 0, "b": 1, "<end>": 2}


def tokenizer(folder: Path, markers: tuple[str, ...], *, special: bool) -> Tokenizer:
    """A tokenizer of two words whose markers are added tokens, read back from its folder."""
    core = Core(WordLevel(WORDS, unk_token="a"))
    core.pre_tokenizer = cast(Any, WhitespaceSplit())
    wrap: Any = PreTrainedTokenizerFast
    whole = wrap(tokenizer_object=core, eos_token="<end>")
    whole.add_tokens([AddedToken(marker, special=special) for marker in markers], special)
    whole.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("pair", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_markers_stay_in_the_text_whether_or_not_they_are_special_tokens(
    tmp_path: Path, pair: tuple[str, str], special: bool
) -> None:
    words = tokenizer(tmp_path, pair, special=special)
    decode = response_decoder(words)
    (opened, closed) = (words([marker])["input_ids"][0][0] for marker in pair)
    assert decode([0, closed, 1, 2]).replace(" ", "") == f"a{pair[1]}b"
    assert decode([opened, 0, 2]).replace(" ", "") == f"{pair[0]}a"
    assert decode([closed]).strip() == pair[1]
    assert decode([0, 1, 2]) == "a b"
    assert decode([]) == ""
    if special:
        assert words.decode([0, closed, 1, 2], skip_special_tokens=True) == "a b"
