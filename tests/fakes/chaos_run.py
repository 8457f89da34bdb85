"""A supervised run that takes one blow after another: a signal to a process, or a fault in it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from run_support import TINY, Live, check_conservation, read_rows

from dapo_async.replay.group_io import read_groups

FAULTS = Path(__file__).parent / "faults"
PING_S = 12.0  # the driver, too, counts as hung after it: longer than its longest import
GONE_S = 30.0  # Ray kills a process that was stopped some seconds after it was told to
SETTINGS = (
    *TINY,
    "model.num_cpus=0.5",
    "learner.data_parallel=2",
    "learner.tensor_parallel=2",
    "rollout.num_workers=2",
    "evaluation.every_steps=2",
    "train.num_steps=100000",
    "train.checkpoint_every_steps=2",
    "train.record=true",
    f"deadlines.ping_s={PING_S}",
    "deadlines.start_s=300",
    "--supervise",
)
RESUMED = "the run is resumed"  # an outcome; any other one is a line of the output
UNTOUCHED = "training goes on"
# What a run with NaN in a batch, or with an engine of wrong weights, says and writes.
NAMED = {
    "nan": r"^step \d+: the loss or gradient is not finite \(guard non_finite\)",
    "version": r"^step \d+: an engine served other weights than the learner's \(guard checksum",
    "reaper": r"the reaper of this run's Ray ended \(exit code -9\) and was started again",
}
KEPT = ("nan", "version")  # faults that the files of the run count
TITLES = {"GCS": "gcs_server", "raylet": "raylet/raylet", "reaper": "orphan_reaper"}


@dataclass(frozen=True, slots=True)
class Blow:
    """`kind`: SIGKILL, SIGSTOP, or `fault`, a name of `faults/sitecustomize.py`."""

    victim: str
    kind: str
    outcome: str
    within_s: float = 60.0

    def __str__(self) -> str:
        return f"{self.victim}-{self.kind}"


class ChaosRun:
    """Started again when a blow has ended it, so that one row does not fail the next ones."""

    def __init__(self, folder: Path, start: Callable[[Path], Live]) -> None:
        self._folder, self._start = folder, start
        self.seconds: dict[str, float] = {}  # until it had recovered, by blow
        self.live = start(folder / "run-0")
        self.ended: list[Live] = []  # the runs before, which a blow has ended
        self._stopped: list[int] = []  # processes

    def trains(self, *, since: int | None = None, steps: int = 2, within_s: float = 400.0) -> None:
        """Waits for so many more steps, in a start after `since`."""
        target = None
        deadline_s = time.monotonic() + within_s
        while True:
            starts, trained = self.starts, self._trained
            if (since is None or starts > since) and trained:
                target = target if target is not None else trained[-1] + steps
                if trained[-1] >= target or (since is not None and starts > since):
                    return
            assert not self.has_ended, self.live.output[-5000:]
            assert time.monotonic() < deadline_s, self.live.output[-5000:]
            time.sleep(0.05)

    @property
    def starts(self) -> int:
        return self.live.output.count("run directory ")

    @property
    def _trained(self) -> list[int]:
        newest = self.live.output.rpartition("run directory ")[2]
        return [int(step) for step in re.findall(r"^step +(\d+)/", newest, re.MULTILINE)]

    @property
    def has_ended(self) -> bool:
        return not psutil.pid_exists(self.live.driver) or (
            psutil.Process(self.live.driver).status() == psutil.STATUS_ZOMBIE
        )

    def take(self, blow: Blow) -> float:
        """Strikes; returns the seconds until the outcome, after which the run trains on."""
        if self.has_ended:
            self.ended.append(self.live)
            self.live = self._start(self._folder / f"run-{len(self.ended)}")
        self.trains()
        self.live.wait_for_checkpoint()
        starts, before = self.starts, len(self.live.output)
        proof = self._proof(blow)
        began_s = time.monotonic()
        self._strike(blow)
        if blow.outcome == RESUMED:
            self.trains(since=starts, within_s=blow.within_s)
        elif blow.outcome == UNTOUCHED:
            self.trains(steps=4, within_s=blow.within_s)
        else:
            self._says(blow.outcome, after=before, within_s=blow.within_s)
        took_s = time.monotonic() - began_s
        self.trains()
        deadline_s = time.monotonic() + GONE_S
        while not proof():
            said = self.live.output[before:]
            assert time.monotonic() < deadline_s, f"nothing shows that {blow} struck:\n{said}"
            time.sleep(0.1)
        if blow.outcome != RESUMED:
            assert self.starts == starts, f"the run was resumed:\n{self.live.output[before:]}"
        self.seconds[str(blow)] = took_s
        return took_s

    def _proof(self, blow: Blow) -> Callable[[], bool]:
        """What tells, when the run has recovered, that the blow was felt."""
        if blow.kind == "fault":
            asked, before = self._folder / "faults" / blow.victim, self._kept(blow.victim)
            return lambda: (
                not asked.exists() and (blow.victim not in KEPT or self._kept(blow.victim) > before)
            )
        process = psutil.Process(self._pid(blow.victim))
        if blow.outcome == UNTOUCHED:
            return lambda: process.status() == psutil.STATUS_STOPPED
        # A zombie waits for its parent.
        return lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

    def _kept(self, fault: str) -> float:
        """What the files of the run count of this fault."""
        if fault == "nan":
            return len([*(self.live.root / "non_finite").glob("*")])
        rows = read_rows(self.live.root / "metrics.jsonl")
        return max((row.get("handshake.mismatch", 0.0) for row in rows), default=0.0)

    def _says(self, pattern: str, *, after: int, within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        while not re.search(pattern, self.live.output[after:], re.MULTILINE):
            said = self.live.output[after:]
            assert time.monotonic() < deadline_s, f"no {pattern!r} in {within_s:g} s:\n{said}"
            time.sleep(0.02)

    def _strike(self, blow: Blow) -> None:
        if blow.kind == "fault":
            (self._folder / "faults" / blow.victim).touch()
            return
        pid, number = self._pid(blow.victim), signal.Signals[blow.kind]
        if number is signal.SIGSTOP:
            self._stopped.append(pid)
        os.kill(pid, number)

    def _pid(self, victim: str) -> int:
        if victim == "driver":
            return psutil.Process(self.live.driver).children()[0].pid
        if victim not in TITLES:
            return self.live.pid(victim)
        found = [pid for pid, line in self.live.processes().items() if TITLES[victim] in line]
        return max(found)  # of the newest start

    def end(self) -> None:
        """Stops the run in order, and checks the laws over all of its lives."""
        os.kill(self.live.driver, signal.SIGTERM)
        run = self.live.finish(timeout_s=120.0)
        for pid in self._stopped:  # the reaper of a driver that was killed since: it ends by itself
            if pid in self.live.processes():
                os.kill(pid, signal.SIGCONT)
        self.live.seconds_until_nothing_is_left(timeout_s=90.0)
        assert run.exit_code == 143, run.output[-5000:]
        for live in (*self.ended, self.live):
            _check_laws(live.root)


def _check_laws(root: Path) -> None:
    """Also of a run that a blow has ended: it has written its summary."""
    summary = json.loads((root / "summary.json").read_text())
    check_conservation(summary["groups"])
    assert summary["groups"]["in_flight"] == 0, root
    assert summary["staleness"]["max"] <= 2, root
    steps = [row["step"] for row in read_rows(root / "metrics.jsonl")]
    assert steps == [*range(len(steps))], root
    times: Counter[int] = Counter()
    for path in (root / "recorded").glob("step_*.safetensors"):
        times.update(group.group_id for group in read_groups(path))
    assert not [group_id for group_id, count in times.items() if count > 1], root
