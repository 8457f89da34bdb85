"""`dapo-async launch`: writes a Slurm script, or KubeRay manifests, for the resources of a config.

In: a config, and the size of a node. Out: files. The number of nodes is the smallest on which
`placement` finds room for the run. The files are templates in `templates/`; nothing is started.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from math import ceil
from pathlib import Path, PurePosixPath

from dapo_async.cli.arguments import Parser, add_config, path, say
from dapo_async.config import Config, load
from dapo_async.runtime.cluster.placement import (
    CPU,
    GPU,
    KINDS,
    Gang,
    Side,
    assign,
    planned_gangs,
)

HELP = "write a Slurm script or KubeRay manifests for a config"
TARGETS = ("slurm", "kuberay")
GRACE_S = 300  # before Slurm's time limit: one more step and a checkpoint
LONGEST_NAME = 40  # KubeRay adds to it, and Kubernetes allows 63 characters
IMAGE_FOLDER = PurePosixPath("/opt/dapo_async")  # the checkout in the image of cluster/Dockerfile
MARKS = ("learner.node_resource=learner", "rollout.node_resource=rollout")


DEFAULTS: Mapping[str, int | str] = {
    "gpus_per_node": 8,
    "cpus_per_node": 64,
    "shared": "/shared",
    "time": "24:00:00",
    "image": "dapo-async:latest",
    "claim": "dapo-async",
    "memory_per_node": "256Gi",
}
OPTIONS: Mapping[str, str] = {
    "gpus_per_node": "GPUs of one node",
    "cpus_per_node": "CPUs of one node",
    "shared": "folder that all nodes see; runs are in its folder runs",
    "time": "Slurm: time limit of one job",
    "image": "KubeRay: image of cluster/Dockerfile",
    "claim": "KubeRay: volume claim of the shared folder",
    "memory_per_node": "KubeRay: memory of one node",
}


def add_arguments(parser: Parser) -> None:
    """Adds what `launch` takes."""
    parser.add_argument("target", choices=TARGETS, help="what to write files for")
    add_config(parser, needed=True)
    parser.add_argument(
        "--out", type=path, default=Path(), metavar="FOLDER", help="where to (default: here)"
    )
    for name, text in OPTIONS.items():
        default = DEFAULTS[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="VALUE",
            help=f"{text} (default: {default})",
        )


def run(options: argparse.Namespace) -> int:
    """Writes the files, and prints how to start them."""
    config = load(options.config, options.overrides)
    write = slurm_files if options.target == "slurm" else kuberay_files
    texts = write(config, options)
    for name in texts:
        if (options.out / name).exists():
            raise ValueError(
                f"{options.out / name} exists; remove it, or give another --out FOLDER"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (options.out / name).write_text(text)
        say(f"wrote {options.out / name}")
    how = "sbatch" if options.target == "slurm" else "kubectl create -f"
    say(f"start it with {how} {options.out / next(iter(texts))}")
    return 0


def slurm_files(config: Config, options: argparse.Namespace) -> dict[str, str]:
    """One batch script: file name → text."""
    for knob, value in (
        ("learner.node_resource", config.learner.node_resource),
        ("rollout.node_resource", config.rollout.node_resource),
    ):
        if value:
            raise ValueError(
                f"{knob} ({value}) chooses among kinds of nodes, and the nodes of a Slurm job are "
                "all alike; leave it out"
            )
    gangs = planned_gangs(config)
    gpus = options.gpus_per_node if _uses_gpus(gangs) else 0
    nodes = smallest_cluster(gangs, gpus=gpus, cpus=options.cpus_per_node)
    name = f"{run_name(config, options)}.slurm.sh"
    text = _filled(
        "slurm.sh",
        _common(config, options)
        | {
            "file": name,
            "nodes": nodes,
            "cpus": options.cpus_per_node,
            "gpu_line": f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
            "time": options.time,
            "grace_s": GRACE_S,
            "run_dir": shlex.quote(_run_dir(config, options)),
            "arguments": shlex.join([options.config, *_overrides(options)]),
        },
    )
    return {name: text}


def kuberay_files(config: Config, options: argparse.Namespace) -> dict[str, str]:
    """A RayJob and a RayCluster, each with a group of pods for the learner and for the engines."""
    gangs = planned_gangs(config)
    if config.model.is_shared:
        raise ValueError(
            "model.placement=shared has learner and engines on the same devices, and these "
            "manifests have separate pods for both; set model.placement=separate, or write slurm "
            "files"
        )
    gpus = options.gpus_per_node if _uses_gpus(gangs) else 0
    size = f'cpu: "{options.cpus_per_node}", memory: {options.memory_per_node}'
    size += f', nvidia.com/gpu: "{gpus}"' if gpus else ""
    sides = {
        "learner": [gang for gang in gangs if gang.side is Side.LEARNER],
        "rollout": [gang for gang in gangs if gang.side is not Side.LEARNER],
    }
    counts = {
        f"{side}_nodes": smallest_cluster(each, gpus=gpus, cpus=options.cpus_per_node)
        for side, each in sides.items()
    }
    name = run_name(config, options)
    common = _common(config, options)
    spec = _filled(
        "cluster_spec.yaml",
        counts
        | {
            "ray_version": version("ray"),
            "image": options.image,
            "shared": options.shared,
            "claim": options.claim,
            "size": size,
        },
    )
    words = [*_overrides(options), *MARKS, f"run_dir={_run_dir(config, options)}"]
    words += ["train.resume=auto", "ray.wait_for_nodes_s=1800"]
    # One command: KubeRay puts it behind `ray job submit --`, where && would end the job's command.
    entrypoint = shlex.join(["dapo-async", "train", f"{IMAGE_FOLDER / options.config}", *words])
    job, cluster = f"{name}.rayjob.yaml", f"{name}.raycluster.yaml"
    more = {"entrypoint": entrypoint, "name": name}
    return {
        job: _filled(
            "rayjob.yaml", common | more | {"file": job, "cluster_spec": _indented(spec, 4)}
        ),
        cluster: _filled(
            "raycluster.yaml", common | more | {"file": cluster, "cluster_spec": _indented(spec, 2)}
        ),
    }


def smallest_cluster(gangs: Sequence[Gang], *, gpus: int, cpus: int) -> int:
    """How many equal nodes the gangs need, found with the plan of a run.

    Raises ValueError if a node is too small for one of them.
    """
    node = {GPU: float(gpus), CPU: float(cpus)}
    plain = [_without_marks(gang) for gang in gangs]
    for gang in plain:
        if assign([gang], [node]) == [None]:
            needs = " and ".join(f"{need:g} {kind}s" for kind, need in gang.needs.items())
            raise ValueError(
                f"{', '.join(gang.names)} need {needs} on one node, a node has {gpus} GPUs and "
                f"{cpus} CPUs; give --gpus-per-node and --cpus-per-node, or lower "
                "learner.tensor_parallel, rollout.tensor_parallel or model.num_cpus"
            )
    wanted = {kind: sum(gang.needs.get(kind, 0.0) for gang in plain) for kind in KINDS}
    count = max(1, *(ceil(wanted[kind] / node[kind]) for kind in KINDS if node[kind]))
    while None in assign(plain, [node] * count):
        count += 1
    return count


def _without_marks(gang: Gang) -> Gang:
    """Without custom resources: the nodes that are counted have them."""
    return replace(gang, bundle={kind: gang.bundle[kind] for kind in KINDS if kind in gang.bundle})


def run_name(config: Config, options: argparse.Namespace) -> str:
    """The name of job and files, as Kubernetes allows it: of the run directory, else of CONFIG."""
    given = Path(config.run_dir).name if config.run_dir else Path(options.config).stem
    name = re.sub(r"[^a-z0-9]+", "-", given.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def _run_dir(config: Config, options: argparse.Namespace) -> str:
    """A fixed absolute folder, so that a job that starts again goes on."""
    folder = Path(config.run_dir or run_name(config, options))
    return str(Path(options.shared) / "runs" / folder)


def _overrides(options: argparse.Namespace) -> list[str]:
    """Those of the user but `run_dir`, which the files name themselves."""
    return [word for word in options.overrides if not word.startswith("run_dir=")]


def _uses_gpus(gangs: Sequence[Gang]) -> bool:
    return any(GPU in gang.bundle for gang in gangs)


def _common(config: Config, options: argparse.Namespace) -> dict[str, object]:
    """What every file says about itself."""
    words = ["dapo-async", "launch", options.target, options.config, *options.overrides]
    for name in DEFAULTS:
        if (value := getattr(options, name)) != DEFAULTS[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return {
        "config": options.config,
        "command": shlex.join(words),
        "name": run_name(config, options),
    }


def _filled(name: str, values: Mapping[str, object]) -> str:
    """The template `name`, with %{name} replaced by its value."""
    template = files("dapo_async.cli").joinpath("templates", name).read_text(encoding="utf-8")
    return re.sub(r"%\{(\w+)\}", lambda match: str(values[match[1]]), template)


def _indented(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line if line else "" for line in text.splitlines())
