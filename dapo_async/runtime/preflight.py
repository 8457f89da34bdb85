"""What a run reads, checked in the driver before anything is written or started.

Model folder, data files, lengths, options of the loss; CPUs and GPUs of this machine. Called by `cli.py` for every `train`, dry runs included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dapo_async.config import Config, parse_source, parse_sources
from dapo_async.data import PromptSet, check_fit, is_on_hub, load_set, preset_of, usable_tokenizer
from dapo_async.learner import loss_options
from dapo_async.model import ModelConfig, check_weights
from dapo_async.replay import custom_filter
from dapo_async.reward import choose_verifiers, named_sources
from dapo_async.rollout.sglang.server import missing_sglang
from dapo_async.runtime.cluster.planned_actors import planned_actors


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


def check_inputs(config: Config, *, dry_run: bool = False) -> Inputs:
    """Raises ValueError with rule, values and remedy for whatever the user has to change first.

    A `dry_run` downloads nothing, and what this machine lacks is a note: a cluster's run can be looked at on a laptop.
    """
    rollout = config.rollout
    if "://***@" in (config.tracking.mlflow or ""):
        raise ValueError(
            f"tracking.mlflow ({config.tracking.mlflow}) lacks its password, which is never written down; give tracking.mlflow=URI again, or leave "
            "it out of the URI and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    loss_options(config.algorithm)  # raises for options that the loss does not support
    choose_verifiers(config.reward.verifier)
    if config.replay.filter is not None:
        custom_filter(config.replay.filter)
    notes = []
    for lack in _lacks(config):
        if not dry_run:
            raise ValueError(lack)
        notes.append(f"could not start on this machine: {lack}")
    sources = [
        parse_source(text) for text in (config.data.train, config.data.heldout)
    ] + parse_sources(config.data.check_against)
    away = [source for source in sources if is_on_hub(source) and dry_run]
    notes += [
        f"would load the data set {preset_of(source)[1].where} from the Hugging Face hub"
        for source in away
    ]
    if (source := parse_source(config.model.path)).hub is not None:
        return Inputs(
            None,
            None,
            (
                *notes,
                f"would download the model {source.where} (safetensors, config and tokenizer), and check it then",
            ),
        )
    folder = Path(config.model.path)
    model = ModelConfig.from_folder(folder)
    check_weights(folder, model)
    model.check_split(config.learner.tensor_parallel)
    if not model.eos_token_ids:
        raise ValueError(
            f"model {config.model.path} has no eos_token_id in its config.json; a response could never stop: add it"
        )
    tokenizer, found = usable_tokenizer(folder), []
    for text, training in ((config.data.train, True), (config.data.heldout, False)):
        loaded = (
            None
            if parse_source(text) in away
            else load_set(config, text, tokenizer, training=training, hub=not dry_run)
        )
        if loaded:
            check_fit(loaded, model, folder=folder, max_response_tokens=rollout.max_response_tokens)
        found.append(loaded)
    train, heldout = found
    _check_sources(config, [prompts for prompts in found if prompts], complete=None not in found)
    return Inputs(train, heldout, tuple(notes))


def _check_sources(config: Config, sets: Sequence[PromptSet], *, complete: bool) -> None:
    """Raises ValueError for a source in `reward.verifier` that no row has; not if some rows are still on the hub."""
    sources = {prompt.source for prompts in sets for prompt in prompts.prompts}
    unknown = [source for source in named_sources(config.reward.verifier) if source not in sources]
    if unknown and complete:
        raise ValueError(
            f"reward.verifier names the source {unknown[0]}, which no row has in its column data_source; the rows have "
            f"{', '.join(sorted(filter(None, sources))) or 'no such column'}: correct the name"
        )


def _lacks(config: Config) -> Iterator[str]:
    """What would keep the run from starting here, each with its remedy. An own Ray has what it is told to have: only here is that compared."""
    rollout = config.rollout
    if rollout.engine == "sglang" and not rollout.server_urls and (lack := missing_sglang()):
        yield lack
    if config.ray.address != "local":
        return
    actors = list(planned_actors(config))
    devices = torch.cuda.device_count()
    if (wanted := sum(actor.num_gpus for actor in actors)) > devices:
        shares = ", ".join(f"{actor.name} {actor.num_gpus:g}" for actor in actors)
        yield (
            f"the run reserves {wanted:g} GPUs ({shares}), this machine has {devices} CUDA devices; "
            "set model.device=cpu, or model.device=shared_cuda for one GPU, or ray.address to a cluster that has them"
        )
