"""Runs on two hosts that only a network joins, which is cut for 10 s, and for ever.

The hosts are network namespaces, so both have this machine's disk, CPUs and `/dev/shm`. Each has
one address, of IPv4 or of IPv6. Skipped where this machine allows no namespaces.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import psutil
import pytest
from paths import ROOT
from ray_cluster import Cluster, started_cluster, wait_for_node, wait_until
from run_support import TINY, Live, running
from sglang_run_support import SERVERS
from snippets import snippets
from two_hosts import INTERFACE, V4, V6, TwoHosts, two_hosts

from dapo_async.utils.network import split

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
(BLOCK,) = (each.code for each in snippets(ROOT / "docs" / "cluster.md") if "sysctl" in each.code)
FLAGS = {name: int(port) for name, port in re.findall(r"--([a-z-]+) (\d+)", BLOCK)}
# The ports as the page has them. RUN is shorter than there, to show which sockets follow the knob.
(_FIRST, _LAST) = map(int, re.findall(r'port_range="(\d+) (\d+)"', BLOCK)[0])
RAY, RUN, KERNEL = range(21_000, 21_200), range(21_200, 21_300), range(_FIRST, _LAST + 1)
HEAD_PORTS = {name: FLAGS[name] for name in ("ray-client-server-port",)}
OF_CLUSTER = ("port", "dashboard-port")  # chosen by `started_cluster`
RAY_PORTS = {name: FLAGS[name] for name in FLAGS if name not in (*HEAD_PORTS, *OF_CLUSTER)}
RAYS_METRICS = {44_217, 44_227}  # of the head's autoscaler and dashboard; nobody has to reach them
CUT_S = 10.0
START_S = 90.0
# A process that is silent for `deadlines.ping_s`, 30 s, is lost. Ray declares its node dead after
# about 60 s. Then the run waits START_S for room, and ends in three parts of 10 s at most. The rest
# is for a busy machine.
NOTICED_S, ENDED_S = 30.0 + 20.0, 60.0 + START_S + 30.0 + 40.0
ENDLESS = "train.num_steps=100000"


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[TwoHosts]:
    """Of IPv4, or as the test's parameter says."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts(getattr(request, "param", V4)))
            made.limit_ports(KERNEL)
        except PermissionError as error:
            pytest.skip(f"this machine allows no network namespaces: {error}")
        yield made


