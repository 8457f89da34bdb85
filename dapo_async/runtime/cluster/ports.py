"""Who listens where in `network.ports`.

On a joined cluster all of the range is for the actors of the run and their servers: Ray has ports
of its own there. A Ray of the run's own gets the first two thirds, so that no actor takes a port
that Ray is about to give to one of its workers. The shares do not depend on the number of actors,
which `dapo-async scale` changes. Imports no Ray.
"""

from __future__ import annotations

from dapo_async.config import Config
from dapo_async.config.validate import HIGHEST_PORT, ports_needed
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.planned_actors import planned_actors
from dapo_async.utils.network import ANY_PORT, free_ports_of_all

# Each process of Ray that listens: ray.init has no option for most of these ports.
SERVICES = (
    "gcs_server_port",
    "node_manager_port",
    "object_manager_port",
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
)
WORKERS_PER_ACTOR = 4  # its process, one that starts in advance, and those that replace it
SPARE_WORKERS = 8  # the driver, and Ray's own tasks
MOST_WORKERS = 10_000  # Ray passes their ports as one argument, of 128 KiB at most on Linux


def divide(ports: range) -> tuple[range, range]:
    """The ports of an own Ray, and those of the run: two thirds and one third of `ports`."""
    of_ray = len(ports) * 2 // 3
    return ports[:of_ray], ports[of_ray:]


def ports_of_run(config: Config) -> range:
    """Ports at which actors of the run and their servers may listen; ANY_PORT without a range."""
    ports = config.network.port_range
    if ports == ANY_PORT or config.ray.address != LOCAL:
        return ports
    return divide(ports)[1]


def ray_ports(config: Config) -> dict[str, int | str]:
    """The ports of an own Ray, as Ray's `RayParams` names them; empty: Ray chooses.

    Raises ValueError if `network.ports` has too few for Ray and for the run.
    """
    if not config.network.ports:
        return {}
    ports, actors = config.network.port_range, len(list(planned_actors(config)))
    of_ray, of_run = divide(ports)
    for_ray = len(SERVICES) + WORKERS_PER_ACTOR * actors + SPARE_WORKERS
    for_run = ports_needed(config)
    if len(of_ray) < for_ray or len(of_run) < for_run:
        needed = max(-(-for_ray * 3 // 2), 3 * for_run - 2)
        first = min(ports.start, HIGHEST_PORT + 1 - needed)
        raise ValueError(
            f"network.ports ({config.network.ports}) has {len(ports)} ports, this run with its own "
            f"Ray needs {needed}: {for_ray} for Ray in the first two thirds, {for_run} for the run "
            f"in the last third; set {first}-{first + needed - 1} or a larger range"
        )
    # Ray listens on every interface: a port must be free on all of them.
    free = free_ports_of_all(of_ray)
    for part, there, needed, who in (
        (of_ray, len(free), for_ray, "Ray"),
        (of_run, len(free_ports_of_all(of_run)), for_run, "the run"),
    ):
        if there < needed:
            raise ValueError(
                f"network.ports ({config.network.ports}): {there} ports of {part.start}-"
                f"{part.stop - 1} are free on this machine, {who} needs {needed} there; give "
                "another range, or a larger one"
            )
    services, workers = free[: len(SERVICES)], free[len(SERVICES) :][:MOST_WORKERS]
    return {
        **dict(zip(SERVICES, services, strict=True)),
        "worker_port_list": ",".join(map(str, workers)),
    }
