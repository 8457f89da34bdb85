"""The text of a response: token ids come in, the text that the verifiers read leaves.

Rollout workers and evaluation call it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dapo_async.data.tokenizer import Tokenizer
from dapo_async.reward.thinking import MARKERS


def response_decoder(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """A function that decodes a response without special tokens, but with thinking markers.

    Some tokenizers have `<think>` and `</think>` as special tokens. Without them nobody could tell
    thinking from the answer.
    """
    names = {marker for pair in MARKERS for marker in pair}
    # By id; a tokenizer without added tokens may lack the attribute.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    markers = {
        number: str(token)
        for number, token in added.items()
        if token.special and str(token) in names
    }

    def decode(token_ids: Sequence[int]) -> str:
        if not markers or markers.keys().isdisjoint(token_ids):
            return tokenizer.decode(token_ids, skip_special_tokens=True)
        parts, start = [], 0
        for index, number in enumerate(token_ids):
            if number in markers:
                parts.append(tokenizer.decode(token_ids[start:index], skip_special_tokens=True))
                parts.append(markers[number])
                start = index + 1
        parts.append(tokenizer.decode(token_ids[start:], skip_special_tokens=True))
        return "".join(parts)

    return decode
