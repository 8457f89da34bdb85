"""The control plane alone: emulated engines and learner around the real replay actor.

python benchmarks/control_plane.py [--json OUT] [--quick] [--engines N …] [--tokens N …]
                                   [--journal-rounds N]

The engines answer at once, and a step takes no time, so the rate is what rollout workers, replay
actor and hand-over can do on this machine. The workers are the real ones, in two processes.
`buffer`: the replay buffer in this process, without Ray. `--journal-rounds`: each case so often
with and without the journal of the replay actor, by turns. `journal_cpu_ms_per_group` is the CPU
time of its appends.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from quickstart import CONFIG
from support.output import show, write_result

from dapo_async import config as knobs
from dapo_async.config import Config
from dapo_async.replay import ReplayBuffer, TokenBook, dynamic_sampling, has_tokens
from dapo_async.replay.group_io import pack_group
from dapo_async.rollout import (
    EngineWork,
    GroupRequest,
    KVUse,
    SamplingParams,
    SiblingsEnded,
    SlotUse,
    TimeUse,
    ignore_ends,
)
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.runtime.actors.replay import ReplayActor
from dapo_async.runtime.actors.rollout import ReplayClient
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import Admission, Completion, FinishReason, Group, GroupFacts, Rollout

GROUP_SIZE, MAX_STALENESS, HOSTS = 16, 3, 2
ENGINES, TOKENS, SECONDS, WARM_UP_S = (10, 100, 1000), (512, 32), 15.0, 4.0
CHARACTERS_PER_TOKEN = 4
SAMPLING = SamplingParams(max_tokens=1024, temperature=1.0, stop_token_ids=(), seed=0)
Row = dict[str, Any]


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def groups_per_step(engines: int) -> int:
    """So many that the credits are two groups per engine, as many as a worker holds."""
    return max(16, 2 * engines // (MAX_STALENESS + 1))


def completions_of(tokens: int, version: int) -> tuple[Completion, ...]:
    """The completions of one group."""
    ids = np.arange(tokens, dtype=np.int32)
    return tuple(
        Completion(
            ids + sibling,
            np.full(tokens, -0.5, np.float32),
            np.full(tokens, version, np.int32),
            version,
            FinishReason.STOP,
        )
        for sibling in range(GROUP_SIZE)
    )


class Engine:
    """Answers at once, with completions of the newest version."""

    num_slots = GROUP_SIZE

    def __init__(self, host: Host) -> None:
        self._host, self.tokens = host, TokenBook()

    @property
    def version(self) -> int:
        return self._host.version

    async def generate(
        self, request: GroupRequest, siblings_ended: SiblingsEnded = ignore_ends
    ) -> tuple[Completion, ...]:
        await asyncio.sleep(0)
        return self._host.completions

    async def abort(self, group_ids: Iterable[int]) -> None:
        raise AssertionError(f"a healthy run evicts nothing, but {group_ids}")

    def starving(self, on: bool) -> None: ...

    def dead(self, on: bool) -> None: ...

    def time_use(self) -> TimeUse:
        raise NotImplementedError

    def kv_use(self) -> KVUse:
        raise NotImplementedError

    def work(self) -> EngineWork:
        raise NotImplementedError("the worker does not read the work")

    def slot_use(self) -> SlotUse:
        raise NotImplementedError

    async def close(self) -> None: ...


class Client(ReplayClient):
    """Counts its calls."""

    num_calls = 0

    async def _call(self, *args: Any, **kwargs: Any) -> Any:
        Client.num_calls += 1
        return await super()._call(*args, **kwargs)


class Host:
    """Many rollout workers in one process."""

    def __init__(self, config: Config, replay: Any, *, names: Sequence[str], tokens: int) -> None:
        self._tokens = tokens
        self._texts = [
            f"{sibling:02} " + "x" * CHARACTERS_PER_TOKEN * tokens for sibling in range(GROUP_SIZE)
        ]
        self._workers = [
            RolloutWorker(
                name,
                Engine(self),
                replay=Client("replay", replay, config.deadlines, caller=name),
                score=self._score,
                sampling=SAMPLING,
                group_size=GROUP_SIZE,
            )
            for name in names
        ]
        self._serve(0)

    def _serve(self, version: int) -> None:
        self.version, self.completions = version, completions_of(self._tokens, version)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for worker in self._workers:
                tasks.create_task(worker.run())

    async def serve(self, version: int) -> None:
        self._serve(version)

    async def usage(self) -> tuple[float, int]:
        return cpu_s(), Client.num_calls

    async def _score(self, admission: Admission, completions: Sequence[Completion]) -> Group:
        return group_of(admission, completions, self._texts)


def group_of(
    admission: Admission, completions: Sequence[Completion], texts: Sequence[str]
) -> Group:
    rollouts = tuple(
        Rollout(completion, text, float(sibling % 2), float(sibling % 2), "7", "integer")
        for sibling, (completion, text) in enumerate(zip(completions, texts, strict=True))
    )
    return Group(admission.group_id, admission.prompt, rollouts, "bench", temperature=1.0)


class MeasuredReplay(ReplayActor):
    """Also keeps when the batch of each take was complete."""

    def __init__(self, config: Config, run_dir: RunDir, *, journal: bool = True) -> None:
        super().__init__(config, incarnation="bench", run_dir=run_dir)
        self._journal_s = 0.0
        kept = self._buffer.journal
        assert kept is not None
        if not journal:
            kept.remove()
        append = kept.append

        def timed_append(*args: Any, **options: Any) -> None:
            start_s = time.thread_time()
            append(*args, **options)
            self._journal_s += time.thread_time() - start_s

        kept.append = timed_append  # type: ignore[method-assign]
        buffer, self._complete_s = self._buffer, dict[int, float]()
        offer, size = buffer.offer, buffer.groups_per_step

        def timed_offer(*args: Any, **kwargs: Any) -> Any:
            result = offer(*args, **kwargs)
            if buffer.num_buffered >= size:
                self._complete_s.setdefault(buffer.next_step, time.time())
            return result

        buffer.offer = timed_offer  # type: ignore[method-assign]
        take = buffer.take

        def timed_take(learner_version: int) -> Any:
            batch = take(learner_version)
            if batch is not None and buffer.num_buffered >= size:
                self._complete_s.setdefault(buffer.next_step, time.time())
            return batch

        buffer.take = timed_take  # type: ignore[method-assign]

    async def complete_s(self, step: int) -> float:
        return self._complete_s.pop(step)

    async def usage(self) -> tuple[float, float, int, float]:
        """CPU seconds, those of the journal, groups outstanding, largest resident memory in MB."""
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        outstanding = self._buffer.num_buffered + self._buffer.num_generating
        return cpu_s(), self._journal_s, outstanding, peak_mb


def store_bytes() -> int:
    """Bytes of all objects that were ever made in Ray's object store."""
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    stats = node_stats(
        node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False
    )
    return int(stats.store_stats.cumulative_created_bytes)


