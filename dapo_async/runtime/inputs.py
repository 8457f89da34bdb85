"""What a run reads, checked in the driver before anything is written or started: model folder, data files, lengths, options of the loss."""

from __future__ import annotations

from pathlib import Path

from dapo_async.algorithm import check_loss_options
from dapo_async.config import Config
from dapo_async.data import PromptSet, Tokenizer, load_prompts, load_tokenizer
from dapo_async.model import ModelConfig
from dapo_async.reward import get_verifier


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


def check_inputs(config: Config) -> None:
    """Raises ValueError with rule, values and remedy for whatever the user has to change first."""
    algorithm, rollout = config.algorithm, config.rollout
    check_loss_options(
        algorithm.objective,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        correction=algorithm.correction,
        correction_level=algorithm.correction_level,
        correction_cap=algorithm.correction_cap,
        correction_floor=algorithm.correction_floor,
    )
    get_verifier(config.reward.verifier)
    model = ModelConfig.from_folder(Path(config.model.path))
    if not model.eos_token_ids:
        raise ValueError(f"model {config.model.path} has no eos_token_id in its config.json; a response could never stop: add it")
    tokenizer = load_tokenizer(Path(config.model.path))
    for file in (config.data.train, config.data.heldout):
        longest = max(len(prompt.token_ids) for prompt in load_set(config, file, tokenizer).prompts)
        if longest + rollout.max_response_tokens > model.max_positions:
            raise ValueError(
                f"the longest prompt of {file} ({longest} tokens) and rollout.max_response_tokens ({rollout.max_response_tokens}) must not pass "
                f"the model's {model.max_positions} positions; lower rollout.max_response_tokens or data.max_prompt_tokens"
            )
