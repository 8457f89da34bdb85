"""The data sets of a config: a config and a tokenizer come in, prompts that fit the model leave.

The replay actor, the check at start and evaluation call it. Errors are one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_async.config import Config, Source, parse_contamination, parse_source
from dapo_async.data.chat import check_chat_template, has_chat_template
from dapo_async.data.presets import preset_of
from dapo_async.data.prompts import PromptSet, default_template, load_fingerprints, load_prompts
from dapo_async.data.screening import Screening
from dapo_async.data.templates import Template
from dapo_async.data.tokenizer import Tokenizer, check_added_tokens

if TYPE_CHECKING:  # it imports torch, which prompts do not need
    from dapo_async.model import ModelConfig


def load_set(
    config: Config, source: str, tokenizer: Tokenizer, *, training: bool = False, hub: bool = True
) -> PromptSet:
    """The prompts of `data.train`, `data.heldout` or another source, with the knobs of `data`.

    Prompts for `training` are screened. Without `hub` the check for evaluation problems skips the
    evaluation sets that are on the hub.
    """
    data = config.data
    return load_prompts(
        parse_source(source),
        tokenizer=tokenizer,
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        template=_template(config),
        system=data.system,
        max_prompt_tokens=data.max_prompt_tokens,
        screening=_screening(config, hub=hub) if training else Screening(),
    )


def _screening(config: Config, *, hub: bool) -> Screening:
    data = config.data
    against: dict[str, frozenset[str]] = {}
    mode, others = parse_contamination(data.contamination)
    if mode != "off":
        for source in [parse_source(data.heldout), *others]:
            if hub or not is_on_hub(source):
                name = source.where if source.name in against else source.name
                against[name] = load_fingerprints(source, prompt_key=data.prompt_key)
    return Screening(contamination=mode, against=against)


def is_on_hub(source: Source) -> bool:
    """Whether a source is on the hub, also when it is the name of a preset."""
    return preset_of(source)[1].hub is not None


def check_template(config: Config, tokenizer: Tokenizer, *, stop_token_ids: Sequence[int]) -> None:
    """Tries the chat template, or the special tokens that the tokenizer adds to another template.

    Called once before a run or an evaluation starts, in its main process. Raises ValueError.
    """
    before = Template(_template(config)).before
    if before is None and config.data.template is None and not has_chat_template(tokenizer):
        return  # loading refuses it, and names the row that needs a chat template
    if before is None:
        check_chat_template(tokenizer, system=config.data.system, stop_token_ids=stop_token_ids)
    else:
        check_added_tokens(tokenizer, before)


def _template(config: Config) -> str:
    """Held-out prompts get the template of the training set."""
    data = config.data
    return data.template or default_template(
        parse_source(data.train), prompt_key=data.prompt_key, answer_key=data.answer_key
    )


def check_fit(
    found: PromptSet, model: ModelConfig, *, folder: Path, max_response_tokens: int
) -> None:
    """Raises ValueError when prompts do not fit the model.

    They have tokens that the model does not know, or leave no room for a response. `folder` is the
    tokenizer's.
    """
    largest = max(int(prompt.token_ids.max(initial=0)) for prompt in found.prompts)
    if largest >= model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} gives token {largest} for a prompt of "
            f"{found.source.where}, but vocab_size of the model is {model.vocab_size}; "
            "take tokenizer and weights from one model"
        )
    longest = max(len(prompt.token_ids) for prompt in found.prompts)
    if longest + max_response_tokens > model.max_positions:
        raise ValueError(
            f"the longest prompt of {found.source.where} ({longest} tokens) and "
            f"rollout.max_response_tokens ({max_response_tokens}) must not exceed the model's "
            f"{model.max_positions} positions; "
            "lower rollout.max_response_tokens or data.max_prompt_tokens, or raise "
            "model.max_positions"
        )
