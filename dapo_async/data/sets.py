"""A data set as a config and a model want it: its prompts, or one line about what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dapo_async.config import Config, Source, parse_source, parse_sources
from dapo_async.data.presets import preset_of
from dapo_async.data.prompts import PromptSet, load_fingerprints, load_prompts
from dapo_async.data.screening import Screening
from dapo_async.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # it imports torch, which prompts do without
    from dapo_async.model import ModelConfig


def load_set(
    config: Config, source: str, tokenizer: Tokenizer, *, training: bool = False, hub: bool = True
) -> PromptSet:
    """The prompts of `data.train`, `data.heldout` or another source with the knobs of `data`; those for `training` are screened.

    Without `hub` the check for evaluation problems leaves out the sets that are there.
    """
    data = config.data
    preset, _ = preset_of(parse_source(data.train))
    return load_prompts(
        parse_source(source),
        tokenizer=tokenizer,
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        template=data.template
        or (preset.template if preset else "{problem}"),  # evaluation asks as training does
        system=data.system,
        max_prompt_tokens=data.max_prompt_tokens,
        screening=_screening(config, hub=hub) if training else Screening(),
    )


def _screening(config: Config, *, hub: bool) -> Screening:
    data = config.data
    against: dict[str, frozenset[str]] = {}
    if data.contamination != "off":
        for source in [parse_source(data.heldout), *parse_sources(data.check_against)]:
            if hub or not is_on_hub(source):
                against[source.where if source.name in against else source.name] = (
                    load_fingerprints(source, prompt_key=data.prompt_key)
                )
    return Screening(data.language, None, data.contamination, against)


def is_on_hub(source: Source) -> bool:
    """Also by the name of a preset."""
    return preset_of(source)[1].hub is not None


def usable_tokenizer(folder: Path) -> Tokenizer:
    """Raises ValueError for one that can't be loaded, whatever its library says of it."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # a broken file raises whatever the tokenizers library likes, a plain Exception among it
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the tokenizer of {folder} can't be loaded: {reason}; copy tokenizer.json and its companions of the base model"
        ) from error


def check_fit(
    found: PromptSet, model: ModelConfig, *, folder: Path, max_response_tokens: int
) -> None:
    """Raises ValueError for tokens that the model does not know and prompts that leave no room for a response. `folder`: the tokenizer's."""
    largest = max(int(prompt.token_ids.max(initial=0)) for prompt in found.prompts)
    if largest >= model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} gives token {largest} for a prompt of {found.source.where}, the model knows {model.vocab_size} tokens "
            "(vocab_size); take tokenizer and weights from one model"
        )
    longest = max(len(prompt.token_ids) for prompt in found.prompts)
    if longest + max_response_tokens > model.max_positions:
        raise ValueError(
            f"the longest prompt of {found.source.where} ({longest} tokens) and rollout.max_response_tokens ({max_response_tokens}) must not pass "
            f"the model's {model.max_positions} positions; lower rollout.max_response_tokens or data.max_prompt_tokens"
        )
