"""A cluster without nodes for a run: it posts its demand, and Ray's autoscaler starts them.

Ray brings a stand-in for a cloud, which starts nodes as processes of this machine. It gets the
kinds of nodes of `cluster/ray_up.yaml`, without GPUs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT
from ray_cluster import free_port, started_cluster
from run_support import TINY

from dapo_async.utils.network import join

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
HEAD = "127.0.0.1"
# What Ray's stand-in, the provider `fake_multinode`, calls its head.
HEAD_TYPE, HEAD_ID = "ray.head.default", "f" * 51 + "00000"
MACHINE = {"CPU": 2, "object_store_memory": 10**8}


def on_this_machine(gcs: str) -> dict[str, Any]:
    """`cluster/ray_up.yaml` for the stand-in."""
    given = yaml.safe_load((ROOT / "cluster" / "ray_up.yaml").read_text())
    kinds = given["available_node_types"]
    for name in ("learner", "rollout"):
        kinds[name] |= {"node_config": {}, "resources": {**MACHINE, name: 1}}
    head = kinds.pop(given["head_node_type"]) | {"node_config": {}}
    provider = {"type": "fake_multinode", "head_node_id": HEAD_ID, "gcs_address": gcs}
    commands = (
        "initialization_commands", "setup_commands", "head_setup_commands", "rsync_exclude",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files", "rsync_filter",
    )  # fmt: skip
    return {
        "cluster_name": given["cluster_name"],
        "max_workers": given["max_workers"],
        "idle_timeout_minutes": given["idle_timeout_minutes"],
        "upscaling_speed": 1.0,
        "provider": provider,
        "head_node_type": HEAD_TYPE,
        "available_node_types": {**kinds, HEAD_TYPE: head},
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in commands},
    }


def test_a_run_on_a_cluster_without_nodes_gets_them_from_the_autoscaler(tmp_path: Path) -> None:
    port, file = free_port(HEAD), tmp_path / "autoscaler.json"
    file.write_text(json.dumps(on_this_machine(join(HEAD, port))))
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    flags = {HEAD: ("--autoscaling-config", str(file))}
    kinds = ("learner.node_resource=learner", "rollout.node_resource=rollout")
    command = ("submit", "configs/quickstart.yaml", *TINY, *kinds, "rollout.num_workers=2")
    with started_cluster(
        ips=(HEAD,), num_cpus=0, flags=flags, port=port, variables=variables
    ) as cluster:
        refused = cluster.run(*command, "run_dir=refused")
        assert refused.returncode == 2, refused.stdout
        assert "or set ray.wait_for_nodes_s if an autoscaler" in refused.stdout

        ended = cluster.run(*command, "run_dir=waits", "ray.wait_for_nodes_s=240")
        assert ended.returncode == 0, ended.stdout
        assert "no room yet: learner" in ended.stdout
        actors = re.findall(
            r"^(learner|rollout-\d) +pid \d+ on \S+ \(node (\w+)\)", ended.stdout, re.MULTILINE
        )
        where = dict(actors)
        assert where.keys() == {"learner", "rollout-0", "rollout-1"}
        assert where["learner"] not in (where["rollout-0"], where["rollout-1"])
        summary = json.loads((cluster.runs / "waits" / "summary.json").read_text())
        assert (summary["status"], summary["steps"]) == ("done", 6)
