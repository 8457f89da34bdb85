"""The user's verifier in a process: whatever it does, there is a verdict, in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from dapo_async.reward.own_verifier import OwnVerifier

MODULE = """
import os, sys, time
from dapo_async.reward import Verdict

calls = 0

def judge(response, gold, prompt):
    global calls
    calls += 1
    print("a line that is no reply")
    os.system("echo another one")
    if response == "raise":
        raise KeyError("no\\nsuch row")
    if response == "exit":
        sys.exit(3)
    if response == "die":
        os._exit(0)
    if response == "hang":
        time.sleep(60)
    if response == "hang in C":
        import re
        re.match(r"(a+)+$", "a" * 60 + "b")  # holds the lock of the interpreter for years
    if response == "bool":
        return True
    if response == "three":
        return Verdict(3.0, None, "three")
    if response == "number":
        return Verdict(0.25, 4, "quarter")
    if response == "slow":
        time.sleep(0.5)
    return Verdict(response == gold, prompt, f"call-{calls}")
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnVerifier]:
    (tmp_path / "my_judge.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    verifier = OwnVerifier("my_judge:judge", timeout_s=1.0)
    yield verifier
    verifier.stop()


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "my_judge:judge" in child.cmdline()
    ]


def test_a_verdict_comes_back_and_the_process_keeps_its_state(judge: OwnVerifier) -> None:
    first, second = judge("4", "4", prompt="2+2="), judge("\ud83d ∑\n", "4")
    assert (first.correct, first.extracted, first.reason) == (True, "2+2=", "call-1")
    assert (second.correct, second.extracted, second.reason) == (False, "", "call-2")
    quarter = judge("number", "4")
    assert (quarter.correct, quarter.extracted, quarter.reason) == (0.25, "4", "quarter")
    assert len(children()) == 1


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        ("raise", "my_judge:judge raised KeyError: 'no\\nsuch row' ("),
        ("exit", "my_judge:judge raised SystemExit: 3 ("),
        ("die", "my_judge:judge ended its process"),
        ("hang", "my_judge:judge gave no verdict within 1 s"),
        ("hang in C", "my_judge:judge gave no verdict within 1 s"),
        ("bool", "my_judge:judge returned bool, must return dapo_async.reward.Verdict"),
        ("three", "my_judge:judge returned accuracy 3.0, which must lie in [0, 1]"),
    ],
)
def test_a_call_without_a_verdict_is_failed_and_the_next_one_works(
    judge: OwnVerifier, response: str, detail: str
) -> None:
    began_s = time.monotonic()
    verdict = judge(response, "4")
    assert (verdict.failed, verdict.correct) == (True, False)
    assert verdict.detail.startswith(detail), verdict.detail
    assert "\n" not in verdict.detail
    assert judge("4", "4").correct is True
    assert time.monotonic() - began_s < 30.0


def test_calls_of_several_threads_run_at_the_same_time(judge: OwnVerifier) -> None:
    judge("4", "4")
    with ThreadPoolExecutor(3) as threads:
        began_s = time.monotonic()
        verdicts = [*threads.map(lambda _: judge("slow", "slow"), range(3))]
        assert [verdict.correct for verdict in verdicts] == [True] * 3
        assert len(children()) == 3
        began_s = time.monotonic()
        assert all(threads.map(lambda _: judge("slow", "slow").correct, range(3)))
        assert time.monotonic() - began_s < 1.4  # one after the other they would take 1.5 s
    assert len(children()) == 3
    judge.stop()
    assert children() == []


def test_a_process_that_was_killed_between_two_calls_fails_none(judge: OwnVerifier) -> None:
    judge("4", "4")
    (process,) = children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert judge("4", "4").correct is True


def test_the_deadline_holds_for_a_process_that_does_not_read_its_request(
    judge: OwnVerifier,
) -> None:
    long = "4" * 2**20  # more than a pipe holds
    assert judge(long, long).correct is True
    (process,) = children()
    process.send_signal(signal.SIGSTOP)
    began_s = time.monotonic()
    verdict = judge(long, long)
    assert time.monotonic() - began_s < 10.0
    assert verdict.detail == "my_judge:judge gave no verdict within 1 s"
    assert judge(long, long).correct is True
    assert process.pid not in [child.pid for child in children()]


def test_a_module_that_cannot_be_imported_in_the_process_is_a_failed_verdict(
    judge: OwnVerifier, tmp_path: Path
) -> None:
    (tmp_path / "my_judge.py").write_text("import no_such_module")
    verdict = judge("4", "4")
    assert verdict.failed
    assert "its process did not start: " in verdict.detail
    assert "No module named 'no_such_module'" in verdict.detail


def test_no_process_outlives_a_parent_that_is_killed_while_the_function_hangs(
    judge: OwnVerifier,
) -> None:
    child = os.fork()
    if child == 0:
        judge("hang in C", "4")
        os._exit(0)
    until_s = time.monotonic() + 60
    while not (grandchildren := children()):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    threading.Event().wait(0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    gone, alive = psutil.wait_procs(grandchildren, timeout=30)
    assert (len(gone), alive) == (1, [])
