"""What a run reads, checked in the driver before anything is written or started.

Model folder, data files, lengths, options of the loss; CPUs and GPUs of this machine. Called by `cli.py` for every `train`, dry runs included.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from dapo_async.algorithm import check_loss_options
from dapo_async.config import Config, Source, parse_source, parse_sources
from dapo_async.data import PromptSet, Screening, Tokenizer, load_fingerprints, load_prompts, load_tokenizer, preset_of
from dapo_async.model import ModelConfig, check_weights
from dapo_async.reward import get_verifier
from dapo_async.runtime.cluster import planned_actors


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run will read. None: it is on the hub, and a dry run leaves it there, as a note says."""

    train: PromptSet | None
    heldout: PromptSet | None
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str | None:
        """Of the training prompts: a resumed run has to find the same ones."""
        return self.train.fingerprint if self.train else None


def load_set(config: Config, source: str, tokenizer: Tokenizer, *, training: bool = False, hub: bool = True) -> PromptSet:
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
        template=data.template or (preset.template if preset else "{problem}"),  # evaluation asks as training does
        system=data.system,
        max_prompt_tokens=data.max_prompt_tokens,
        screening=_screening(config, hub=hub) if training else Screening(),
    )


def _screening(config: Config, *, hub: bool) -> Screening:
    data = config.data
    against: dict[str, frozenset[str]] = {}
    if data.contamination != "off":
        for source in [parse_source(data.heldout), *parse_sources(data.check_against)]:
            if hub or not _on_hub(source):
                against[source.where if source.name in against else source.name] = load_fingerprints(source, prompt_key=data.prompt_key)
    return Screening(data.language, data.deduplicate, data.contamination, against)


def _on_hub(source: Source) -> bool:
    return preset_of(source)[1].hub is not None


def check_inputs(config: Config, *, hub: bool = True) -> Inputs:
    """Raises ValueError with rule, values and remedy for whatever the user has to change first. Without `hub` (a dry run) nothing is downloaded."""
    algorithm, rollout = config.algorithm, config.rollout
    if "://***@" in (config.tracking.mlflow or ""):
        raise ValueError(
            f"tracking.mlflow ({config.tracking.mlflow}) lacks its password, which is never written down; give tracking.mlflow=URI again, or leave "
            "it out of the URI and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    check_loss_options(
        algorithm.objective,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        correction=algorithm.correction,
        correction_level=algorithm.correction_level,
        correction_cap=algorithm.correction_cap,
        correction_floor=algorithm.correction_floor,
        entropy_bonus=algorithm.entropy_bonus,
    )
    get_verifier(config.reward.verifier)
    if rollout.engine == "sglang" and not rollout.server_urls and importlib.util.find_spec("sglang") is None:
        raise ValueError(
            "rollout.engine=sglang needs SGLang, which is not installed; pip install 'dapo-async[sglang]' on a GPU machine, run "
            "cluster/sglang_cpu/install.sh on a CPU machine, or name running servers in rollout.servers"
        )
    if config.ray.address == "local":
        _check_machine(config)
    sources = [parse_source(text) for text in (config.data.train, config.data.heldout)] + parse_sources(config.data.check_against)
    notes = [f"would load the data set {preset_of(source)[1].where} from the Hugging Face hub" for source in sources if _on_hub(source) and not hub]
    if (source := parse_source(config.model.path)).hub is not None:
        return Inputs(None, None, (f"would download the model {source.where} (safetensors, config and tokenizer), and check it then", *notes))
    folder = Path(config.model.path)
    model = ModelConfig.from_folder(folder)
    check_weights(folder, model)
    model.check_split(config.learner.tensor_parallel)
    if not model.eos_token_ids:
        raise ValueError(f"model {config.model.path} has no eos_token_id in its config.json; a response could never stop: add it")
    tokenizer = _load_tokenizer(folder)
    train, heldout = (
        _checked_set(config, model, tokenizer, text, training=training, hub=hub) if hub or not _on_hub(parse_source(text)) else None
        for text, training in ((config.data.train, True), (config.data.heldout, False))
    )
    return Inputs(train, heldout, tuple(notes))


def _checked_set(config: Config, model: ModelConfig, tokenizer: Tokenizer, text: str, *, training: bool, hub: bool) -> PromptSet:
    loaded = load_set(config, text, tokenizer, training=training, hub=hub)
    largest = max(int(prompt.token_ids.max(initial=0)) for prompt in loaded.prompts)
    if largest >= model.vocab_size:
        raise ValueError(
            f"the tokenizer of {config.model.path} gives token {largest} for a prompt of {text}, the model knows {model.vocab_size} tokens "
            "(vocab_size); take tokenizer and weights from one model"
        )
    longest, response = max(len(prompt.token_ids) for prompt in loaded.prompts), config.rollout.max_response_tokens
    if longest + response > model.max_positions:
        raise ValueError(
            f"the longest prompt of {text} ({longest} tokens) and rollout.max_response_tokens ({response}) must not pass the model's "
            f"{model.max_positions} positions; lower rollout.max_response_tokens or data.max_prompt_tokens"
        )
    return loaded


def _check_machine(config: Config) -> None:
    """An own Ray has what it is told to have: only here is it compared with the machine, and with `ray.num_cpus`."""
    actors = list(planned_actors(config))
    devices, cpus = torch.cuda.device_count(), config.ray.num_cpus
    if (wanted := sum(actor.num_gpus for actor in actors)) > devices:
        shares = ", ".join(f"{actor.name} {actor.num_gpus:g}" for actor in actors)
        raise ValueError(
            f"the run reserves {wanted:g} GPUs ({shares}), this machine has {devices} CUDA devices; "
            "set learner.num_gpus=0, rollout.num_gpus=0 and evaluation.num_gpus=0, or ray.address to a cluster that has them"
        )
    if cpus is not None and (wanted := sum(actor.num_cpus for actor in actors)) > cpus:
        shares = ", ".join(f"{actor.name} {actor.num_cpus:g}" for actor in actors)
        raise ValueError(f"the run reserves {wanted:g} CPUs ({shares}), ray.num_cpus is {cpus}; raise it, or set ray.num_cpus=null")


def _load_tokenizer(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(folder)
    except Exception as error:  # a broken file raises whatever the tokenizers library likes, a plain Exception among it
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of {folder} can't be loaded: {reason}; copy tokenizer.json and its companions of the base model") from error
