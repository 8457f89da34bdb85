"""Two network namespaces as two hosts, with Debian's iproute2: each has one interface, `eth0`.

A switch, in a third namespace, joins them. `cut` drops what goes between them, as a switch that
fails does: both interfaces stay up, so nobody is told.
"""

from __future__ import annotations

import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from dapo_async.utils.network import split

INTERFACE = "eth0"
V4, V6 = ("10.77.0.1", "10.77.0.2"), ("fd77::1", "fd77::2")
SWITCH = "switch"


class Listening(NamedTuple):
    """A socket: `ip` is an address of its host, loopback, or * for all of them."""

    ip: str
    port: int
    pid: int


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """Both hosts have an IPv4 address, or only an IPv6 address."""

    addresses: tuple[str, str]
    mark: str  # of the namespaces' names

    def inside(self, address: str) -> tuple[str, ...]:
        """The words before a command that has to run on the host with this address."""
        return "ip", "netns", "exec", self._name(self.addresses.index(address))

    def cut(self) -> None:
        """Nothing gets from one host to the other from now on."""
        _ip("-n", self._name(SWITCH), "link", "set", "port1", "nomaster")

    def mend(self) -> None:
        """The link works again."""
        _ip("-n", self._name(SWITCH), "link", "set", "port1", "master", "bridge")

    def listening(self, address: str) -> list[Listening]:
        """The TCP sockets that listen on the host with this address, once for each process."""
        rows = _ip(*self.inside(address)[1:], "ss", "-Htlnp").splitlines()
        return [
            Listening("*" if ip == "0.0.0.0" else ip.removeprefix("::ffff:"), port, pid)
            for row in rows
            for ip, port in [split(row.split()[3])]
            for pid in {int(number) for number in re.findall(r"pid=(\d+)", row)}
        ]

    def limit_ports(self, ports: range) -> None:
        """Both hosts choose the ports of gloo's and NCCL's sockets from `ports`."""
        limit = f"echo {ports.start} {ports.stop - 1} > /proc/sys/net/ipv4/ip_local_port_range"
        for number in range(len(self.addresses)):
            _ip("netns", "exec", self._name(number), "sh", "-c", limit)

    def _name(self, host: int | str) -> str:
        return f"dapo-{self.mark}-{host}"


@contextmanager
def two_hosts(addresses: tuple[str, str] = V4) -> Iterator[TwoHosts]:
    """Makes the namespaces. Raises PermissionError where this machine does not allow that."""
    hosts = TwoHosts(addresses, uuid.uuid4().hex[:8])
    switch = hosts._name(SWITCH)
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, address in enumerate(addresses):
            host, port = hosts._name(number), f"port{number}"
            _ip("netns", "add", host)
            peer = ("type", "veth", "peer", "name", port, "netns", switch)
            _ip("link", "add", INTERFACE, "netns", host, *peer)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", INTERFACE, "up")
            # `nodad`: else an IPv6 address can't be used in its first second.
            of_v6 = ("nodad",) if ":" in address else ()
            net = f"{address}/{64 if of_v6 else 24}"
            _ip("-n", host, "addr", "add", net, "dev", INTERFACE, *of_v6)
        yield hosts
    finally:
        for name in (hosts._name(0), hosts._name(1), switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> str:
    """Its output. Raises PermissionError where it is refused."""
    command = ["ip", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10.0)
        return done.stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or str(error)
        raise PermissionError(f"ip {' '.join(words)}: {' '.join(why.split())}") from error
