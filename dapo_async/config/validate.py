"""The rules of a config: finite numbers, bounds of single knobs, then what holds between knobs.

Part of the room config, whose door is `config.load`. Arrives: the loaded tree. Leaves: nothing, or a ValueError with rule, values and remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

from dapo_async.config.schema import Config
from dapo_async.config.sources import Source, parse_source, parse_sources

Rule = tuple[bool, str]  # whether it holds, and the line for when it does not

NUMBERS_END = 2**63  # what 64 bits hold, in torch and numpy
SMALLEST_SHARE = 1e-4  # Ray's unit of a resource
AT_LEAST = {
    "seed": 0, "data.max_prompt_tokens": 1,
    "rollout.num_workers": 1, "rollout.tensor_parallel": 1, "rollout.num_slots": 1, "rollout.max_response_tokens": 1,
    "rollout.max_restarts": 0,
    "rollout.num_cpus": 0,
    "replay.groups_per_step": 1, "replay.max_staleness": 0, "replay.max_rejected_in_a_row": 1,
    "learner.data_parallel": 1, "learner.tensor_parallel": 1,
    "learner.num_cpus": 0, "learner.lr": 0, "learner.warmup_steps": 0, "learner.weight_decay": 0,
    "learner.num_minibatches": 1, "learner.microbatch_tokens": 1,
    "evaluation.num_prompts": 0, "evaluation.every_steps": 0,
    "train.num_steps": 1, "train.checkpoint_every_steps": 1, "train.keep_checkpoints": 1,
}  # fmt: skip
TEMPLATES = ("dapo", "boxed", "chat", "chat+dapo", "chat+boxed")  # their texts: data/templates.py
POSITIVE = ("algorithm.second_moment", "learner.grad_clip")
SHARES = ("rollout.num_cpus", "learner.num_cpus")


def check(config: Config) -> None:
    """The first rule that does not hold, as a ValueError with rule, values and remedy; rules may rely on those before them."""
    bounds = _bound_rules(dict(_values(config)))
    for holds, message in chain(
        _finite_rules(config),
        bounds,
        _file_rules(config),
        _cross_rules(config),
        _engine_rules(config),
        _learner_rules(config),
        _shared_gpu_rules(config),
        _evaluation_rules(config),
    ):
        if not holds:
            raise ValueError(message)


def _values(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(tree):
        value = getattr(tree, item.name)
        if is_dataclass(value):
            yield from _values(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def _finite_rules(config: Config) -> Iterator[Rule]:
    for name, value in _values(config):
        if isinstance(value, int | float):
            yield (
                -NUMBERS_END < value < NUMBERS_END,
                f"{name} ({value}) must be a finite number, below 2^63 in size; set {name} to such a number",
            )


def _bound_rules(values: Mapping[str, Any]) -> Iterator[Rule]:
    for name, bound in AT_LEAST.items():
        yield (
            values[name] is None or values[name] >= bound,
            f"{name} ({values[name]}) must be at least {bound}; set {name}={bound} or more",
        )
    for name in POSITIVE:
        off = " or null (off)" if name == "algorithm.second_moment" else ""
        yield (
            values[name] is None or values[name] > 0,
            f"{name} ({values[name]}) must be positive; set {name}=1.0{off}",
        )
    for name in SHARES:
        yield (
            values[name] == 0 or values[name] >= SMALLEST_SHARE,
            f"{name} ({values[name]}) must be 0 or at least {SMALLEST_SHARE}, Ray's unit; set {name}=0 or a larger share",
        )
    for name, value in values.items():
        if name.startswith("deadlines."):
            yield (
                value > 0,
                f"{name} ({value}) must be positive; every wait has a deadline: set {name}=600",
            )


def _file_rules(config: Config) -> Iterator[Rule]:
    data = config.data
    for name, value in (
        ("model.path", config.model.path),
        ("data.train", data.train),
        ("data.heldout", data.heldout),
    ):
        yield bool(value), f"{name} is not set; set it in the config file or as {name}=PATH"
        yield (
            _is_there(parse_source(value)),
            f"{name} ({value}) does not exist; give an existing path",
        )
    for source in parse_sources(data.check_against):
        yield (
            _is_there(source),
            f"data.check_against ({source.where}) does not exist; give existing paths with commas between them",
        )
    yield (
        data.template is None or data.template in TEMPLATES or "{problem}" in data.template,
        (
            f"data.template ({data.template!r}) must contain {{problem}}, where the problem's text goes, or be one of {', '.join(TEMPLATES)}; "
            "set it to one of them"
        ),
    )
    yield (
        data.system is None or (data.template or "").startswith("chat"),
        f"data.system needs a chat template (data.template is {data.template!r}); set data.template=chat, or leave data.system out",
    )


def _is_there(source: Source) -> bool:
    """What is on the hub is asked for later."""
    return source.path is None or os.path.exists(source.path)


def _cross_rules(config: Config) -> Iterator[Rule]:
    rollout, replay = config.rollout, config.replay
    yield (
        replay.group_size >= 2,
        f"replay.group_size ({replay.group_size}) must be at least 2: an advantage compares siblings; set replay.group_size=8 or more",
    )
    yield (
        rollout.num_slots >= replay.group_size,
        (
            f"rollout.num_slots ({rollout.num_slots}) must be at least replay.group_size ({replay.group_size}), so that a group can run together; "
            f"set rollout.num_slots={replay.group_size} or more"
        ),
    )
    yield (
        replay.max_rejected_in_a_row >= replay.groups_per_step,
        (
            f"replay.max_rejected_in_a_row ({replay.max_rejected_in_a_row}) must be at least "
            f"replay.groups_per_step ({replay.groups_per_step}); "
            f"set replay.max_rejected_in_a_row={replay.groups_per_step} or more"
        ),
    )
    yield (
        not replay.lockstep or (replay.max_staleness == 0 and rollout.num_workers == 1),
        (
            f"replay.lockstep needs replay.max_staleness=0 and rollout.num_workers=1 (they are {replay.max_staleness} and {rollout.num_workers}): "
            "only then is the order of everything given; set both, or replay.lockstep=false"
        ),
    )
    limit = config.train.max_wall_s
    yield (
        limit is None or limit > config.deadlines.stop_s,
        (
            f"train.max_wall_s ({limit}) must be more than deadlines.stop_s ({config.deadlines.stop_s}), which is kept for an orderly end; "
            "raise it, or lower deadlines.stop_s"
        ),
    )
    uri = config.tracking.mlflow
    yield (
        uri in (None, "local") or "://" in str(uri) or str(uri).startswith("databricks"),
        f"tracking.mlflow ({uri!r}) must be local, a tracking URI such as http://HOST:5000 or sqlite:///FILE, or null; set it to one of them",
    )
    yield (
        rollout.temperature > 0,
        f"rollout.temperature ({rollout.temperature}) must be positive: greedy rollouts have no behaviour logprobs; set it to 1.0",
    )
    cache = config.reward.overlong_cache_tokens
    yield (
        cache is None or 0 < cache <= rollout.max_response_tokens,
        (
            f"reward.overlong_cache_tokens ({cache}) must lie in 1..rollout.max_response_tokens ({rollout.max_response_tokens}); lower it"
        ),
    )


def _engine_rules(config: Config) -> Iterator[Rule]:
    rollout = config.rollout
    if rollout.engine == "torch":
        for name, off in (("tensor_parallel", 1), ("servers", ""), ("server_flags", "")):
            value = getattr(rollout, name)
            yield (
                value == off,
                f"rollout.{name} ({value}) is for SGLang engines; set rollout.engine=sglang, or leave it out",
            )
        return
    urls, words = rollout.server_urls, rollout.server_flags.split()
    own = [
        word
        for word in words
        if word.partition("=")[0] in ("--api-key", "--config", "--host", "--port")
    ]
    yield (
        not own,
        f"rollout.server_flags has {own[0] if own else ''}, which each worker sets for its own server; leave it out",
    )
    yield (
        not urls or len(set(urls)) == rollout.num_workers,
        (
            f"rollout.servers names {len(set(urls))} servers for rollout.num_workers={rollout.num_workers}: each worker needs one of its own; "
            f"set rollout.num_workers={len(set(urls))}"
        ),
    )
    yield (
        all(url.startswith(("http://", "https://")) for url in urls),
        f"rollout.servers ({rollout.servers}) must be URLs such as http://HOST:30000 with commas between them; correct it",
    )
    yield (
        not config.replay.lockstep,
        "replay.lockstep needs rollout.engine=torch: an SGLang server draws its noise by itself; set it, or replay.lockstep=false",
    )


def _learner_rules(config: Config) -> Iterator[Rule]:
    replay, learner, algorithm = config.replay, config.learner, config.algorithm
    per_step = replay.groups_per_step * replay.group_size
    yield (
        per_step % learner.num_minibatches == 0,
        (
            f"replay.groups_per_step x replay.group_size ({replay.groups_per_step} x {replay.group_size} = {per_step}) must be a multiple of "
            f"learner.num_minibatches ({learner.num_minibatches}); set learner.num_minibatches to a divisor of {per_step}"
        ),
    )
    yield (
        replay.groups_per_step >= learner.data_parallel,
        (
            f"learner.data_parallel ({learner.data_parallel}) must be at most replay.groups_per_step ({replay.groups_per_step}): each rank trains "
            "whole groups; lower it, or raise replay.groups_per_step"
        ),
    )
    yield (
        algorithm.proximal != "current" or learner.num_minibatches == 1,
        (
            f"algorithm.proximal=current needs learner.num_minibatches=1 (it is {learner.num_minibatches}): after one update pi_theta "
            "has left the start of the step; set algorithm.proximal=recompute"
        ),
    )


def _shared_gpu_rules(config: Config) -> Iterator[Rule]:
    """One rank and one engine on one GPU: what else would need a GPU of its own is refused."""
    if config.model.device != "shared_cuda":
        return
    rollout, learner = config.rollout, config.learner
    sizes = {
        "learner.data_parallel": learner.data_parallel,
        "learner.tensor_parallel": learner.tensor_parallel,
        "rollout.num_workers": rollout.num_workers,
        "rollout.tensor_parallel": rollout.tensor_parallel,
    }
    for name, size in sizes.items():
        yield (
            size == 1,
            f"model.device=shared_cuda needs {name}=1 (it is {size}): one learner rank and one "
            "engine share the GPU; set it, or model.device=cuda",
        )
    for name, value, wanted, why in (
        ("rollout.servers", rollout.servers, "", "a server elsewhere shares no GPU"),
        (
            "weights.transport",
            config.weights.transport,
            "disk",
            "NCCL refuses two processes on one GPU",
        ),
        (
            "evaluation.engine",
            config.evaluation.engine,
            "snapshot",
            "a dedicated evaluator needs a GPU of its own",
        ),
    ):
        yield (
            value == wanted,
            f"model.device=shared_cuda needs {name}={wanted} (it is {value}): {why}; "
            "set it, or model.device=cuda",
        )


def _evaluation_rules(config: Config) -> Iterator[Rule]:
    every, saved = config.evaluation.every_steps, config.train.checkpoint_every_steps
    yield (
        every % saved == 0,
        (
            f"evaluation.every_steps ({every}) must be a multiple of train.checkpoint_every_steps ({saved}), so that the best of what is evaluated "
            f"can be kept; set evaluation.every_steps={-(-every // saved) * saved} or train.checkpoint_every_steps={every}"
        ),
    )
