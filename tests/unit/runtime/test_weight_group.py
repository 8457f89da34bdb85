"""The weight group forms anew while engines are lost and return."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from fake_actors import fake_actor
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.rollout.engine import EngineFault
from dapo_async.rollout.sglang.client import CallRefused, ServerLimits, SGLangClient
from dapo_async.runtime.actors.sglang_host import SGLangHost
from dapo_async.runtime.handles.actors import LearnerHandle, ReplayHandle, WorkerHandle
from dapo_async.runtime.handles.handle import ActorFailed
from dapo_async.runtime.launch import Actors
from dapo_async.runtime.system import System
from dapo_async.utils.state_clock import StateClock

ADDRESS = ("127.0.0.1", 1)


class Client:
    """A client without a server: counts the calls, and fails those in `failures`."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls, self.url = name, calls, f"http://{name}"
        self.failures: dict[str, Exception] = {}

    async def limits(self) -> ServerLimits:
        return ServerLimits(10_000, 65)

    async def leave_group(self, group: str) -> None:
        await self._call("leave")

    async def join_group(self, address: tuple[str, int], **_: Any) -> None:
        await self._call("join")

    async def _call(self, name: str) -> None:
        self.calls.append(f"{self.name} {name}")
        await asyncio.sleep(0)
        if name in self.failures:
            raise self.failures[name]


class Host(SGLangHost):
    """Connects to `Client`s in turn, each time after `gate` opens."""

    def __init__(self) -> None:
        config = knobs.load(QUICKSTART.with_name("quickstart_sglang.yaml"))
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
        self.calls: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_clients = 0

    async def _connect(self) -> SGLangClient:
        self.num_clients += 1
        client = Client(f"client {self.num_clients}", self.calls)
        await self.gate.wait()
        self.calls.append(f"{client.name} connected")
        return cast(SGLangClient, client)


async def started() -> Host:
    host = Host()
    await host.start()
    return host


async def joined(host: Host) -> bool:
    return await host.join(ADDRESS, first_rank=1, world_size=2)


def test_join_during_a_restart_goes_to_the_engine_that_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        host = await started()
        assert await joined(host)

        async def reconnect(client: SGLangClient) -> None: ...

        monkeypatch.setattr(host.engine, "reconnect", reconnect)
        host.calls.clear()
        host.gate.clear()
        restarting = asyncio.create_task(host.restart())
        await asyncio.sleep(0)
        joining = asyncio.create_task(joined(host))
        await asyncio.sleep(0)
        assert not host.in_group
        host.gate.set()
        assert await joining
        await restarting
        assert host.calls == ["client 2 connected", "client 2 leave", "client 2 join"]
        assert host.in_group

    asyncio.run(scenario())


def test_group_that_was_not_formed_costs_no_engine_but_a_fault_does() -> None:
    async def scenario() -> None:
        host = await started()
        client = cast(Client, host._client)
        client.failures["join"] = CallRefused("the rendezvous is gone")
        assert not await joined(host)
        assert not host.in_group
        client.failures["join"] = EngineFault("no answer")
        with pytest.raises(EngineFault, match="no answer"):
            await joined(host)
        client.failures.clear()
        assert await joined(host)
        assert host.in_group

    asyncio.run(scenario())


def form(
    *engines: bool | None, failure: str = "", tp: int = 1
) -> tuple[frozenset[str] | None, list[str]]:
    """Forms the groups of `tp` ranks, whose engines answer this; returns what it says, and the
    learner's calls."""
    config = knobs.load(
        QUICKSTART.with_name("quickstart_sglang.yaml"), [f"learner.tensor_parallel={tp}"]
    )
    calls: list[str] = []

    async def open_group() -> tuple[str, int]:
        calls.append("open")
        return ADDRESS

    async def join_as_sender(address: tuple[str, int], world_size: int) -> None:
        assert address == ADDRESS
        calls.append(f"join {world_size}")
        if failure:
            raise ActorFailed(failure)

    async def leave_group() -> None:
        calls.append("leave")

    def worker(number: int, answer: bool | None) -> WorkerHandle:
        async def join(*_: object) -> bool | None:
            return answer

        return WorkerHandle(f"rollout-{number}", fake_actor(join=join), config.deadlines)

    rank = fake_actor(open_group=open_group, join=join_as_sender, leave_group=leave_group)
    actors = Actors(
        replay=ReplayHandle("replay", None, config.deadlines),
        ranks=[LearnerHandle(f"learner-{each}", rank, config.deadlines) for each in range(tp)],
        workers=[worker(number, answer) for number, answer in enumerate(engines)],
        evaluator=None,
        start_replay=cast(Any, None),
        start_rank=cast(Any, None),
        start_worker=cast(Any, None),
        start_evaluator=cast(Any, None),
        without_room=tuple,
    )
    system = System(config, actors, say=lambda line: None)
    return asyncio.run(system._regroup([each.name for each in actors.workers])), calls


def test_group_forms_of_the_learner_and_every_engine() -> None:
    assert form(True, True) == (None, ["open", "join 3"])


def test_each_rank_that_sends_forms_a_group_of_its_own() -> None:
    assert form(True, True, tp=2) == (None, ["open", "join 3", "join 3"])


def test_no_rank_joins_groups_that_were_left_before() -> None:
    """Nothing would end its wait."""
    lost, calls = form(None, True, tp=2)
    assert lost == frozenset({"rollout-0"})
    assert "join 3" not in calls


@pytest.mark.parametrize("failure", ["", "timed out"])
def test_engine_lost_while_the_group_forms_is_named_and_the_group_is_left(failure: str) -> None:
    lost, calls = form(None, not failure, failure=failure)
    assert lost == frozenset({"rollout-0"})
    # Left at once, so that nobody waits for the lost engine, and again after the learner failed.
    assert calls == ["open", "join 3", "leave", *(["leave"] if failure else [])]


@pytest.mark.parametrize(
    ("engines", "failure", "line"),
    [((True,), "learner failed in join: timed out", "timed out"), ((False,), "", "could not join")],
)
def test_group_that_fails_without_a_lost_engine_ends_the_run(
    engines: tuple[bool, ...], failure: str, line: str
) -> None:
    with pytest.raises(
        RuntimeError, match=f"though neither an engine nor the learner was lost: .*{line}"
    ):
        form(*engines, failure=failure)
