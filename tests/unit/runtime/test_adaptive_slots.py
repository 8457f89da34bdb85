"""`rollout.num_slots=auto`: what a host makes of its server's limits and of the credits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.config import Config
from dapo_async.rollout.sglang.client import ServerLimits, SGLangClient
from dapo_async.runtime.actors.sglang_host import SGLangHost, most_slots
from dapo_async.utils.state_clock import StateClock

CONFIG = QUICKSTART.with_name("quickstart_sglang.yaml")
AUTO = "rollout.num_slots=auto"


class Server:
    """The client of a server with these limits."""

    url = "http://server"

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits

    async def limits(self) -> ServerLimits:
        return self._limits

    async def close(self) -> None:
        return None


class Host(SGLangHost):
    def __init__(self, config: Config, limits: ServerLimits) -> None:
        super().__init__(
            config,
            name="rollout-0",
            number=0,
            incarnation="first",
            device="cpu",
            clock=StateClock("rollout-0"),
            logs=Path(),
            outer_key="",
        )
        self._limits = limits

    async def _connect(self) -> SGLangClient:
        return cast(SGLangClient, Server(self._limits))


def started(limits: ServerLimits, *overrides: str) -> tuple[int, str]:
    """The slots of an engine at its start, and the line about it."""

    async def start() -> tuple[int, str]:
        host = Host(knobs.load(CONFIG, overrides), limits)
        line = await host.start()
        await host.engine.close()
        return host.engine.num_slots, line

    return asyncio.run(start())


@pytest.mark.parametrize(
    ("limits", "overrides", "slots"),
    [
        # The longest sequence has 48 tokens; the credits allow 3 x 32 x 16 sequences.
        (ServerLimits(4_800, 2000), (AUTO,), 100),
        (ServerLimits(4_800, 41), (AUTO,), 40),
        (ServerLimits(100, 2000), (AUTO,), 16),
        (ServerLimits(480_000, 2000), (AUTO,), 1024),
        (ServerLimits(480_000, 2000), (AUTO, "rollout.num_workers=4"), 384),
        (ServerLimits(4_800, 2000), ("rollout.num_slots=200",), 200),
    ],
)
def test_slots_at_the_start(limits: ServerLimits, overrides: tuple[str, ...], slots: int) -> None:
    found, line = started(limits, *overrides)
    assert found == slots
    assert line.endswith(f"{slots} slots" + (" at the start" if AUTO in overrides else ""))


GIVEN = ("rollout.servers=http://server", "rollout.num_workers=1")


@pytest.mark.parametrize(
    ("exact", "overrides", "is_told"),
    [
        (False, (*GIVEN, "model.dtype=bfloat16"), True),
        (False, (*GIVEN, "model.dtype=bfloat16", AUTO), True),
        (True, (*GIVEN, "model.dtype=bfloat16"), False),
        (False, (*GIVEN, "model.dtype=float32"), False),
        (False, ("model.dtype=bfloat16",), False),  # the run starts it with the flag
    ],
)
def test_a_given_server_whose_head_sums_in_half_precision_is_named(
    exact: bool, overrides: tuple[str, ...], is_told: bool
) -> None:
    _, line = started(ServerLimits(4_800, 2000, exact), *overrides)
    assert ("start the server with --enable-fp32-lm-head" in line) == is_told
    assert "\n" not in line


def test_a_server_that_runs_less_than_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"runs at most 16 requests, and .* \(17\); start the"):
        started(ServerLimits(4_800, 16), AUTO)


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (("rollout.num_slots=64",), 64),
        (("rollout.engine=torch", AUTO), 64),
        ((AUTO,), 1024),
        ((AUTO, "replay.groups_per_step=2"), 96),
        ((AUTO, "replay.groups_per_step=2", "rollout.num_workers=64"), 16),
    ],
)
def test_most_slots_are_those_of_the_credits(overrides: tuple[str, ...], most: int) -> None:
    assert most_slots(knobs.load(CONFIG, overrides)) == most


def test_dry_run_tells_that_slots_adapt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(CONFIG), "--dry-run", AUTO]) == 0
    printed = capsys.readouterr().out
    assert "sglang engine, adaptive slots, recompute" in printed
    assert "runs as many sequences as its memory and speed allow (num_slots auto)" in printed
    assert "credits allow" not in printed
    assert main(["train", str(QUICKSTART), "--dry-run", AUTO]) == 0
    assert "torch engine, 64 slots" in capsys.readouterr().out