async def learn(config: Config, replay: Any, hosts: Sequence[Any], *, seconds: float) -> Row:
    """The learner: takes and fetches batches, and publishes at once, for `seconds`."""
    waits: list[float] = []
    running = [asyncio.wrap_future(host.run.remote().future()) for host in hosts]
    await replay.serve.remote(0)
    start_s, before, groups, outstanding = time.time(), None, 0, 0
    for version in range(config.train.num_steps):
        asked_s = time.time()
        batch = await replay.take.remote(version)
        await asyncio.gather(*batch.references)
        now_s = time.time()
        complete_s = await replay.complete_s.remote(version)
        await replay.trained.remote(version, batch.group_ids, non_finite=False)
        await asyncio.gather(*(host.serve.remote(version + 1) for host in hosts))
        await replay.serve.remote(version + 1, batch.group_ids)
        if before is not None:
            waits.append(now_s - max(asked_s, complete_s))
            groups += len(batch.group_ids)
            outstanding = max(outstanding, (await replay.usage.remote())[2])
        if before is None and now_s - start_s > min(WARM_UP_S, seconds / 4):
            before, start_s = await usage(replay, hosts), time.time()
        elif before is not None and time.time() - start_s > seconds:
            break
        done, _ = await asyncio.wait(running, timeout=0)
        for task in done:
            task.result()
    assert before is not None
    elapsed_s, after = time.time() - start_s, await usage(replay, hosts)
    replay_s, journal_s, hosts_s, learner_s, calls, stored = (
        new - old for new, old in zip(after, before, strict=True)
    )
    return {
        "groups": groups,
        "steps": len(waits),
        "outstanding": outstanding,
        "groups_per_s": groups / elapsed_s,
        "hand_over_p50_ms": 1e3 * float(np.quantile(waits, 0.5)),
        "hand_over_p99_ms": 1e3 * float(np.quantile(waits, 0.99)),
        "replay_cpu_ms_per_group": 1e3 * replay_s / groups,
        "journal_cpu_ms_per_group": 1e3 * journal_s / groups,
        "workers_cpu_ms_per_group": 1e3 * hosts_s / groups,
        "learner_cpu_ms_per_group": 1e3 * learner_s / groups,
        "calls_per_group": calls / groups,
        "stored_bytes_per_group": stored / groups,
        "replay_peak_mb": (await replay.usage.remote())[3],
    }


async def usage(replay: Any, hosts: Sequence[Any]) -> tuple[float, ...]:
    """CPU seconds of the replay actor, its journal, the workers and the learner; calls; bytes in
    Ray's store."""
    of_replay, journal_s, *_ = await replay.usage.remote()
    of_hosts = await asyncio.gather(*(host.usage.remote() for host in hosts))
    return (
        of_replay,
        journal_s,
        sum(seconds for seconds, _ in of_hosts),
        cpu_s(),
        sum(calls for _, calls in of_hosts),
        await asyncio.to_thread(store_bytes),
    )


