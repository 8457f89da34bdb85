"""The blocks of docs/cluster.md that start a cluster, run on addresses of one machine.

They start runs by `dapo-async train` and by `dapo-async submit`.
"""

from __future__ import annotations

import pytest
from fresh_machine import fresh_machine, trains
from paths import ROOT
from ray_cluster import free_port
from snippets import Snippet, snippets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
FIRST, *MINE = [
    snippet
    for snippet in snippets(ROOT / "docs" / "cluster.md")
    if snippet.detail == "tests/nightly/test_docs_cluster.py"
]
# What every machine needs; the environment of the tests has the package.
EXPORTS = "\n".join(line for line in FIRST.code.splitlines() if line.startswith("export "))
LIMITS = "--num-cpus 3 --memory 2000000000 --object-store-memory 200000000"


def on_one_machine(start: str, ip: str) -> tuple[str, str]:
    """Both nodes are this machine: each gets an address, a part of it, and a port for its agent,
    because the default of Ray is one port for all nodes of a machine."""
    agent = f"--dashboard-agent-listen-port {free_port('127.0.0.1')}"
    return start, f"{start} --node-ip-address {ip} {LIMITS} {agent}"


@pytest.mark.parametrize("snippet", MINE, ids=lambda snippet: snippet.where)
def test_commands_from_no_cluster_to_a_run(snippet: Snippet) -> None:
    several = "10.0.0.1" in snippet.code
    changes = (
        on_one_machine("--head --port 6379", "127.0.0.2"),
        on_one_machine("--address 10.0.0.1:6379", "127.0.0.3"),
        ("10.0.0.1", "127.0.0.2"),
    )
    with fresh_machine() as machine:
        output = trains(
            snippet, machine, *(changes if several else ()), before=EXPORTS, after="ray status"
        )
    assert "Total Usage" in output, "ray status lists CPUs and GPUs"
    if "127.0.0.3" in snippet.code or several:
        assert "127.0.0.3" in output, "an actor is on the second node"
