"""Addresses, network interfaces and ports of this machine, for IPv4 and IPv6 alike.

An address is written bare (`10.0.0.1`, `fd00::1`). In a URL, and before a port, an IPv6 address
has brackets: `in_url`, `join` and `split` add and remove them.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import random
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress

ANY_PORT = range(1)  # port 0: the kernel chooses a free one
LOOPBACK = "lo"  # on Linux


def in_url(host: str) -> str:
    """`host` as a URL has it: `[fd00::1]` for fd00::1."""
    return f"[{host}]" if ":" in host else host


def join(host: str, port: int | str) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"{in_url(host)}:{port}"


def split(address: str) -> tuple[str, int]:
    """Host, without brackets, and port of HOST:PORT. Raises ValueError if there is no port."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def family(host: str) -> socket.AddressFamily:
    """The family of an address; IPv4 for a name."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def interfaces() -> Mapping[str, list[str]]:
    """The addresses of each interface that has one that other machines can use."""
    import psutil  # the learner and the native engine run without it

    return {
        name: usable
        for name, addresses in psutil.net_if_addrs().items()
        if (usable := [each.address for each in addresses if _is_usable(each.address)])
    }


def _is_usable(address: str) -> bool:
    """Not a hardware address, and no link-local one: that is not unique to a machine."""
    try:
        return not ipaddress.ip_address(address).is_link_local
    except ValueError:
        return False


def address_of(interface: str, *, like: str) -> str:
    """The address of `interface`: of the family of `like` if it has one.

    Raises ValueError if this machine has no such interface, or it has no address.
    """
    known = interfaces()
    if not (addresses := known.get(interface)):
        raise ValueError(
            f"network.interface ({interface}) is no interface with an address on "
            f"{socket.gethostname()}, which has {_shown(known)}; set it to one of them"
        )
    alike = [each for each in addresses if family(each) == family(like)]
    return (alike or addresses)[0]


def interface_of(host: str) -> str:
    """The name of this machine's interface with the address of `host`, such as `lo` for 127.0.0.1.

    Raises ValueError if no interface has it.
    """
    address = host if ":" in host else socket.gethostbyname(host)
    if ipaddress.ip_address(address).is_loopback:
        return LOOPBACK
    known = interfaces()
    for name, addresses in known.items():
        if address in addresses:
            return name
    raise ValueError(
        f"no network interface of this machine has the address {address} of {host}; it has "
        f"{_shown(known)}"
    )


def _shown(known: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{name} ({' '.join(addresses)})" for name, addresses in known.items())


def socket_variables(host: str, *, interface: str = "") -> dict[str, str]:
    """Variables with which gloo and NCCL use the interface of `host`.

    What the environment has already comes first, unless `interface` is named.
    """
    name = interface or interface_of(host)
    variables = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    if family(host) is socket.AF_INET6:
        variables["NCCL_SOCKET_FAMILY"] = "AF_INET6"  # else NCCL prefers IPv4
    if interface:
        return variables
    return {key: os.environ.get(key) or value for key, value in variables.items()}


def listener(host: str, ports: range = ANY_PORT) -> socket.socket:
    """A socket that listens at `host`, at a free port of `ports`.

    Raises ValueError if none of them is free.
    """
    # In random order: processes that start together seldom want the same one.
    for port in random.sample(ports, len(ports)):
        server = socket.socket(family(host), socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
            server.listen()
        except OSError as error:
            server.close()
            if error.errno != errno.EADDRINUSE or ports == ANY_PORT:
                raise
        else:
            return server
    raise ValueError(
        f"network.ports ({ports.start}-{ports.stop - 1}): all these ports are in use on {host}; "
        "give a larger range"
    )


def free_ports(host: str, ports: range = ANY_PORT, *, count: int) -> list[int]:
    """`count` ports of `host` on which nobody listens now.

    Raises ValueError if there are fewer in `ports`.
    """
    with ExitStack() as held:
        servers = [held.enter_context(listener(host, ports)) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in servers]


def free_ports_of_all(ports: range) -> list[int]:
    """Those of `ports` on which nobody listens, on any IPv4 interface of this machine."""
    free = []
    for port in ports:
        with suppress(OSError), socket.create_server(("0.0.0.0", port)):
            free.append(port)
    return free


def chosen_by_kernel() -> range:
    """The ports from which the kernel chooses for sockets of gloo and NCCL (Linux)."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        first, last = map(int, file.read().split())
    return range(first, last + 1)
