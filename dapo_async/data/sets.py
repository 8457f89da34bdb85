"""A file of problems as a config and a model want it: its prompts, or one line about what does not fit. Called before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dapo_async.config import Config
from dapo_async.data.prompts import PromptSet, load_prompts
from dapo_async.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # the model room imports torch, which whoever only reads data need not wait for
    from dapo_async.model import ModelConfig


def load_set(config: Config, file: str, tokenizer: Tokenizer) -> PromptSet:
    """The prompts of `data.train` or `data.heldout` with the knobs of `data`."""
    data = config.data
    return load_prompts(
        Path(file),
        tokenizer=tokenizer,
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
    )


def usable_tokenizer(folder: Path) -> Tokenizer:
    """Raises ValueError for one that can't be loaded, whatever its library says of it."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # a broken file raises whatever the tokenizers library likes, a plain Exception among it
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of {folder} can't be loaded: {reason}; copy tokenizer.json and its companions of the base model") from error


def check_fit(found: PromptSet, model: ModelConfig, *, folder: Path, max_response_tokens: int) -> None:
    """Raises ValueError for tokens that the model does not know and prompts that leave no room for a response. `folder`: the tokenizer's."""
    largest = max(int(prompt.token_ids.max(initial=0)) for prompt in found.prompts)
    if largest >= model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} gives token {largest} for a prompt of {found.path}, the model knows {model.vocab_size} tokens (vocab_size); "
            "take tokenizer and weights from one model"
        )
    longest = max(len(prompt.token_ids) for prompt in found.prompts)
    if longest + max_response_tokens > model.max_positions:
        raise ValueError(
            f"the longest prompt of {found.path} ({longest} tokens) and rollout.max_response_tokens ({max_response_tokens}) must not pass "
            f"the model's {model.max_positions} positions; lower rollout.max_response_tokens or data.max_prompt_tokens"
        )
