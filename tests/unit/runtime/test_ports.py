"""`network.ports` is divided between an own Ray and the run: no port is in both parts."""

from __future__ import annotations

import socket

import pytest
from paths import QUICKSTART

from dapo_async.config import Config, load
from dapo_async.runtime.cluster import ports
from dapo_async.utils.network import ANY_PORT

SGLANG = ("rollout.engine=sglang", "rollout.num_workers=4", "evaluation.engine=dedicated")


def config(*overrides: str) -> Config:
    return load(QUICKSTART, ["ray.address=local", *overrides])


def workers_of(given: dict[str, int | str]) -> set[int]:
    return {int(port) for port in str(given["worker_port_list"]).split(",")}


@pytest.mark.parametrize(
    ("given", "of_ray", "of_run"),
    [
        (range(24_000, 24_099), range(24_000, 24_066), range(24_066, 24_099)),
        (range(24_000, 24_100), range(24_000, 24_066), range(24_066, 24_100)),
        (range(1_024, 1_025), range(1_024, 1_024), range(1_024, 1_025)),
    ],
)
def test_parts_cover_the_range_and_share_no_port(
    given: range, of_ray: range, of_run: range
) -> None:
    assert ports.divide(given) == (of_ray, of_run)


def test_an_own_ray_gets_free_ports_of_its_part_only() -> None:
    local = config("network.ports=24000-24099")
    with socket.create_server(("127.0.0.1", 24_005)):
        given = ports.ray_ports(local)
    services = {int(given[name]) for name in ports.SERVICES}
    assert len(services) == len(ports.SERVICES)
    assert not services & workers_of(given)
    assert services | workers_of(given) <= {*range(24_000, 24_066)} - {24_005}
    assert ports.ports_of_run(local) == range(24_066, 24_100)


@pytest.mark.parametrize("overrides", [(), SGLANG])
def test_actors_and_workers_of_ray_never_share_a_port(overrides: tuple[str, ...]) -> None:
    before = config("network.ports=24000-24199", *overrides)
    more = config("network.ports=24000-24199", *overrides, "rollout.num_workers=6")
    taken = ports.ray_ports(before)
    of_ray = workers_of(taken) | {int(taken[name]) for name in ports.SERVICES}
    for each in (before, more):  # `dapo-async scale` has changed the number of workers
        assert not of_ray & {*ports.ports_of_run(each)}


def test_a_large_range_fits_into_one_argument_of_a_command() -> None:
    given = ports.ray_ports(config("network.ports=10000-60000"))
    assert len(str(given["worker_port_list"])) < 2**17
    assert len(workers_of(given)) == 10_000


def test_without_a_range_and_on_a_joined_cluster_nothing_is_divided() -> None:
    assert ports.ray_ports(config()) == {}
    assert ports.ports_of_run(config()) == ANY_PORT
    joined = load(QUICKSTART, ["ray.address=10.0.0.1:6379", "network.ports=24000-24002"])
    assert ports.ports_of_run(joined) == range(24_000, 24_003)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "needs 47: 31 for Ray in the first two thirds, 3 for the run in the last third; "),
        (SGLANG, "needs 65: 43 for Ray in the first two thirds, 13 for the run in the last third"),
    ],
)
def test_too_small_a_range_is_refused_and_the_smallest_one_that_is_named_is_enough(
    overrides: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ValueError) as error:
        ports.ray_ports(config("network.ports=24000-24020", *overrides))
    line = str(error.value)
    assert told in line
    assert "\n" not in line
    named = line.split("; set ")[1].split()[0]
    first, last = map(int, named.split("-"))
    assert len(workers_of(ports.ray_ports(config(f"network.ports={named}", *overrides)))) >= 20
    with pytest.raises(ValueError, match="or a larger range"):
        ports.ray_ports(config(f"network.ports={first}-{last - 1}", *overrides))


def test_a_range_at_the_last_port_is_told_where_there_is_room() -> None:
    with pytest.raises(ValueError, match=r"set 65489-65535 or a larger range"):
        ports.ray_ports(config("network.ports=65530-65535"))


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        (24_000, "30 ports of 24000-24030 are free on this machine, Ray needs 31 there"),
        (24_046, "15 ports of 24031-24046 are free on this machine, the run needs 16 there"),
    ],
)
def test_ports_that_others_hold_are_told_with_the_part_that_lacks_them(
    taken: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "ports_needed", lambda _: 16)
    with (
        socket.create_server(("127.0.0.1", taken)),
        pytest.raises(ValueError, match=told),
    ):
        ports.ray_ports(config("network.ports=24000-24046"))
