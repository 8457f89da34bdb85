"""A strict check of RayJob and RayCluster manifests: keys, types, and what belongs together.

The tables have the fields that this project's manifests use, as the API references of KubeRay 1.6
and Kubernetes list them. A key that is not in a table is a complaint, so a misspelt one is found.
The published schemas are in no package that the tests could install.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGT]i?)?")
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# Kind → key → its type; "!" after a key: it is required; a list has the type of its items.
TABLES: Mapping[str, Mapping[str, Any]] = {
    "RayJob": {"apiVersion!": str, "kind!": str, "metadata!": "Metadata", "spec!": "RayJobSpec"},
    "RayCluster": {
        "apiVersion!": str,
        "kind!": str,
        "metadata!": "Metadata",
        "spec!": "RayClusterSpec",
    },
    "Metadata": {"name!": str},
    "RayJobSpec": {
        "entrypoint!": str,
        "rayClusterSpec!": "RayClusterSpec",
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
    },
    "RayClusterSpec": {
        "rayVersion!": str,
        "authOptions!": "AuthOptions",
        "headGroupSpec!": "HeadGroupSpec",
        "workerGroupSpecs!": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"mode!": str},
    "HeadGroupSpec": {"rayStartParams!": "StartParams", "template!": "PodTemplate"},
    "WorkerGroupSpec": {
        "groupName!": str,
        "replicas!": int,
        "minReplicas!": int,
        "maxReplicas!": int,
        "rayStartParams!": "StartParams",
        "template!": "PodTemplate",
    },
    "StartParams": {"num-cpus": str, "dashboard-host": str, "resources": str},
    "PodTemplate": {"spec!": "PodSpec"},
    "PodSpec": {
        "containers!": ["Container"],
        "volumes!": ["Volume"],
        "terminationGracePeriodSeconds": int,
    },
    "Container": {
        "name!": str,
        "image!": str,
        "env!": ["EnvVar"],
        "ports": ["Port"],
        "resources!": "Resources",
        "volumeMounts!": ["VolumeMount"],
    },
    "EnvVar": {"name!": str, "value!": str},
    "Port": {"containerPort!": int, "name!": str},
    "Resources": {"requests!": "Amounts", "limits!": "Amounts"},
    "Amounts": {"cpu!": str, "memory!": str, "nvidia.com/gpu": str},
    "VolumeMount": {"name!": str, "mountPath!": str},
    "Volume": {"name!": str, "persistentVolumeClaim": "Claim", "emptyDir": "EmptyDir"},
    "Claim": {"claimName!": str},
    "EmptyDir": {"medium!": str},
}


def complaints(manifest: Any) -> Iterator[str]:
    """What is wrong with a manifest, one line each."""
    kind = manifest.get("kind")
    if kind not in ("RayJob", "RayCluster"):
        yield f"kind {kind}"
        return
    wrong = list(_shape(manifest, kind, kind))
    yield from wrong or _meaning(manifest)


def _shape(value: Any, kind: Any, where: str) -> Iterator[str]:
    if isinstance(kind, list):
        if not isinstance(value, list) or not value:
            yield f"{where} must be a list with items"
            return
        for place, item in enumerate(value):
            yield from _shape(item, kind[0], f"{where}[{place}]")
    elif isinstance(kind, str):
        if not isinstance(value, dict):
            yield f"{where} must be a mapping"
            return
        table = {key.removesuffix("!"): each for key, each in TABLES[kind].items()}
        missing = {key[:-1] for key in TABLES[kind] if key.endswith("!")} - value.keys()
        yield from (f"{where} lacks {key}" for key in sorted(missing))
        yield from (f"{where} has no field {key}" for key in value.keys() - table.keys())
        for key in value.keys() & table.keys():
            yield from _shape(value[key], table[key], f"{where}.{key}")
    elif type(value) is not kind:
        yield f"{where} must be of type {kind.__name__}, not {value!r}"


def _meaning(manifest: Any) -> Iterator[str]:
    """What Kubernetes or KubeRay refuse although every key and type is right."""
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    if manifest["apiVersion"] != "ray.io/v1":
        yield f"apiVersion {manifest['apiVersion']}"
    if cluster["authOptions"]["mode"] != "token":
        yield "anybody could run code on this cluster"
    groups = cluster["workerGroupSpecs"]
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield f"groups {names}"
    for name in (manifest["metadata"]["name"], *names):
        if LABEL.fullmatch(name) is None:
            yield f"{name} is no DNS label"
    for group in groups:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas"
        # KubeRay puts the text into a shell command, so it has a second pair of quotes.
        marks = json.loads(json.loads(group["rayStartParams"]["resources"]))
        if marks != {group["groupName"]: 1}:
            yield f"{group['groupName']}: resources {marks}"
    for group in (cluster["headGroupSpec"], *groups):
        yield from _pod(group["template"]["spec"])


def _pod(pod: Any) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod["volumes"]}
    for volume in pod["volumes"]:
        if len(volume) != 2:
            yield f"volume {volume['name']} must have one source"
    for container in pod["containers"]:
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        if mounted - volumes:
            yield f"{container['name']} mounts {sorted(mounted - volumes)}"
        if {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm"}:
            yield f"{container['name']} has no shared storage"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
            yield f"{container['name']}: Kubernetes wants equal requests and limits of GPUs"
        for amount in (*requests.values(), *limits.values()):
            if QUANTITY.fullmatch(amount) is None:
                yield f"{container['name']}: {amount} is no quantity"
