"""What a run reads, checked in the driver before anything is written or started.

It checks the model folder, data files, lengths, loss options, and the CPUs and GPUs of this
machine. The command `train` calls it, dry runs included.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_async.config import Config, Source, parse_contamination, parse_source
from dapo_async.data import (
    PromptSet,
    Tokenizer,
    check_fit,
    check_template,
    check_tokenizer,
    is_on_hub,
    load_set,
    preset_of,
    special_token_lines,
    usable_tokenizer,
)
from dapo_async.learner import loss_options
from dapo_async.model import ModelConfig, WeightFiles, find_weights, special_tokens
from dapo_async.replay import custom_filter
from dapo_async.reward import choose_verifiers, named_sources
from dapo_async.rollout.sglang import SERVER_KEY
from dapo_async.rollout.sglang.given_servers import server_fault
from dapo_async.runtime.cluster import limits, own_ray, ray_variables
from dapo_async.runtime.cluster.planned_actors import planned_actors
from dapo_async.tracking.run_dir import too_full
from dapo_async.utils.paths import check_path

STATE_BYTES = 12  # of a parameter in a checkpoint


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run will read. None: a dry run left it on the Hugging Face hub, as a note says."""

    train: PromptSet | None
    heldout: PromptSet | None
    notes: tuple[str, ...] = ()
    model: tuple[str, ...] = ()  # lines for a dry run about the model folder

    @property
    def fingerprint(self) -> str | None:
        """Of the training prompts: a resumed run has to find the same ones."""
        return self.train.fingerprint if self.train else None

    @property
    def heldout_fingerprint(self) -> str | None:
        """Of the held-out prompts: accuracies of one run are of the same ones."""
        return self.heldout.fingerprint if self.heldout else None


def check_inputs(config: Config, *, dry_run: bool = False) -> Inputs:
    """Raises ValueError with rule, values and remedy for whatever the user has to change first.

    A `dry_run` downloads nothing, and turns what this machine lacks into notes, so that a laptop
    can check the run of a cluster.
    """
    _check_options(config)
    limits.raise_open_files()  # the processes of an own Ray inherit it
    missing = list(_missing(config))
    if missing and not dry_run:
        raise ValueError(missing[0])
    notes = [f"could not start on this machine: {line}" for line in missing]
    notes += [
        f"would load the data set {preset_of(source)[1].where} from the Hugging Face hub"
        for source in _sources_left_on_hub(config, dry_run=dry_run)
    ]
    notes += limits.ports_notes(config)
    source = parse_source(config.model.path)
    if source.hub is not None:
        notes.append(
            f"would download the model {source.where} (safetensors, config and tokenizer), "
            "and check it then"
        )
        return Inputs(None, None, tuple(notes))
    folder = Path(config.model.path)
    model = ModelConfig.from_folder(folder)
    weights = find_weights(folder, model)
    model.check_split(config.learner.tensor_parallel)
    if config.learner.routing_replay and not model.mixture_layers:
        raise ValueError(
            f"learner.routing_replay=true needs a model with experts, and {folder} is a dense "
            f"{model.family}; set it to false"
        )
    if config.run_dir and (line := too_full(Path(config.run_dir), _checkpoint_bytes(weights))):
        if not dry_run:
            raise ValueError(line)
        notes.append(f"could not start on this machine: {line}")
    elif config.run_dir:
        size = _checkpoint_bytes(weights)
        notes += limits.space_notes(Path(config.run_dir), config, checkpoint_bytes=size)
    tokenizer = usable_tokenizer(folder)
    check_tokenizer(tokenizer, model, folder=folder)
    check_template(config, tokenizer, stop_token_ids=model.eos_token_ids)
    if not dry_run and (weights.left_alone or weights.unused):
        notes.append(f"model      {weights.summary}")
    train = _load(config, model, tokenizer, training=True, dry_run=dry_run)
    heldout = _load(config, model, tokenizer, training=False, dry_run=dry_run)
    lines = (
        f"model      {model.family}, {weights.summary}",
        *special_token_lines(special_tokens(folder), tokenizer),
    )
    if train is not None and heldout is not None:
        _check_sources(config, (train, heldout))
    return Inputs(train, heldout, tuple(notes), lines)


