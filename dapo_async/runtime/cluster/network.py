"""Which interface, address and ports the processes of a run use, on whatever node they are.

`network.interface` and `network.ports` decide; without them it is the node's address in Ray, or
loopback for an own Ray, and any free port. Actors call it; this module imports Ray.
"""

from __future__ import annotations

import os

import ray

from dapo_async.config import Config
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.own_ray import LOOPBACK
from dapo_async.utils.network import address_of, socket_variables

# Of the libraries below torch's process groups: NCCL, its plug-ins on libfabric, gloo.
OF_GROUPS = ("NCCL_", "TORCH_NCCL_", "FI_", "GLOO_")


def own_host(config: Config) -> str:
    """The address at which the calling actor listens.

    Raises ValueError if this node has no interface `network.interface`.
    """
    node = LOOPBACK if config.ray.address == LOCAL else str(ray.util.get_node_ip_address())
    name = config.network.interface
    return address_of(name, like=node) if name else node


def use_network(config: Config) -> None:
    """Makes gloo and NCCL of this process, and of servers that it starts, use that address."""
    host = own_host(config)
    os.environ.update(socket_variables(host, interface=config.network.interface))


def variables_for_actors(config: Config) -> dict[str, str]:
    """What the driver's environment says to NCCL and gloo, for the actors of a joined cluster.

    They have the environment of `ray start`. An own Ray has the driver's.
    """
    if config.ray.address == LOCAL:
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(OF_GROUPS)}
