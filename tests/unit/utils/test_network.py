"""Addresses in both families, the interface of an address, and ports within a range."""

from __future__ import annotations

import socket

import pytest

from dapo_async.utils import network


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("10.0.0.1", 6379, "10.0.0.1:6379"),
        ("head", 6379, "head:6379"),
        ("fd00::1", 6379, "[fd00::1]:6379"),
        ("::1", 80, "[::1]:80"),
    ],
)
def test_host_and_port_come_back_from_an_address(host: str, port: int, address: str) -> None:
    assert network.join(host, port) == address
    assert network.split(address) == (host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_addresses_are_of_the_loopback_interface(host: str) -> None:
    assert network.interface_of(host) == "lo"
    assert network.address_of("lo", like="10.0.0.1") == "127.0.0.1"


def test_address_of_an_interface_has_the_family_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"eth0": ["10.0.0.1", "fd00::1"], "ib0": ["fd01::1"]}
    monkeypatch.setattr(network, "interfaces", lambda: known)
    assert network.address_of("eth0", like="10.9.9.9") == "10.0.0.1"
    assert network.address_of("eth0", like="fd99::9") == "fd00::1"
    assert network.address_of("ib0", like="10.9.9.9") == "fd01::1"
    assert network.interface_of("fd01::1") == "ib0"
    with pytest.raises(ValueError, match=r"eth7.* eth0 \(10.0.0.1 fd00::1\), ib0 \(fd01::1\); set"):
        network.address_of("eth7", like="10.9.9.9")
    with pytest.raises(ValueError, match=r"no network interface .* 192.0.2.254"):
        network.interface_of("192.0.2.254")


def test_link_local_addresses_are_left_out() -> None:
    addresses = [each for usable in network.interfaces().values() for each in usable]
    assert "127.0.0.1" in addresses
    assert not [each for each in addresses if each.startswith("fe80")]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_listener_takes_a_free_port_of_the_range_and_only_that_address(host: str) -> None:
    first = network.free_ports(host, count=1)[0]
    with network.listener(host, range(first, first + 1)) as server:
        assert server.getsockname()[:2] == (host, first)
        taken = range(first, first + 1)
        with pytest.raises(ValueError, match=f"{first}-{first}.* in use on {host}; give a larger"):
            network.listener(host, taken)
        socket.create_connection((host, first), timeout=5.0).close()


def test_port_is_free_on_all_interfaces_if_nobody_listens_on_any() -> None:
    with network.listener("127.0.0.3") as server:
        taken = int(server.getsockname()[1])
        assert network.free_ports_of_all(range(taken, taken + 1)) == []
    assert network.free_ports_of_all(range(taken, taken + 1)) == [taken]


def test_free_ports_differ_and_are_in_the_range() -> None:
    ports = range(23_000, 23_050)
    found = network.free_ports("127.0.0.1", ports, count=5)
    assert len(set(found)) == 5
    assert set(found) <= set(ports)


def test_variables_come_before_the_address_and_after_a_named_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY"):
        monkeypatch.delenv(name, raising=False)
    both = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert network.socket_variables("127.0.0.1") == both
    assert network.socket_variables("::1") == {**both, "NCCL_SOCKET_FAMILY": "AF_INET6"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert network.socket_variables("127.0.0.1") == {**both, "NCCL_SOCKET_IFNAME": "ib0"}
    named = network.socket_variables("127.0.0.1", interface="lo")
    assert named == both
