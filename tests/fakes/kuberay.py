"""A strict check of RayJob and RayCluster manifests: KubeRay's schema, and its operator's rules.

`kuberay_schema.yaml` has the fields of KubeRay's own definitions. A field that is not there is a
complaint, as `kubectl create` refuses it. The rules of `_meaning` are those of KubeRay's operator
(`ray-operator/controllers/ray/utils/validation.go`) for what the manifests use, those of Kubernetes
for pods, and this project's own: a token, shared storage, a group of pods for each side.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LONGEST_NAME = 47  # of a RayJob: KubeRay adds to it
FIRST_RAY_WITH_TOKENS = (2, 52)
QUANTITY = {
    "type": ["integer", "string"],
    "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)"
    r"([KMGTPE]i|[numkMGTPE]|[eE][+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+))?$",
}
WORDS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"type": name} for name in ("string", "integer", "number", "boolean")},
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "quantity": QUANTITY,
    "quantities": {"type": "object", "additionalProperties": QUANTITY},
    "port": {"type": ["integer", "string"]},
}


def complaints(manifest: Any) -> Iterator[str]:
    """What is wrong with a manifest, one line each."""
    kind = manifest.get("kind")
    if kind not in ("RayJob", "RayCluster"):
        yield f"kind {kind}"
        return
    wrong = [
        f"{error.json_path}: {error.message}" for error in _checker(kind).iter_errors(manifest)
    ]
    yield from wrong or _meaning(manifest)


@cache
def _checker(kind: str) -> jsonschema.Draft202012Validator:
    tables = yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text())
    schema = {
        "$ref": f"#/$defs/{kind}",
        "$defs": {name: _object(fields) for name, fields in tables.items()},
    }
    return jsonschema.Draft202012Validator(schema)


def _object(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name.removesuffix("!"): _field(kind) for name, kind in fields.items()},
        "required": [name[:-1] for name in fields if name.endswith("!")],
        "additionalProperties": False,
    }


def _field(kind: Any) -> Mapping[str, Any]:
    if isinstance(kind, list):
        return {"enum": kind}
    if isinstance(kind, dict):
        if "from" in kind:
            return {"type": "integer", "minimum": kind["from"]}
        return {"type": "array", "items": _field(kind["list"])}
    return WORDS.get(kind) or {"$ref": f"#/$defs/{kind}"}


def _meaning(manifest: Any) -> Iterator[str]:
    """What is refused although every field and type is right."""
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec") if manifest["kind"] == "RayJob" else spec
    if manifest["kind"] == "RayJob":
        yield from _job(spec)
    if cluster is None:
        yield "no rayClusterSpec"
        return
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "anybody could run code on this cluster"
    version = [int(part) for part in cluster.get("rayVersion", "0").split(".")]
    if (*version,) < FIRST_RAY_WITH_TOKENS:
        yield f"rayVersion {cluster.get('rayVersion')}: tokens need 2.52.0"
    groups = cluster.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if sorted(names) != ["learner", "rollout"]:
        yield f"groups {names}"
    for name in (manifest["metadata"]["name"], *names):
        if LABEL.fullmatch(name) is None or len(name) > LONGEST_NAME:
            yield f"{name} is no short DNS label"
    for group in groups:
        if not 0 <= group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas"
        # KubeRay puts the text into a shell command, so it has a second pair of quotes.
        marks = json.loads(json.loads(group.get("rayStartParams", {}).get("resources", '"{}"')))
        if marks != {group["groupName"]: 1}:
            yield f"{group['groupName']}: resources {marks}"
    for group in (cluster["headGroupSpec"], *groups):
        yield from (f"ray start has no option {name}" for name in _unknown_params(group))
        yield from _pod(group["template"].get("spec", {"containers": []}))


def _job(spec: Any) -> Iterator[str]:
    if not spec.get("entrypoint"):
        yield "no entrypoint"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    for name in ("backoffLimit", "ttlSecondsAfterFinished"):
        if spec.get(name, 0) < 0:
            yield f"{name} is below 0"


def _unknown_params(group: Any) -> list[str]:
    """KubeRay hands each of them to `ray start` as an option."""
    return [
        name for name in group.get("rayStartParams", {}) if f"--{name}" not in ray_start_options()
    ]


@cache
def ray_start_options() -> frozenset[str]:
    """Of the Ray that is installed, each with its dashes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray Serve, which comes along
        from ray.scripts.scripts import start
    return frozenset(option for each in start.params for option in each.opts)


def _pod(pod: Any) -> Iterator[str]:
    if not pod["containers"]:
        yield "a pod without containers"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for volume in pod.get("volumes", []):
        if len(volume) != 2:
            yield f"volume {volume['name']} must have one source"
    for container in pod["containers"]:
        mounts = container.get("volumeMounts", [])
        mounted = {mount["name"] for mount in mounts}
        if mounted - volumes:
            yield f"{container['name']} mounts {sorted(mounted - volumes)}"
        if not {mount["mountPath"] for mount in mounts} - {"/dev/shm"}:
            yield f"{container['name']} has no shared storage"
        for variable in container.get("env", []):
            if ("value" in variable) == ("valueFrom" in variable):
                yield f"{variable['name']} needs one of value and valueFrom"
        resources = container.get("resources", {})
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        if not {"cpu", "memory"} <= limits.keys():
            yield f"{container['name']} has no limits of cpu and memory"
        if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
            yield f"{container['name']}: Kubernetes wants equal requests and limits of GPUs"
