"""The rules of a config: bounds of single knobs, then rules between knobs.

`load` calls `check` with the loaded tree; a broken rule is a ValueError with rule, values and
remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain

from dapo_async.config.schema import SINKS, STOP_S, Config, Knob, knobs, values_of
from dapo_async.config.sources import Source, matches, parse_contamination, parse_source
from dapo_async.config.text import shown

Rule = tuple[bool, str]  # whether it holds, and the message if it does not

NUMBERS_END = 2**63  # what 64 bits hold, in torch and numpy
SMALLEST_SHARE = 1e-4  # Ray's unit of a resource
TEMPLATES = ("dapo", "boxed", "chat", "chat+dapo", "chat+boxed")  # their texts: data/templates.py
NODE_RESOURCE = re.compile(r"[A-Za-z0-9_][\w./-]*")
INTERFACE = re.compile(r"[^\s,/]{1,15}")  # as Linux has them
PORTS = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
LOWEST_PORT, HIGHEST_PORT = 1024, 65_535  # lower ones need rights of the system
# A new group of weights opens its rendezvous while the one before still has its own.
RENDEZVOUS_PORTS = 3
PORTS_PER_SERVER = 2  # requests, and the rendezvous of its own ranks
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
OWN_FLAGS = ("--api-key", "--config", "--host", "--port")  # each worker sets them for its server


def check(config: Config, *, files: bool = True) -> None:
    """Raises ValueError for the first broken rule. A rule may rely on those before it."""
    for holds, message in chain(
        _number_rules(config),
        _file_rules(config, files),
        _cross_rules(config),
        _engine_rules(config),
        _learner_rules(config),
        _shared_rules(config),
        _node_rules(config),
        _network_rules(config),
        _evaluation_rules(config),
    ):
        if not holds:
            raise ValueError(message)


def _number_rules(config: Config) -> Iterator[Rule]:
    values = dict(values_of(config))
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                yield (
                    -NUMBERS_END < number < NUMBERS_END,
                    f"{name} ({number}) must be a finite number, below 2^63 in size",
                )
    for knob in knobs():
        if isinstance(values[knob.name], int | float):
            yield from _bound_rules(knob, values[knob.name])
    num_cpus = config.model.num_cpus
    yield (
        num_cpus == 0 or num_cpus >= SMALLEST_SHARE,
        f"model.num_cpus ({num_cpus}) must be 0 or at least {SMALLEST_SHARE}, Ray's unit",
    )


def _bound_rules(knob: Knob, value: float) -> Iterator[Rule]:
    least, above, most = knob.bounds
    or_null = " or null" if knob.default is None else ""
    found = []
    if least is not None:
        found.append((value >= least.value, f"at least {least.value:g}", least.why))
    if above is not None:
        found.append((value > above.value, "positive", above.why))
    if most is not None:
        found.append((value <= most.value, f"at most {most.value:,.0f}", most.why))
    for holds, must, why in found:
        because = f": {why}" if why else ""
        yield holds, f"{knob.name} ({value}) must be {must}{or_null}{because}"


def _file_rules(config: Config, files: bool) -> Iterator[Rule]:
    data = config.data
    for name, value in (
        ("model.path", config.model.path),
        ("data.train", data.train),
        ("data.heldout", data.heldout),
    ):
        yield bool(value), f"{name} is not set; set it in the config file or as {name}=PATH"
        yield (
            not files or _exists(parse_source(value), pattern=name != "model.path"),
            f"{name} ({value}) does not exist; give an existing path",
        )
    for source in parse_contamination(data.contamination)[1]:
        yield (
            not files or _exists(source),
            f"data.contamination ({source.where}) does not exist; give existing paths after the "
            "mode, separated by commas",
        )
    yield (
        data.template is None or data.template in TEMPLATES or "{problem}" in data.template,
        f"data.template ({data.template!r}) must contain {{problem}}, where the problem's text "
        f"goes, or be one of {', '.join(TEMPLATES)}",
    )
    yield (
        data.system is None or (data.template or "").startswith("chat"),
        f"data.system needs a chat template (data.template is {data.template!r}); "
        "set data.template=chat, or leave data.system out",
    )


def _exists(source: Source, *, pattern: bool = True) -> bool:
    """A source on the hub is looked up later. A `pattern` has to match a path."""
    if source.path is None:
        return True
    return bool(matches(source.path)) if pattern else os.path.exists(source.path)


def _cross_rules(config: Config) -> Iterator[Rule]:
    rollout, replay = config.rollout, config.replay
    yield (
        rollout.adapts_slots or rollout.fixed_slots >= replay.group_size,
        f"rollout.num_slots ({rollout.fixed_slots}) must be at least replay.group_size "
        f"({replay.group_size}), so that all rollouts of a group can run together",
    )
    yield (
        replay.admission != "lockstep" or (replay.max_staleness == 0 and rollout.num_workers == 1),
        "replay.admission=lockstep needs replay.max_staleness=0 and rollout.num_workers=1 (they "
        f"are {replay.max_staleness} and {rollout.num_workers}), otherwise the order of groups "
        "is random; set both, or replay.admission=paced",
    )
    limit = config.train.max_wall_s
    yield (
        limit is None or limit > STOP_S,
        f"train.max_wall_s ({limit}) must be more than {STOP_S:g}, the seconds for the end of the "
        "run; raise it, or set null",
    )
    mirror = config.train.checkpoint_mirror
    host = mirror.partition("://")[2].partition("/")[0]
    yield (
        not mirror or "://" in mirror,
        f"train.checkpoint_mirror ({mirror}) must be a URL, such as s3://bucket/runs; write a "
        "folder as file:///PATH",
    )
    yield (
        "@" not in host,
        "train.checkpoint_mirror must not have a password, because it is saved and printed; set "
        "the variables of the store, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    )
    uri = config.tracking.mlflow
    sinks = config.tracking.names
    yield (
        set(sinks) <= set(SINKS) and len(set(sinks)) == len(sinks),
        f"tracking.sinks ({config.tracking.sinks!r}) must be none or some of {', '.join(SINKS)}, "
        "separated by commas, each once; write tracking.sinks=mlflow,tensorboard",
    )
    yield (
        uri == "local" or "://" in str(uri) or str(uri).startswith("databricks"),
        f"tracking.mlflow ({uri!r}) must be local, or a tracking URI such as http://HOST:5000 or "
        "sqlite:///FILE; tracking.sinks=none turns MLflow off",
    )
    cache = config.reward.overlong_cache_tokens
    yield (
        cache is None or 0 < cache <= rollout.max_response_tokens,
        f"reward.overlong_cache_tokens ({cache}) must be between 1 and rollout.max_response_tokens "
        f"({rollout.max_response_tokens}), or be null",
    )


def _engine_rules(config: Config) -> Iterator[Rule]:
    rollout = config.rollout
    if rollout.engine == "torch":
        for name, off in (("tensor_parallel", 1), ("servers", ""), ("server_flags", "")):
            value = getattr(rollout, name)
            yield (
                value == off,
                f"rollout.{name} ({value}) is for SGLang engines; set rollout.engine=sglang, or "
                "leave it out",
            )
        return
    yield (
        not config.learner.routing_replay or config.model.device != "cpu",
        "learner.routing_replay=true needs GPUs with rollout.engine=sglang, because SGLang returns "
        "no experts on a CPU; set rollout.engine=torch, or learner.routing_replay=false",
    )
    urls = rollout.server_urls
    for word in rollout.server_flags.split():
        yield (
            word.partition("=")[0] not in OWN_FLAGS,
            f"rollout.server_flags has {word}, which each worker sets for its own server; "
            "leave it out",
        )
    yield (
        not urls or len(set(urls)) == rollout.num_workers,
        f"rollout.servers names {len(set(urls))} servers for "
        f"rollout.num_workers={rollout.num_workers}: each worker needs its own; set "
        f"rollout.num_workers={len(set(urls))}",
    )
    yield (
        all(url.startswith(("http://", "https://")) for url in urls),
        f"rollout.servers ({rollout.servers}) must be URLs such as http://HOST:30000, separated "
        "by commas",
    )
    yield (
        config.replay.admission != "lockstep",
        "replay.admission=lockstep needs rollout.engine=torch: the samples of an SGLang "
        "server do not repeat; set it, or replay.admission=paced",
    )


def _learner_rules(config: Config) -> Iterator[Rule]:
    replay, learner, algorithm = config.replay, config.learner, config.algorithm
    per_step = replay.groups_per_step
    yield (
        per_step % learner.num_minibatches == 0,
        f"replay.groups_per_step ({per_step}) must be a multiple of learner.num_minibatches "
        f"({learner.num_minibatches}), because a group is in one minibatch; set "
        f"learner.num_minibatches to a divisor of {per_step}",
    )
    yield (
        per_step // learner.num_minibatches * replay.group_size >= learner.data_parallel,
        f"learner.data_parallel ({learner.data_parallel}) must be at most the rollouts of a "
        "minibatch, replay.groups_per_step / learner.num_minibatches * replay.group_size "
        f"({per_step} / {learner.num_minibatches} * {replay.group_size}); lower it or "
        "learner.num_minibatches",
    )
    floor, cap = algorithm.correction_band
    in_order = floor is None or cap is None or floor <= cap
    yield (
        in_order and (floor is None or floor >= 0) and (cap is None or cap > 0),
        f"algorithm.correction_band ({shown(algorithm.correction_band)}) must be [FLOOR, CAP] with "
        "0 <= FLOOR <= CAP and CAP > 0, because it bounds the ratio, not its logarithm; "
        "set [null, 2.0], or null for an edge that is off",
    )
    lowest, highest = algorithm.sequence_band or (None, None)
    yield (
        0 <= (lowest or 0.0) <= 1 and (highest is None or highest >= 1),
        f"algorithm.sequence_band ({shown(algorithm.sequence_band)}) must be [FLOOR, CAP] with "
        "0 <= FLOOR <= 1 <= CAP, because an unchanged policy has the ratio 1; set [0.999, 1.001], "
        "or null for no such rule",
    )
    yield (
        algorithm.proximal != "current" or learner.num_minibatches == 1,
        "algorithm.proximal=current needs learner.num_minibatches=1 (it is "
        f"{learner.num_minibatches}): after the first update pi_theta is no longer pi_prox; "
        "set algorithm.proximal=recompute",
    )


def _shared_rules(config: Config) -> Iterator[Rule]:
    """Each rank and one engine take turns on one device: nothing else may need a device."""
    if not config.model.is_shared:
        return
    ranks = config.learner.num_ranks
    one_each = "each learner rank shares its device with one engine"
    rules: list[tuple[str, object, object, str]] = [
        ("rollout.num_workers", config.rollout.num_workers, ranks, one_each),
        ("rollout.tensor_parallel", config.rollout.tensor_parallel, 1, one_each),
        ("rollout.servers", config.rollout.servers, "", "a server elsewhere shares no device"),
        (
            "evaluation.engine",
            config.evaluation.engine,
            "snapshot",
            "a dedicated evaluator needs its own device",
        ),
    ]
    if config.model.device == "cuda":
        why = "NCCL refuses two processes on one GPU"
        rules.append(("weights.transport", config.weights.transport, "disk", why))
    for name, value, needed, why in rules:
        yield (
            value == needed,
            f"model.placement=shared needs {name}={needed} (it is {value}): {why}; "
            "set it, or model.placement=separate",
        )


def _node_rules(config: Config) -> Iterator[Rule]:
    for name, value in (
        ("learner.node_resource", config.learner.node_resource),
        ("rollout.node_resource", config.rollout.node_resource),
    ):
        yield (
            value == "" or (NODE_RESOURCE.fullmatch(value) is not None and value not in RAYS_OWN),
            f"{name} ({value}) must be the name of a custom resource: letters, digits, _ . - and "
            "/, and none of Ray's own; set a name such as learner, or leave it out",
        )


def _network_rules(config: Config) -> Iterator[Rule]:
    name, ports = config.network.interface, config.network.ports
    yield (
        name == "" or INTERFACE.fullmatch(name) is not None,
        f"network.interface ({name}) must be the name of one network interface, such as eth1, as "
        "`ip addr` shows it; set it, or leave it out",
    )
    if not ports:
        return
    match = PORTS.fullmatch(ports)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    yield (
        LOWEST_PORT <= first <= last <= HIGHEST_PORT,
        f"network.ports ({ports}) must be FIRST-LAST within {LOWEST_PORT}-{HIGHEST_PORT}; set a "
        "range such as 20000-20999",
    )
    needed = ports_needed(config)
    yield (
        last - first + 1 >= needed,
        f"network.ports ({ports}) has {last - first + 1} ports, this run may need {needed} on one "
        f"node; set {first}-{first + needed - 1} or a larger range",
    )


def ports_needed(config: Config) -> int:
    """Ports that actors of the run and their servers listen on, if all are on one node."""
    rollout, evaluation = config.rollout, config.evaluation
    if rollout.engine != "sglang":
        return RENDEZVOUS_PORTS
    servers = 0 if rollout.server_urls else rollout.num_workers
    servers += evaluation.during_training and evaluation.engine == "dedicated"
    return RENDEZVOUS_PORTS + PORTS_PER_SERVER * servers


def _evaluation_rules(config: Config) -> Iterator[Rule]:
    every, saved = config.evaluation.every_steps, config.train.checkpoint_every_steps
    yield (
        every % saved == 0,
        f"evaluation.every_steps ({every}) must be a multiple of train.checkpoint_every_steps "
        f"({saved}), so that the best evaluated version can be kept; "
        f"set evaluation.every_steps={-(-every // saved) * saved} or "
        f"train.checkpoint_every_steps={every}",
    )
    yield (
        config.evaluation.k == 1 or config.evaluation.temperature > 0,
        f"evaluation.k ({config.evaluation.k}) needs evaluation.temperature above 0, because "
        "greedy responses to one prompt are all equal; set evaluation.k=1 or "
        "evaluation.temperature=1",
    )
