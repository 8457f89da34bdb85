"""When a run evaluates beside training, what it writes, and its errors."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from paths import QUICKSTART
from run_support import read_rows

from dapo_async import config as knobs
from dapo_async.evaluate import Evaluation
from dapo_async.rollout import EngineFault
from dapo_async.runtime.actors.evaluator import EvaluatorActor, own_server_config
from dapo_async.runtime.cluster.planned_actors import planned_actors
from dapo_async.runtime.evaluations import Evaluations
from dapo_async.runtime.handles.handle import ActorFailed
from dapo_async.tracking.run_dir import RunDir
from dapo_async.weights import Announcement, Attestation, Manifest
from dapo_async.weights.publisher import HandshakeError


def announce(version: int) -> Announcement:
    return Announcement(
        "first", version, Manifest(()), "", np.arange(4, dtype=np.int32), np.zeros(3, np.float32)
    )


DEDICATED = "evaluation.engine=dedicated"
Scene = Callable[[Evaluations, "System"], Awaitable[None]]


class Learner:
    """Writes nothing but a folder, as a sign."""

    first = SimpleNamespace(name="learner")

    async def write_once(self, announcement: Announcement, folder: Path) -> Announcement:
        (folder / f"version_{announcement.version:06d}").mkdir(parents=True)
        return announcement


class Evaluator:
    """Measures the version that it has read, as soon as `gate` is set."""

    name = "evaluator"

    def __init__(self) -> None:
        self.gate, self.attests_wrongly = asyncio.Event(), False
        self.versions: list[int] = []
        self.gate.set()

    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        assert (Path(folder) / f"version_{announcement.version:06d}").is_dir()
        version = announcement.version
        self.versions.append(version)
        after = announcement.probe_logprobs + np.float32(self.attests_wrongly)
        return Attestation(self.name, "first", version, announcement.probe_logprobs + 2, after)

    async def evaluate(self) -> Evaluation:
        await self.gate.wait()
        return measured(self.versions[-1])


def measured(*versions: int) -> Evaluation:
    return Evaluation(
        num_prompts=4,
        num_correct=3.0,
        num_response_tokens=20,
        num_truncated=1,
        weight_versions=frozenset(versions),
    )


class System:
    def __init__(self) -> None:
        self.evaluator: Any = Evaluator()
        self.learner, self.background = Learner(), list[asyncio.Task[Any]]()
        self.publisher = SimpleNamespace(newest=None)

    def in_background(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        self.background.append(asyncio.create_task(work, name=name))
        return self.background[-1]

    async def evaluate(self) -> Evaluation:
        return measured(0)


def play(scene: Scene, root: Path, *overrides: str) -> tuple[list[str], Evaluations]:
    """Runs `scene(evaluations, system)`; returns what was said and the evaluations."""
    said: list[str] = []

    async def main() -> Evaluations:
        config = knobs.load(
            QUICKSTART,
            [
                "evaluation.every_steps=2",
                "train.checkpoint_every_steps=2",
                "train.num_steps=8",
                *overrides,
            ],
        )
        system: Any = System()
        sinks: Any = SimpleNamespace(say=said.append, evaluation=lambda row: None)
        evaluations = Evaluations(
            config,
            system=system,
            run_dir=RunDir(root),
            sinks=sinks,
        )
        async with asyncio.timeout(60):
            await scene(evaluations, system)
            await asyncio.gather(*system.background)
        return evaluations

    return said, asyncio.run(main())


async def steps(evaluations: Evaluations, system: System, count: int, *, wait: bool = True) -> None:
    for step in range(count):
        system.publisher.newest = announce(step + 1)
        evaluations.start_if_due(step)
        if wait:
            await asyncio.gather(*system.background)


def test_each_due_version_but_the_last_is_measured_beside_the_steps(tmp_path: Path) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        await steps(evaluations, system, 8)
        assert system.evaluator.versions == [2, 4, 6]  # the final evaluation measures 8

    said, evaluations = play(scene, tmp_path)
    rows = read_rows(tmp_path / "evaluations.jsonl")
    assert rows == json.loads(json.dumps(evaluations.rows))
    assert [row["version"] for row in rows] == [2, 4, 6]
    row = rows[0]
    assert 0.0 <= row.pop("waited_s") <= row.pop("wall_s")
    assert row == {
        "version": 2, "step": 2, "weight_versions": [2], "engine": "snapshot", "accuracy": 0.75,
        "mean_response_tokens": 5.0, "num_prompts": 4, "truncated": 0.25, "k": 1,
        "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip
    assert said[0].startswith(
        "evaluation of version 2: accuracy 0.750, length 5.0, 4 held-out prompts, greedy, "
        "snapshot, "
    )
    assert len(said) == 3
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize("off", ["evaluation.every_steps=0", "evaluation.num_prompts=0"])
def test_nothing_is_evaluated_beside_the_steps_unless_it_is_asked_for(
    tmp_path: Path, off: str
) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        await steps(evaluations, system, 8)

    assert play(scene, tmp_path, off)[1].rows == []
    config = knobs.load(QUICKSTART, [off])
    assert "evaluator" not in [actor.name for actor in planned_actors(config)]


def test_an_evaluation_that_falls_due_while_another_runs_is_skipped_and_counted(
    tmp_path: Path,
) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        system.evaluator.gate.clear()
        await steps(evaluations, system, 5, wait=False)
        assert len(system.background) == 1
        assert evaluations.num_skipped == 1
        system.evaluator.gate.set()
        await system.background[0]
        system.publisher.newest = announce(6)
        evaluations.start_if_due(5)

    said, evaluations = play(scene, tmp_path)
    assert [row["version"] for row in evaluations.rows] == [2, 6]
    assert said[0] == "evaluation of version 4 skipped: the one before is still running"


def test_the_initial_and_the_final_evaluation_have_rows_too(tmp_path: Path) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        assert (await evaluations.measure_all("initial")).accuracy == 0.75

    said, evaluations = play(scene, tmp_path)
    assert said == [
        "initial evaluation of version 0: accuracy 0.750, length 5.0, 4 held-out prompts, greedy"
    ]
    assert (
        evaluations.rows[0]["engine"],
        evaluations.rows[0]["weight_versions"],
        evaluations.rows[0]["waited_s"],
    ) == ("all", [0], 0.0)


def test_an_evaluation_of_two_versions_is_none(tmp_path: Path) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        async def mixed() -> Evaluation:
            return measured(2, 3)

        system.evaluator.evaluate = mixed
        await steps(evaluations, system, 2)

    with pytest.raises(ValueError, match="too many values to unpack"):
        play(scene, tmp_path)
    assert not (tmp_path / "evaluations.jsonl").exists()


FAILED = "evaluator failed in evaluate: KeyError()"
LATE = "the driver waited 0.2 s for evaluator to evaluate"


@pytest.mark.parametrize("why", [FAILED, LATE])
def test_an_evaluator_that_fails_or_is_late_skips_one_evaluation_and_is_ended(
    tmp_path: Path, why: str
) -> None:
    ended: list[str] = []

    async def scene(evaluations: Evaluations, system: System) -> None:
        async def evaluate() -> Evaluation:
            if why == FAILED:
                raise ActorFailed(FAILED)
            await asyncio.Event().wait()
            return measured(2)

        system.evaluator.evaluate = evaluate
        system.evaluator.kill = lambda: ended.append("evaluator")
        await steps(evaluations, system, 2)

    said, evaluations = play(scene, tmp_path, "deadlines.work_s=0.2")
    assert said == [f"evaluation of version 2 skipped: {why}"]
    assert (ended, evaluations.num_skipped) == (["evaluator"], 1)


def test_learner_that_is_late_with_the_weights_of_an_evaluation_is_named(tmp_path: Path) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        async def late(*_: Any) -> str:
            await asyncio.Event().wait()
            return ""

        setattr(system.learner, "write_once", late)  # noqa: B010 (mypy refuses to assign a method)
        await steps(evaluations, system, 2)

    message = r"evaluation of version 2: the driver waited 0.2 s for learner(-0)? to write"
    with pytest.raises(TimeoutError, match=message):
        play(scene, tmp_path, "deadlines.work_s=0.2")


def test_an_evaluator_with_other_weights_than_were_published_measures_nothing(
    tmp_path: Path,
) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        system.evaluator.attests_wrongly = True
        await steps(evaluations, system, 2)

    with pytest.raises(
        HandshakeError,
        match="wrong weights for an evaluation: evaluator answers the probe of version 2",
    ):
        play(scene, tmp_path)
    assert not (tmp_path / "evaluations.jsonl").exists()


@pytest.mark.parametrize("call", ["read", "evaluate"])
def test_an_evaluator_that_lost_its_engine_skips_one_evaluation(tmp_path: Path, call: str) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        async def lost(*_: object) -> None:
            return None

        setattr(system.evaluator, call, lost)
        await steps(evaluations, system, 2)
        system.evaluator = Evaluator()  # the supervisor's replacement
        await steps(evaluations, system, 4)

    said, evaluations = play(scene, tmp_path)
    assert evaluations.num_skipped == 1
    assert said[0] == "evaluation of version 2 skipped: the evaluator has lost its engine"
    assert [row["version"] for row in evaluations.rows][-1] == 4


def test_the_evaluator_reports_a_lost_server_once_and_raises_nothing(tmp_path: Path) -> None:
    class Host:
        engine = SimpleNamespace(version=3)

        async def evaluate(self, *, part: int, num_parts: int) -> Evaluation:
            raise EngineFault("http://127.0.0.1:1 is gone")

    async def main() -> None:
        actor = EvaluatorActor(knobs.load(QUICKSTART, [DEDICATED]), incarnation="a", logs=tmp_path)
        loaded: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        loaded.set_result(Host())
        actor._loading = cast(Any, loaded)
        alive = asyncio.create_task(actor.alive())
        await asyncio.sleep(0)
        assert not alive.done()
        assert await actor.evaluate() is None
        assert await alive == "http://127.0.0.1:1 is gone"

    asyncio.run(main())


def test_a_dedicated_evaluator_starts_a_server_beside_running_ones() -> None:
    file = QUICKSTART.with_name("quickstart_sglang.yaml")
    urls = "rollout.servers='http://a:1,http://b:2'"
    config = knobs.load(file, [urls, "rollout.num_workers=2", "rollout.num_slots=auto"])
    own = own_server_config(config)
    assert (own.rollout.server_urls, own.rollout.adapts_slots) == ((), False)
    assert own.rollout.fixed_slots == config.rollout.fixed_slots


def test_an_evaluation_with_samples_says_how_they_were_drawn(tmp_path: Path) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        await evaluations.measure_all("initial")

    published = ("evaluation.k=32", "evaluation.temperature=1", "evaluation.top_p=0.7")
    said, evaluations = play(scene, tmp_path, *published)
    assert said[0].endswith("4 held-out prompts, avg@32 at temperature 1, top-p 0.7")
    assert (evaluations.rows[0]["temperature"], evaluations.rows[0]["top_p"]) == (1.0, 0.7)


def test_an_evaluation_that_is_given_up_leaves_no_weights_behind(tmp_path: Path) -> None:
    async def scene(evaluations: Evaluations, system: System) -> None:
        reading = asyncio.Event()

        async def hang(*_: object) -> None:
            reading.set()
            await asyncio.Event().wait()

        system.evaluator.read = hang
        await steps(evaluations, system, 2, wait=False)
        await reading.wait()
        assert (tmp_path / "evaluated").is_dir()
        (task,) = system.background
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        system.background.clear()

    play(scene, tmp_path)
    assert not (tmp_path / "evaluated").exists()


def test_a_resumed_run_removes_rests_and_keeps_the_rows_up_to_its_checkpoint(
    tmp_path: Path,
) -> None:
    run_dir = RunDir(tmp_path)
    (run_dir.evaluated / "version_000004").mkdir(parents=True)
    for version in (0, 2, 4):
        run_dir.log_evaluation({"version": version, "accuracy": 0.5}, accuracies={7: 1.0, 3: 0.0})
    run_dir.reopen(2)
    assert not run_dir.evaluated.exists()
    assert [row["version"] for row in read_rows(run_dir.evaluations)] == [0, 2]
    assert sorted(path.name for path in run_dir.problems.iterdir()) == [
        "version_000000.json",
        "version_000002.json",
    ]
    assert json.loads((run_dir.problems / "version_000002.json").read_text()) == {
        "version": 2,
        "rows": [3, 7],
        "accuracies": [0.0, 1.0],
    }


@pytest.mark.parametrize(("engine", "share"), [("snapshot", (0, 0)), ("dedicated", (0.5, 1.0))])
def test_a_dry_run_lists_an_evaluator_with_what_it_reserves(
    engine: str, share: tuple[float, float]
) -> None:
    more = ["model.num_cpus=0.5", "model.device=cuda", "rollout.num_workers=2"]
    config = knobs.load(QUICKSTART, [f"evaluation.engine={engine}", *more])
    found = [
        (actor.num_cpus, actor.num_gpus)
        for actor in planned_actors(config)
        if actor.name == "evaluator"
    ]
    assert found == [share]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "evaluation.every_steps=7",
            r"evaluation.every_steps \(7\) must be a multiple of "
            r"train.checkpoint_every_steps \(10\).*=10 or .*=7",
        ),
        (
            "evaluation.engine=lease",
            "evaluation.engine.*lease.*snapshot.*dedicated",
        ),
        (
            "evaluation.k=4",
            r"evaluation.k \(4\) needs evaluation.temperature above 0, because greedy",
        ),
        ("evaluation.top_p=1.5", r"evaluation.top_p \(1.5\)"),
        ("evaluation.every_steps=-1", r"evaluation.every_steps \(-1\) must be at least 0"),
    ],
)
def test_wrong_knobs_are_one_clear_line(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        knobs.load(QUICKSTART, [override])
