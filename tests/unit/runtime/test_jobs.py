"""Jobs of a cluster: names, the runtime environment, the log, the end. No cluster runs here."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import yaml
from fake_jobs import FakeJobs, details
from paths import ROOT
from ray.exceptions import AuthenticationError

from dapo_async.runtime.cluster import jobs
from dapo_async.runtime.cluster.jobs import (
    EXCLUDES,
    Job,
    JobServer,
    JobState,
    Unreachable,
    connect,
    free_id,
    job_environment,
)

ADDRESS = "http://10.0.0.1:8265"
AWAY = ConnectionError(f"Failed to connect to Ray at address: {ADDRESS}.")


def job(*, alone: bool = False) -> Job:
    return Job("math", "dapo-async train a.yaml", {"working_dir": "."}, {"run": "math"}, alone)


def server(client: FakeJobs) -> JobServer:
    return JobServer(client, ADDRESS, pause=lambda _: None)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "math"),
        ({"math": "FAILED"}, "math-2"),
        ({"math": "SUCCEEDED", "math-2": "STOPPED"}, "math-3"),
        ({"math": "RUNNING"}, "math-2"),  # each run has a directory of its own
        ({"math-2": "FAILED"}, "math"),
    ],
)
def test_a_name_that_was_used_gets_a_number(known: dict[str, str], expected: str) -> None:
    assert free_id(job(), known) == expected


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_job_whose_run_directory_is_in_use_is_refused(state: str) -> None:
    known = {"math": "FAILED", "math-2": state}
    with pytest.raises(ValueError, match=f"^the job math-2 is still {state.lower()}, and two runs"):
        free_id(job(alone=True), known)
    assert free_id(job(alone=True), {"math": "FAILED", "math-2": "STOPPED"}) == "math-3"


def test_an_id_that_another_submit_takes_meanwhile_is_passed_over() -> None:
    client = FakeJobs(known=[details("math", "FAILED")], taken={"math-2"})
    assert server(client).submit(job()) == "math-3"
    assert client.submitted == [
        {
            "command": "dapo-async train a.yaml",
            "id": "math-3",
            "env": {"working_dir": "."},
            "about": {"run": "math"},
        }
    ]


def test_a_cluster_that_has_just_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    early = RuntimeError(
        "Request failed with status code 500: No available agent to submit job, please try again "
        "later."
    )
    client = FakeJobs(submit_errors=[early, early])
    assert server(client).submit(job()) == "math"
    monkeypatch.setattr(jobs, "READY_S", -1.0)
    with pytest.raises(ValueError, match=r"took the job .* --dashboard-agent-listen-port"):
        server(FakeJobs(submit_errors=[early])).submit(job())


def test_a_job_gets_variables_by_name_and_the_time_for_its_last_checkpoint() -> None:
    given = {"env_vars": {"A": "1"}, "excludes": ["/big"], "pip": ["einops"]}
    made = job_environment(given, ["KEY"], {"KEY": "secret", "OTHER": "2"})
    assert made == {
        "working_dir": ".",
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600", "A": "1", "KEY": "secret"},
        "excludes": [*EXCLUDES, "/big"],
        "pip": ["einops"],
    }
    longer = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}, "working_dir": "s3://a/b.zip"}
    made = job_environment(longer, [], {})
    assert (made["env_vars"], made["working_dir"]) == (longer["env_vars"], "s3://a/b.zip")


def test_the_file_for_rays_own_command_has_what_submit_sends() -> None:
    made = job_environment({}, [], {})
    del made["working_dir"]
    file = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    assert file == {name: made[name] for name in ("excludes", "env_vars")}


def test_no_message_about_a_variable_has_its_value() -> None:
    with pytest.raises(ValueError, match=r"^--env KEY: this variable is not set here") as caught:
        job_environment({}, ["KEY"], {})
    with pytest.raises(ValueError, match=r"without its value: --env KEY; export") as given:
        job_environment({}, ["KEY=secret"], {})
    assert "secret" not in f"{caught.value}{given.value}"


def test_a_log_is_written_once_over_two_broken_connections() -> None:
    running, ended = details("math", "RUNNING"), details("math", "SUCCEEDED", code=0)
    client = FakeJobs(
        states=[running, AWAY, running, ended],
        connections=[
            ["one\ntwo\n", RuntimeError("WebSocket connection closed unexpectedly")],
            [OSError("away")],
            ["one\n", "two\nthr", "ee\n"],
        ],
        log="one\ntwo\nthree\nfour\n",
    )
    written: list[str] = []
    state = server(client).follow("math", written.append)
    assert "".join(written) == "one\ntwo\nthree\nfour\n"
    assert (state.state, state.exit_code, state.seconds) == ("SUCCEEDED", 0, 41.0)


def test_a_job_is_waited_for_and_each_state_is_seen_once() -> None:
    states = ["PENDING", "PENDING", "RUNNING", "RUNNING", "STOPPED"]
    client, seen = FakeJobs(states=[details("math", each) for each in states]), []
    state = server(client).wait("math", lambda state: seen.append(state.state))
    assert seen == ["PENDING", "RUNNING", "STOPPED"]
    assert state.exit_code == 143


def test_a_job_that_has_not_started_is_asked_again_to_stop() -> None:
    pending, running = details("math", "PENDING"), details("math", "RUNNING")
    states = [pending, pending, running, running, details("math", "STOPPED")]
    client = FakeJobs(states=states, stop_answers=[False, False, True])
    assert server(client).stop("math").state == "STOPPED"
    assert client.stop_answers == []  # no further one after it was heard


def test_a_server_that_stays_away_is_named_with_what_to_ask_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "LOST_S", 0.0)
    with pytest.raises(Unreachable, match=r"^no job server answers at .*; the job math may go on"):
        server(FakeJobs(states=[AWAY])).wait("math", lambda _: None)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeJobs):
        def get_job_info(self, job_id: str) -> Any:
            threading.Event().wait(5)

    monkeypatch.setattr(jobs, "ANSWER_S", 0.05)
    with pytest.raises(Unreachable, match=r"has not answered within 0\.05 s$"):
        server(Silent()).state("math")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (AuthenticationError("no token"), "asks for another token; export RAY_AUTH_MODE=token"),
        (
            RuntimeError("Request failed with status code 404: Job math does not exist."),
            rf"^Job math does not exist at {ADDRESS}; ray job list",
        ),
        (
            RuntimeError("Request failed with status code 500: Traceback\n  File x\nKeyError: 'a'"),
            r"refuses: KeyError: 'a'; correct it",
        ),
        (
            ValueError("Package size (600.0MiB) exceeds the maximum size of 512MiB. To exclude"),
            r"^the working directory is too large to send: Package size .* 512MiB; list large",
        ),
    ],
)
def test_what_the_client_raises_becomes_one_line(error: Exception, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        server(FakeJobs(states=[error])).state("math")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
    ],
)
def test_exit_code_is_that_of_the_command(state: str, code: int | None, expected: int) -> None:
    assert JobState("math", state, driver_code=code).exit_code == expected


def test_reason_of_a_failed_job_is_the_last_line_of_its_log() -> None:
    message = "Job entrypoint command failed with exit code 1, last lines:\nstep 1\nfailed: no data"
    state = server(FakeJobs(states=[details("math", "FAILED", message=message, code=1)]))
    assert state.state("math").reason == "failed: no data"


@pytest.mark.parametrize("address", ["10.0.0.1:8265", "ray://10.0.0.1:10001", "auto", "http://"])
def test_an_address_that_is_no_url_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be the URL of the cluster's dashboard"):
        connect(address)


def test_an_address_where_nobody_listens_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # does not replace the given one
    with pytest.raises(ValueError, match=r"^no job server answers at http://127\.0\.0\.1:9; give"):
        connect("http://127.0.0.1:9")
