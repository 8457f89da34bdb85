"""Every component of a run dies, hangs or raises; the run goes on, and nothing is lost.

Real processes and real signals, one test a row; `.ci/full` runs them. The rows share one supervised
run of 2 × 2 learner ranks, two workers and an evaluator, so each one strikes a run that has had the
blows before. The last test checks the laws over all lives of the run. Rows that are elsewhere:

- SGLang servers: tests/nightly/test_sglang_matrix.py and test_sglang_hang.py; their wrong answers
  (NaN logprobs, wrong version, HTTP errors): tests/integration/test_sglang_faults.py;
- a node of a cluster: tests/chaos/test_node.py; damaged files and full disks: test_files.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_run import FAULTS, NAMED, RESUMED, SETTINGS, UNTOUCHED, Blow, ChaosRun
from paths import QUICKSTART
from run_support import Live

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
WORKER_BACK, LEARNER_BACK = r"^rollout-\d generates again", r"^the learner trains again after"
EVALUATOR_BACK, REPLAY_BACK = r"^evaluator +pid", r"^replay goes on after"
SUPERVISED_S = 120.0  # a start of Ray and of all actors, on a busy machine

# Bounds are about four times the seconds of README's table, for a busy machine; a stopped process
# is found later than a dead one, the evaluator last. At most three restarts of an actor within one
# start of the run: some rows resume it in between.
ROWS = (
    Blow("rollout-1", "SIGKILL", WORKER_BACK),
    Blow("rollout-1", "SIGSTOP", WORKER_BACK),
    Blow("evaluator", "SIGKILL", EVALUATOR_BACK),
    Blow("learner-3", "SIGKILL", LEARNER_BACK, 90.0),
    Blow("replay", "SIGKILL", REPLAY_BACK),
    Blow("driver", "SIGKILL", RESUMED, SUPERVISED_S),
    Blow("worker", "fault", WORKER_BACK),
    Blow("engine", "fault", f"{WORKER_BACK}|{EVALUATOR_BACK}"),
    Blow("evaluator", "SIGSTOP", EVALUATOR_BACK, 120.0),
    Blow("learner-1", "SIGSTOP", LEARNER_BACK, 90.0),
    Blow("replay", "SIGSTOP", REPLAY_BACK),
    Blow("reaper", "SIGSTOP", UNTOUCHED),
    Blow("driver", "SIGSTOP", RESUMED, SUPERVISED_S),
    Blow("evaluator", "fault", EVALUATOR_BACK, 120.0),
    Blow("memory", "fault", LEARNER_BACK, 90.0),
    Blow("version", "fault", NAMED["version"]),
    Blow("nan", "fault", NAMED["nan"]),
    Blow("reaper", "SIGKILL", NAMED["reaper"]),
    Blow("GCS", "SIGKILL", RESUMED, SUPERVISED_S),
    Blow("learner", "fault", RESUMED, SUPERVISED_S),
    Blow("GCS", "SIGSTOP", RESUMED, SUPERVISED_S),
    Blow("replay", "fault", RESUMED, SUPERVISED_S),
    Blow("raylet", "SIGKILL", RESUMED, SUPERVISED_S),
    Blow("driver", "fault", RESUMED, SUPERVISED_S),
)


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosRun]:
    folder, lives = tmp_path_factory.mktemp("chaos"), list[Live]()
    faults = folder / "faults"
    faults.mkdir()

    def start(root: Path) -> Live:
        for fault in faults.iterdir():
            fault.unlink()
        lives.append(Live(root, [str(QUICKSTART), *SETTINGS, f"run_dir={root}"]))
        return lives[-1]

    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")])
        patch.setenv("PYTHONPATH", path)
        patch.setenv("DAPO_ASYNC_FAULTS", str(faults))
        try:
            yield ChaosRun(folder, start)
        finally:
            for live in lives:
                live.destroy()


@pytest.mark.parametrize("blow", ROWS, ids=str)
def test_run_outlasts(chaos: ChaosRun, blow: Blow) -> None:
    print(f"{blow}: {chaos.take(blow):.1f} s")


def test_nothing_was_lost_and_nothing_trained_twice(chaos: ChaosRun) -> None:
    chaos.end()
    for blow, took_s in chaos.seconds.items():
        print(f"{blow:24} {took_s:6.1f} s")