def flags_of(ports: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(word for name, port in ports.items() for word in (f"--{name}", str(port)))


@contextmanager
def cluster_of(hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A Ray node with two CPUs on each host; engines of `rollout` may start on the second only."""
    first, second = hosts.addresses
    flags = {
        first: flags_of(RAY_PORTS | HEAD_PORTS),
        second: (*flags_of(RAY_PORTS), "--resources", '{"rollout": 1}'),
    }
    with started_cluster(ips=hosts.addresses, inside=hosts.inside, flags=flags) as cluster:
        for name in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, cluster.environment[name])
        yield cluster


@contextmanager
def run_on(cluster: Cluster, hosts: TwoHosts, name: str, *overrides: str) -> Iterator[Live]:
    """The driver is on the first host."""
    words = (
        *TINY,
        ENDLESS,
        "train.checkpoint_every_steps=5",
        f"deadlines.start_s={START_S}",
        f"network.interface={INTERFACE}",
        f"network.ports={RUN.start}-{RUN.stop - 1}",
        f"ray.address='{cluster.address}'",
        *overrides,
    )
    root = cluster.runs / name
    root.parent.mkdir(exist_ok=True)
    with running(root, *words, inside=hosts.inside(hosts.addresses[0])) as live:
        live.wait_for(r"^step +7/", timeout_s=480.0)
        yield live


def places(live: Live) -> dict[str, tuple[int, str]]:
    """The newest pid and address of each actor."""
    lines = re.findall(r"^([a-z]+(?:-\d+)?) +pid (\d+) on (\S+) \(node", live.output, re.MULTILINE)
    return {name: (int(pid), address) for name, pid, address in lines}


def check_sockets(live: Live, cluster: Cluster, hosts: TwoHosts) -> None:
    """Whatever other hosts reach has a port of the stated ranges, and the run's own sockets are at
    the address of their host only."""
    _, gcs = split(cluster.address)
    allowed = {*RAY, *RUN, *KERNEL, gcs} | RAYS_METRICS
    actors = places(live)
    for address in hosts.addresses:
        sockets = hosts.listening(address)
        reached = [each for each in sockets if each.ip not in ("127.0.0.1", "::1")]
        assert {each.port for each in reached} <= allowed, reached
        pids = {pid for pid, place in actors.values() if place == address}
        of_actors = [each for each in sockets if each.pid in pids]
        assert {each.pid for each in of_actors} == pids
        assert {each.ip for each in of_actors} <= {address, "*"}, of_actors
    first = hosts.addresses[0]
    of_first_rank = {s.port for s in hosts.listening(first) if s.pid == actors["learner-0"][0]}
    assert len(of_first_rank & {*RUN}) == 2, "the rendezvous of ranks, and that of weights"


def steps(live: Live) -> int:
    """The last step that was printed."""
    return int(re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)[-1])


def go_on(live: Live, *, by: int, timeout_s: float) -> None:
    wanted = steps(live) + by
    wait_until(
        lambda: steps(live) >= wanted, timeout_s=timeout_s, what=f"step {wanted}:\n{live.output}"
    )


def last_lines(output: str, count: int) -> Sequence[str]:
    return output.rstrip().splitlines()[-count:]


@pytest.mark.parametrize("hosts", [V4, V6], ids=["IPv4", "IPv6"], indirect=True)
def test_ranks_and_weights_cross_a_link_that_is_cut_for_ten_seconds_and_for_ever(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = hosts.addresses
    three_ranks = ("learner.data_parallel=3", "rollout.node_resource=rollout")
    with cluster_of(hosts, monkeypatch) as cluster:
        with run_on(cluster, hosts, "ranks", *three_ranks) as live:
            where = {name: address for name, (_, address) in places(live).items()}
            assert where == {
                "replay": first,
                "learner-0": first,
                "learner-1": first,
                "learner-2": second,
                "rollout-0": second,
            }
            check_sockets(live, cluster, hosts)
            hosts.cut()
            time.sleep(CUT_S)
            hosts.mend()
            go_on(live, by=5, timeout_s=60.0)
            assert " lost its " not in live.output, live.output
            versions = live.root / "weights"
            assert not versions.exists() or not any(versions.iterdir()), "a broadcast broke off"

            hosts.cut()
            ended = live.finish(timeout_s=ENDED_S)
        assert ended.exit_code == 1
        (reason,) = last_lines(ended.output, 1)
        assert reason.startswith("failed: learner"), reason
        assert f"on {second}" in reason, reason
        assert (ended.checkpoint / "config.json").is_file(), "a checkpoint to resume from"


def test_engine_whose_host_is_cut_off_for_ever_is_replaced_when_a_host_joins(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = hosts.addresses[1]
    with (
        cluster_of(hosts, monkeypatch) as cluster,
        run_on(cluster, hosts, "engines", "rollout.num_workers=2") as live,
    ):
        on_second = [name for name, (_, address) in places(live).items() if address == second]
        assert len(on_second) == 1, live.output
        (lost,) = on_second
        pid, _ = places(live)[lost]
        hosts.cut()
        live.wait_for(
            rf"^{lost} lost its process: .*\(pid {pid} on {second}\); restarting it",
            timeout_s=NOTICED_S,
        )
        go_on(live, by=5, timeout_s=120.0)  # with the other engine
        live.wait_for(f"{second}.* has been marked dead", timeout_s=120.0)  # Ray's own line
        hosts.mend()  # Ray ends a node that comes back then
        gone = f"the end of {lost} on its host"
        wait_until(lambda: not psutil.pid_exists(pid), timeout_s=120.0, what=gone)
        again = cluster.start_node("--address", cluster.address, ip=second)
        try:
            wait_for_node(cluster.folder, second)
            live.wait_for(rf"^{lost} generates again", timeout_s=120.0)
            assert places(live)[lost][1] == second
            go_on(live, by=3, timeout_s=60.0)
        finally:
            again.terminate()
            again.wait(60.0)


@pytest.mark.sglang
@pytest.mark.parametrize("hosts", [V6], ids=["IPv6"], indirect=True)
def test_sglang_server_on_a_host_with_ipv6_only_gets_its_weights_from_the_other_host(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = hosts.addresses
    servers = (*SERVERS, "rollout.num_workers=1", "rollout.node_resource=rollout")
    with (
        cluster_of(hosts, monkeypatch) as cluster,
        run_on(cluster, hosts, "servers", *servers, "deadlines.start_s=600") as live,
    ):
        where = {name: address for name, (_, address) in places(live).items()}
        assert where == {"replay": first, "learner": first, "rollout-0": second}
        assert f"http://[{second}]:" in live.output, live.output
        go_on(live, by=5, timeout_s=60.0)
        summary = json.loads((live.root / "metrics.jsonl").read_text().splitlines()[-1])
        assert summary["staleness"] <= 2.0, "the server has got the new weights"
        versions = live.root / "weights"
        assert not versions.exists() or not any(versions.iterdir()), "a broadcast broke off"
