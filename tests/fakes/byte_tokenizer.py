"""Tokenizers without a model: one token per character or byte."""

from collections.abc import Callable, Sequence


class FakeTokenizer:
    """A tokenizer by a rule from text to token ids, without special tokens and chat template."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._encode(one) for one in text]}

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        strftime_now: Callable[[str], str],
    ) -> str:
        raise NotImplementedError

    @property
    def bos_token_id(self) -> int | None:
        return None

    @property
    def eos_token_id(self) -> int | None:
        return None

    def get_vocab(self) -> dict[str, int]:
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))


CHARACTERS = FakeTokenizer(lambda text: [ord(character) for character in text])
BYTES = FakeTokenizer(lambda text: list(text.encode()))
