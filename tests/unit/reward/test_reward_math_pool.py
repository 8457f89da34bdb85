"""Verifier processes: deadlines hold, dead processes are replaced, none is left behind."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from paths import ROOT

from dapo_async.reward import Verdict
from dapo_async.reward.math_verifier import pool as pools
from dapo_async.reward.math_verifier import verify as verifier
from dapo_async.reward.math_verifier.pool import GRACE_S, Pool, VerifierProcess
from dapo_async.reward.math_verifier.size_limits import is_too_large
from dapo_async.reward.math_verifier.verify import Extraction, verify
from dapo_async.reward.math_verifier.worker import wall_s
from dapo_async.reward.verdict_process import kill_session, read_reply

HANGS = [
    r"9^{9^{9^9}}", "100000000!", r"\binom{10^6}{5\cdot10^5}", "2^{1000000000}",
    r"\sum_{k=1}^{10^9}\frac{1}{k^3}", r"\prod_{k=1}^{100000}k", "9!!!!", "((9!)!)!",
    "(x+1)^{100000}", "9**9**9**9", r"\left(9^{9}\right)^{9^{9}}", r"10^{10^{10}}",
]  # fmt: skip
SLOW = [
    r"(x+y+z+w)^{300}",
    r"\prod_{k=1}^{9999}(1+\frac{x}{k})",
    r"\cos^{500}(x)\sin^{500}(x)",
]  # get past the filter


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Two processes of this file's own."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def own_pool(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "shared_pool", lambda: pool)


def child_of(process: VerifierProcess | psutil.Process) -> psutil.Process:
    """The child that judges, as soon as there is one."""
    until_s = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < until_s
        time.sleep(0.005)
    return children[0]


def judging_s(pool: Pool) -> float:
    """Processor time of all children of the pool that have ended."""
    times = [psutil.Process(each.pid).cpu_times() for each in pool.processes if each.pid]
    return sum(each.children_user + each.children_system for each in times)


@pytest.mark.parametrize("extraction", ["marker", "any", "none"])
@pytest.mark.parametrize("text", HANGS)
def test_a_formula_that_would_hang_computer_algebra_is_wrong_at_once(
    text: str, extraction: Extraction
) -> None:
    began_s = time.thread_time()  # nothing waits: no process is asked
    verdict = verify(
        {"marker": rf"\boxed{{{text}}}", "any": f"so it is ${text}$", "none": text}[extraction],
        "42",
        extraction=extraction,
        timeout_s=60,
    )
    assert (verdict.correct, verdict.reason) == (False, "too_large")
    assert time.thread_time() - began_s < 1


@pytest.mark.parametrize(
    "text",
    [
        r"2^{2008}",
        "2^{2^{10}}",
        "100!",
        r"\binom{20}{10}",
        r"\sum_{k=1}^{100} k",
        "x^{100}",
        "1" * 300,
        r"7\cdot10^{30}",
    ],
)
def test_formulas_that_an_answer_may_have_are_not_too_large(text: str) -> None:
    assert not is_too_large(text)


@pytest.mark.slow
@pytest.mark.parametrize("text", SLOW)
def test_a_slow_comparison_ends_at_its_deadline_and_counts_as_wrong(pool: Pool, text: str) -> None:
    for process in pool.processes:
        process.wait_ready()
    began_s, before_s = time.monotonic(), judging_s(pool)
    verdict = verify(rf"\boxed{{{text}}}", r"\sqrt{2}", timeout_s=0.5)
    assert verdict == Verdict(correct=False, extracted=text, reason="timeout")
    # The deadline counts processor time, so a busy machine changes only the time of the clock.
    assert 0.35 < judging_s(pool) - before_s < 1.0
    assert time.monotonic() - began_s < wall_s(0.5) + GRACE_S
    assert verify(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").correct
    assert not any(
        psutil.Process(process.pid).children() for process in pool.processes if process.pid
    )


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["process", "child"])
def test_a_death_during_a_verdict_is_failed_never_wrong_and_is_replaced(
    pool: Pool, whom: str
) -> None:
    alone = Pool(1)
    (process,) = alone.processes
    question = {"answer": SLOW[0], "gold": "42", "anywhere": False}
    alone.ask({**question, "answer": "x+1"}, 5)
    with ThreadPoolExecutor(1) as thread:
        reply = thread.submit(alone.ask, question, 60)
        child, before = child_of(process), process.pid
        assert before is not None
        os.kill(child.pid if whom == "child" else before, signal.SIGKILL)
        assert reply.result(120) == {"reason": "failed"}
    assert alone.ask({"answer": r"\sqrt{8}", "gold": r"2\sqrt{2}", "anywhere": False}, 30) == {
        "equal": True
    }
    assert (process.pid == before) == (whom == "child")
    child.wait(30)
    alone.stop()


def test_a_failed_reply_makes_a_failed_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, str]:
            return {"reason": "failed"}

    monkeypatch.setattr(verifier, "shared_pool", Dead)
    verdict = verify("Answer: x+1", "x")
    assert (verdict.failed, verdict.reason) == (True, "failed")
    assert not verify("Answer: 3", "4").failed


def test_any_number_of_threads_get_their_own_answers(pool: Pool) -> None:
    questions = [(rf"\boxed{{x+{number}}}", f"{number % 3}+x") for number in range(24)]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda question: verify(*question, timeout_s=30), questions))
    assert [verdict.correct for verdict in verdicts] == [number < 3 for number in range(24)]


def test_a_process_that_died_between_two_verdicts_fails_none(pool: Pool) -> None:
    pool.processes[-1].wait_ready()  # one lives, even if this test runs alone
    for process in pool.processes:
        if process.pid:
            os.kill(process.pid, signal.SIGKILL)
            psutil.wait_procs([psutil.Process(process.pid)], timeout=30)
    assert verify(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").reason == "correct"


@pytest.mark.slow
def test_a_process_is_recycled_after_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "RECYCLE_AFTER", 2)
    alone, pids = Pool(1), []
    for _ in range(3):
        assert alone.ask({"answer": "x+1", "gold": "1+x", "anywhere": False}, 30) == {"equal": True}
        pids.append(alone.processes[0].pid)
    alone.stop()
    assert pids[0] == pids[1] != pids[2]


@pytest.mark.slow
def test_no_process_outlives_a_parent_that_is_killed() -> None:
    script = (
        "from dapo_async.reward.math_verifier.pool import Pool\n"
        "import threading, time; pool = Pool(1)\n"
        "pool.ask({'answer': 'x+1', 'gold': 'x', 'anywhere': False}, 30)\n"
        f"slow = {{'answer': {SLOW[0]!r}, 'gold': '42', 'anywhere': False}}\n"
        "threading.Thread(target=pool.ask, args=(slow, 60), daemon=True).start()\n"
        "print(pool.processes[0].pid, flush=True); time.sleep(60)"
    )
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        child = child_of(process)
        parent.kill()
        gone, alive = psutil.wait_procs([process, child], timeout=30)
    assert (len(gone), alive) == (2, [])


def test_a_verifier_process_that_does_not_start_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        pools, "COMMAND", (sys.executable, "-c", 'print(\'{"error": "no engine here"}\')')
    )
    with pytest.raises(RuntimeError, match="the verifier process did not start: no engine here"):
        Pool(1).ask({"answer": "x", "gold": "y", "anywhere": False}, 5)
    monkeypatch.setattr(pools, "COMMAND", (sys.executable, "-c", ""))
    with pytest.raises(RuntimeError, match="the verifier process did not start: it died"):
        Pool(1).ask({"answer": "x", "gold": "y", "anywhere": False}, 5)


def test_reply_is_read_from_a_descriptor_above_the_limit_of_select() -> None:
    """A rollout process with many connections has such descriptors."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print('{}')"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 1500:
        pytest.skip(f"the limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 1500), hard))
    high = fcntl.fcntl(process.stdout.fileno(), fcntl.F_DUPFD, 1100)
    try:
        with os.fdopen(high, "rb", buffering=0) as pipe:
            process.stdout, low = pipe, process.stdout
            assert read_reply(process, time.monotonic() + 20.0) == {}
            process.stdout = low
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        kill_session(process)
