"""`train --supervise`: which ends of a child start another one. The children are small scripts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dapo_async.runtime import run_keeper
from dapo_async.runtime.run_keeper import LifeSign, RunKeeper

# Each child does what the next line of `plan` says, and notes its arguments.
CHILD = """
import json, os, signal, sys, time
from contextlib import suppress
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, {project!r})
calls = root / "calls"
number = len(calls.read_text().splitlines()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(" ".join(sys.argv[2:]) + chr(10))
exec((root / "plan").read_text().splitlines()[number])
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "os.write(int(os.environ['DAPO_ASYNC_PULSE_FD']), b'.'); time.sleep(60)"
WAITS = (
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); (root / 'up').touch(); time.sleep(60)"
)
SAVES = "(root / 'checkpoints' / f'step_{number:06d}').mkdir(parents=True); sys.exit(1)"


def failed(restartable: bool) -> str:
    summary = json.dumps({"restartable": restartable, "reason": "no batch"})
    return f"(root / 'summary.json').write_text({summary!r}); sys.exit(1)"


def keep(root: Path, *plan: str, began: bool = True) -> tuple[int, list[str], list[str]]:
    """Exit code, the arguments of each child, and what was said."""
    root.mkdir(exist_ok=True)
    (root / "plan").write_text("\n".join(plan) + "\n")
    (root / "child.py").write_text(CHILD.format(project=str(Path(run_keeper.__file__).parents[2])))
    if began:
        (root / "config.yaml").touch()
    said: list[str] = []
    program = (sys.executable, str(root / "child.py"), str(root))
    keeper = RunKeeper(root, silence_s=1.0, say=said.append, program=program)
    code = keeper.keep(["a.yaml", f"run_dir={root}"])
    return code, (root / "calls").read_text().splitlines(), said


def test_killed_driver_is_resumed_until_the_run_is_done(tmp_path: Path) -> None:
    code, calls, said = keep(tmp_path, KILLED, failed(True), "sys.exit(0)")
    assert code == 0
    resume = f"train --resume {tmp_path}"
    assert calls == [f"train a.yaml run_dir={tmp_path}", resume, resume]
    assert said[0].startswith("the driver was killed by SIGKILL; resuming the run (1 of 5")
    assert said[1].startswith("the driver ended with exit code 1; resuming the run in 1 s (2 of 5")


@pytest.mark.parametrize(
    ("end", "began", "code"),
    [
        ("sys.exit(0)", True, 0),
        ("sys.exit(2)", True, 2),  # wrong input
        (failed(False), True, 1),  # it would end in the same way again
        ("sys.exit(1)", False, 1),  # there is no run to resume
    ],
)
def test_ends_that_no_restart_can_change(tmp_path: Path, end: str, began: bool, code: int) -> None:
    assert keep(tmp_path, end, began=began) == (code, [f"train a.yaml run_dir={tmp_path}"], [])


def test_each_child_but_the_first_knows_that_it_is_a_restart(tmp_path: Path) -> None:
    """All steps may be trained then: that is the end of the run, and no wrong input."""
    is_set = f"{run_keeper.RESTARTED!r} in os.environ"
    first = f"(root / 'first').write_text(str({is_set})); {KILLED}"
    code, calls, _ = keep(tmp_path, first, f"sys.exit(0 if {is_set} else 3)")
    assert (code, len(calls)) == (0, 2)
    assert (tmp_path / "first").read_text() == "False"


def test_driver_that_hangs_is_ended_and_the_run_resumed(tmp_path: Path) -> None:
    began_s = time.monotonic()
    code, calls, said = keep(tmp_path, HANGS, "sys.exit(0)")
    assert (code, len(calls)) == (0, 2)
    assert said[0] == "the driver did not run for 1 s; ending it"
    assert time.monotonic() - began_s < 20


def test_budget_ends_the_run_unless_checkpoints_get_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_keeper, "RESTARTS", 1)
    code, calls, said = keep(tmp_path / "stuck", "sys.exit(1)", "sys.exit(1)", "sys.exit(0)")
    assert (code, len(calls)) == (1, 2)
    assert said[-1].endswith("it was restarted 1 times without a newer checkpoint, so the run ends")
    _, _, said = keep(tmp_path / "failed", failed(True), failed(True))
    assert said[-1].endswith("so the run ends: no batch")  # the last line of a job has the reason
    code, calls, _ = keep(tmp_path / "moves", SAVES, SAVES, SAVES, "sys.exit(0)")
    assert (code, len(calls)) == (0, 4)


def test_restart_that_waited_for_nodes_in_vain_is_the_last_one(tmp_path: Path) -> None:
    """Its exit code says that the run has failed: a run began with this input."""
    (tmp_path / "plan").write_text(f"{KILLED}\ntime.sleep(0.3); sys.exit(2)\nsys.exit(0)\n")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "child.py").write_text(
        CHILD.format(project=str(Path(run_keeper.__file__).parents[2]))
    )
    program = (sys.executable, str(tmp_path / "child.py"), str(tmp_path))

    def code_of(nodes_wait_s: float) -> int:
        (tmp_path / "calls").unlink(missing_ok=True)
        keeper = RunKeeper(
            tmp_path, silence_s=5.0, nodes_wait_s=nodes_wait_s, say=print, program=program
        )
        return keeper.keep(["a.yaml"])

    assert code_of(0.3) == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert code_of(600.0) == 0  # the cluster did not answer: it may again


def test_signal_reaches_the_child_and_no_other_child_starts(tmp_path: Path) -> None:
    def stop() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, calls, _ = keep(tmp_path, WAITS)
    assert (code, len(calls)) == (143, 1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_child_shows_that_it_runs_and_while_it_trains_that_its_loop_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_keeper, "BEAT_S", 0.02)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def signs() -> int:
        """That came since the last call."""
        with suppress(BlockingIOError):
            return len(os.read(reader, 4096))
        return 0

    async def run() -> None:
        sign = LifeSign({run_keeper.PULSE_FD: str(writer)})
        sign.start()
        time.sleep(0.5)  # an import that keeps the loop
        assert signs() > 1
        async with sign.of_the_loop():
            await asyncio.sleep(0.5)
            assert signs() > 1
            time.sleep(0.2)
            signs()
            time.sleep(0.3)  # the loop hangs
            assert signs() == 0
            await asyncio.sleep(0.2)
            assert signs() > 0
        time.sleep(0.5)  # a picture is drawn
        assert signs() > 1

    try:
        asyncio.run(run())
    finally:
        os.close(reader)  # ends the thread
        time.sleep(0.1)
        os.close(writer)


def test_child_without_a_parent_shows_nothing() -> None:
    sign, before = LifeSign({}), threading.active_count()
    sign.start()
    assert threading.active_count() == before