def _check_options(config: Config) -> None:
    """Rules whose modules know them: paths, tracking, loss, verifiers, filters."""
    data = config.data
    for name, text in (
        ("model.path", config.model.path),
        ("data.train", data.train),
        ("data.heldout", data.heldout),
        ("data.contamination", data.contamination),
    ):
        if text:
            check_path(name, text)
    if "://***@" in config.tracking.mlflow:
        raise ValueError(
            f"tracking.mlflow ({config.tracking.mlflow}) has no password, because a run "
            "never saves it; give tracking.mlflow=URI with the password again, or use a URI "
            "without it and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    loss_options(config.algorithm)  # raises for options that the loss does not support
    choose_verifiers(config.reward.verifier)
    if config.replay.filter is not None:
        custom_filter(config.replay.filter)


def _missing(config: Config) -> Iterator[str]:
    """What keeps the run from starting on this machine, each with its remedy.

    Joined clusters are checked when they are joined; an own Ray would believe any number of GPUs.
    """
    if config.rollout.engine == "sglang":
        yield from _sglang_faults(config)
    yield from _sink_faults(config)
    if (line := ray_variables.fault()) is not None:
        yield line
    if (line := limits.open_files_fault(config)) is not None:
        yield line
    if config.run_dir and (line := limits.inodes_fault(Path(config.run_dir), config)) is not None:
        yield line
    if config.ray.address != "local":
        return
    yield from own_ray.faults(config)
    actors = list(planned_actors(config))
    wanted = sum(actor.num_gpus for actor in actors)
    if wanted > (devices := _num_gpus() if wanted else 0):
        shares = ", ".join(f"{actor.name} {actor.num_gpus:g}" for actor in actors)
        yield (
            f"the run reserves {wanted:g} GPUs ({shares}), this machine has {devices} CUDA "
            "devices; set model.device=cpu, or model.placement=shared for one GPU, or "
            "ray.address to a cluster that has them"
        )


def _sink_faults(config: Config) -> Iterator[str]:
    """Sinks whose package is an extra that is not installed."""
    for name in config.tracking.names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            yield (
                f"tracking.sinks names {name}, and its package is not installed here; install it "
                f"with pip install 'dapo-async[{name}]', or leave it out of tracking.sinks"
            )


def _sglang_faults(config: Config) -> Iterator[str]:
    from dapo_async.rollout.sglang.server import missing_sglang  # imports aiohttp

    urls, evaluation = config.rollout.server_urls, config.evaluation
    has_evaluator = evaluation.during_training and evaluation.engine == "dedicated"
    if (not urls or has_evaluator) and (line := missing_sglang()):
        yield line
    architectures, key = _architectures(Path(config.model.path)), os.environ.get(SERVER_KEY, "")
    for url in urls:
        if fault := server_fault(url, api_key=key, architectures=architectures):
            yield fault


def _num_gpus() -> int:
    """The CUDA devices of this machine. Imports torch, which a run on CPUs does not need here."""
    import torch

    return torch.cuda.device_count()


def _checkpoint_bytes(weights: WeightFiles) -> int:
    """The least size of one checkpoint: float32 weights and two moments of each parameter."""
    return STATE_BYTES * sum(math.prod(stored.shape) for stored in weights.tensors.values())


def _architectures(folder: Path) -> list[str]:
    """What config.json names; empty where it can't be read, which `_check_model` reports."""
    try:
        return list(json.loads((folder / "config.json").read_text()).get("architectures") or ())
    except (OSError, ValueError, AttributeError):
        return []


def _sources_left_on_hub(config: Config, *, dry_run: bool) -> list[Source]:
    if not dry_run:
        return []
    sources = [parse_source(text) for text in (config.data.train, config.data.heldout)]
    sources += parse_contamination(config.data.contamination)[1]
    return [source for source in sources if is_on_hub(source)]


def _load(
    config: Config, model: ModelConfig, tokenizer: Tokenizer, *, training: bool, dry_run: bool
) -> PromptSet | None:
    """The training or held-out prompts, checked against the model; None: left on the hub."""
    text = config.data.train if training else config.data.heldout
    if dry_run and is_on_hub(parse_source(text)):
        return None
    folder = Path(config.model.path)
    prompts = load_set(config, text, tokenizer, training=training, hub=not dry_run)
    check_fit(prompts, model, folder=folder, max_response_tokens=config.rollout.max_response_tokens)
    return prompts


def _check_sources(config: Config, sets: Sequence[PromptSet]) -> None:
    """Raises ValueError for a source in `reward.verifier` that no row has."""
    sources = {prompt.source for prompts in sets for prompt in prompts.prompts}
    unknown = [source for source in named_sources(config.reward.verifier) if source not in sources]
    if unknown:
        known = ", ".join(sorted(filter(None, sources))) or "no such column"
        raise ValueError(
            f"reward.verifier names the source {unknown[0]}, which no row has in its column "
            f"data_source; the rows have {known}: correct the name"
        )