def of_the_actor(engines: int, tokens: int, *, seconds: float, journal: bool = True) -> Row:
    size = groups_per_step(engines)
    config = knobs.load(
        CONFIG,
        [
            f"replay.groups_per_step={size}",
            f"replay.group_size={GROUP_SIZE}",
            f"replay.max_staleness={MAX_STALENESS}",
            "learner.num_minibatches=1",
            "train.num_steps=1000000",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        run_dir.rollouts.mkdir()
        options = {"num_cpus": 0, "max_concurrency": 100_000}
        start: Any = ray.remote(MeasuredReplay).options(**options).remote
        replay = start(config, run_dir, journal=journal)
        names = [f"rollout-{number}" for number in range(engines)]
        hosts: list[Any] = [
            ray.remote(Host)
            .options(**options)
            .remote(config, replay, names=names[number::HOSTS], tokens=tokens)
            for number in range(HOSTS)
        ]
        try:
            row = asyncio.run(learn(config, replay, hosts, seconds=seconds))
        finally:
            for actor in (*hosts, replay):
                ray.kill(actor)
    admission = Admission(0, prompt(), GROUP_SIZE)
    texts = ["x" * CHARACTERS_PER_TOKEN * tokens] * GROUP_SIZE
    completions = completions_of(tokens, 0)
    row["group_bytes"] = len(pack_group(group_of(admission, completions, texts)))
    row["emulation_cpu_ms_per_group"] = emulation_ms(admission, completions, texts)
    row["stored_bytes_per_byte"] = row.pop("stored_bytes_per_group") / row["group_bytes"]
    return {"engines": engines, "tokens": tokens, **row}


def emulation_ms(
    admission: Admission, completions: Sequence[Completion], texts: Sequence[str], rounds: int = 200
) -> float:
    """CPU milliseconds of the workers' part that a real run does not have: making up a group."""
    start_s = time.process_time()
    for _ in range(rounds):
        group_of(admission, completions, texts)
    return 1e3 * (time.process_time() - start_s) / rounds


def prompt() -> Any:
    from dapo_async.types import Prompt

    return Prompt(row=0, text="1+1=", token_ids=np.arange(24, dtype=np.int32), answer="2")


def of_the_buffer(engines: int, *, num_offers: int) -> Row:
    """Offers per second, with a try to take after each, while every credit is out."""
    size = groups_per_step(engines)
    buffer = ReplayBuffer(
        groups_per_step=size,
        max_staleness=MAX_STALENESS,
        num_steps=10**9,
        filters=(has_tokens, dynamic_sampling),
        max_rejected_in_a_row=10**9,
        incarnation="bench",
    )
    texts = ["7"] * GROUP_SIZE
    buffer.serve(0)
    generating: list[int] = []
    version, spent_s, offers = 0, 0.0, 0
    while offers < num_offers:
        while buffer.admissible():
            generating.append(buffer.admit("rollout-0"))
        group_id = generating.pop(0)
        admission = Admission(group_id, prompt(), GROUP_SIZE)
        facts = GroupFacts.of(group_of(admission, completions_of(1, version), texts))
        start_s = time.process_time()
        buffer.offer(facts, None)
        batch = buffer.take(version)
        spent_s += time.process_time() - start_s
        offers += 1
        if batch is not None:
            buffer.trained(batch.group_ids)
            version += 1
            buffer.serve(version)
            buffer.release(batch.group_ids)
    return {"engines": engines, "offers_per_s": offers / spent_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="10 engines for a second")
    parser.add_argument("--engines", type=int, nargs="+", default=ENGINES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--journal-rounds", type=int, default=0, metavar="N")
    options = parser.parse_args()
    if options.quick:
        options.engines, options.tokens, options.seconds = [10], [32], 1.0
    num_offers = 200 if options.quick else 5000
    of_buffer = [of_the_buffer(engines, num_offers=num_offers) for engines in options.engines]
    show(of_buffer)
    ray.init(
        num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 1024**3
    )
    of_actor = []
    for tokens in options.tokens:
        for engines in options.engines:
            of_actor.append(of_the_actor(engines, tokens, seconds=options.seconds))
            show(of_actor[-1:])
            for number in range(2 * options.journal_rounds):
                journal = number % 2 == 0
                row = of_the_actor(engines, tokens, seconds=options.seconds, journal=journal)
                of_actor.append({"journal": journal, **row})
                show(of_actor[-1:])
    ray.shutdown()
    write_result(
        options.json, "control_plane", quick=options.quick, buffer=of_buffer, actor=of_actor
    )


if __name__ == "__main__":
    main()
