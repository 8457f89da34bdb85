"""`dapo-async submit`: what it hands to Ray and what it prints. The job server is a fake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_jobs import FakeJobs, details
from paths import QUICKSTART, ROOT
from run_folders import run_of

from dapo_async.cli.main import main
from dapo_async.runtime.cluster import jobs
from dapo_async.runtime.cluster.jobs import JobServer

ADDRESS = "http://10.0.0.1:8265"
CONFIG = str(QUICKSTART.relative_to(ROOT))
START = f"dapo-async submit --address {ADDRESS}"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    client = FakeJobs(states=[details("quickstart", "SUCCEEDED", code=0)])
    monkeypatch.setattr(
        jobs, "connect", lambda address: JobServer(client, address, pause=lambda _: None)
    )
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ADDRESS)
    monkeypatch.chdir(ROOT)
    return client


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_job_runs_train_with_the_same_words(
    client: FakeJobs, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (CONFIG, "train.num_steps=3", 'data.template="{problem} ="', "--supervise", "--detach")
    assert main(["submit", *words, "learner.lr=1e-4"]) == 0
    (job,) = client.submitted
    assert job["command"] == (
        "dapo-async train configs/quickstart.yaml train.num_steps=3 "
        "'data.template=\"{problem} =\"' "
        "learner.lr=1e-4 --supervise"
    )
    assert job["id"] == "quickstart"
    assert job["about"]["run"] == "quickstart"
    assert job["about"]["config"] == CONFIG
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"job quickstart submitted to {ADDRESS}: run quickstart, config ")
    assert out[1:] == [
        f"follow     {START} --status quickstart --follow",
        f"stop       {START} --stop quickstart",
    ]


def test_the_job_is_named_after_the_run_directory(client: FakeJobs) -> None:
    client.known = [details("math-1.5B", "FAILED"), details("odd-name", "RUNNING")]
    assert main(["submit", CONFIG, "run_dir=/shared/math-1.5B", "--detach"]) == 0
    resume = ("submit", "--resume", "/shared/runs/a b", "train.num_steps=9", "--from", "best")
    assert main([*resume, "--detach"]) == 0
    assert main(["submit", CONFIG, "--submission-id", "my name", "--detach"]) == 0
    first, second, third = client.submitted
    assert first["id"] == "math-1.5B-2"
    assert (second["id"], second["command"]) == (
        "a-b",
        "dapo-async train --resume '/shared/runs/a b' --from best train.num_steps=9",
    )
    assert third["id"] == "my-name"


def test_secrets_travel_by_name_and_are_not_printed(
    client: FakeJobs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {HF_HOME: /shared/hf}\npip: [einops]\n")
    words = (CONFIG, "--env", "WANDB_API_KEY", "--runtime-env", str(file), "--wait")
    assert main(["submit", *words]) == 0
    (job,) = client.submitted
    assert job["env"]["env_vars"]["WANDB_API_KEY"] == "very-secret"
    assert job["env"]["env_vars"]["HF_HOME"] == "/shared/hf"
    assert job["env"]["pip"] == ["einops"]
    captured = capsys.readouterr()
    assert "very-secret" not in captured.out + captured.err
    assert "job quickstart: SUCCEEDED\n" in captured.out


def test_a_followed_job_ends_with_the_status_of_its_run_and_its_exit_code(
    client: FakeJobs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    (root / "metrics.jsonl").write_text("")
    summary = {"status": "failed", "reason": "learner died"}
    (root / "summary.json").write_text(json.dumps(summary))
    client.log = f"run directory {root}\nfailed: learner died\n"
    client.connections = [[client.log]]
    message = f"Job entrypoint command failed, last available logs:\n{client.log}"
    client.states = [details("quickstart", "FAILED", message=message, code=1)]
    assert main(["submit", CONFIG]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1:3] == client.log.splitlines()
    assert out[3].startswith(f"run        {root}")
    assert out[4].startswith("state      ended")
    assert out[-1] == "job quickstart: FAILED after 41 s, exit code 1: failed: learner died"


def test_status_of_a_job_elsewhere_ends_with_its_newest_lines(
    client: FakeJobs, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"run": "quickstart", "config": CONFIG, "commit": "80f37db"}
    client.log = "run directory /not/here\n" + "".join(f"step {n}\n" for n in range(30))
    client.states = [details("quickstart", "RUNNING", metadata=about)]
    assert main(["submit", "--status", "quickstart"]) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "run        /not/here (not on this machine); the newest lines of the job:"
    assert out[1:13] == [f"step {n}" for n in range(18, 30)]
    assert out[13] == f"follow     {START} --status quickstart --follow"
    assert out[-1].startswith(
        f"job quickstart (run quickstart, config {CONFIG}, commit 80f37db): RUNNING after "
    )


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(
    client: FakeJobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobServer, "follow", interrupt)
    assert main(["submit", CONFIG]) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"the job quickstart goes on; to stop it: {START} --stop quickstart"


def test_stop_waits_for_the_end_of_the_job(
    client: FakeJobs, capsys: pytest.CaptureFixture[str]
) -> None:
    client.states = [details("quickstart", "RUNNING"), details("quickstart", "STOPPED")]
    client.stop_answers = [True]
    assert main(["submit", "--stop", "quickstart"]) == 0
    assert "job quickstart: STOPPED after 41 s, exit code 143\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "what to submit? give a YAML file"),
        ([CONFIG, "--wait", "--detach"], "--wait and --detach do not go together"),
        ([CONFIG, "--stop", "a"], "--stop takes the id of a job and nothing to submit"),
        ([CONFIG, "--resume", "/a"], "--resume uses the config of the run; leave out "),
        ([CONFIG, "--from", "best"], "--from best needs --resume RUN_DIR"),
        ([CONFIG, "learner.lrr=1"], "unknown key learner.lrr; did you mean learner.lr?"),
        ([CONFIG, "train.resume=auto"], "train.resume=auto needs a fixed run_dir"),
        ([CONFIG, "--env", "NOT_SET"], "--env NOT_SET: this variable is not set here"),
        ([CONFIG, "--runtime-env", "/not/here"], "--runtime-env /not/here can't be read: No such"),
        (["/etc/hostname"], "/etc/hostname must be in the working directory ("),
    ],
)
def test_wrong_input_is_refused_before_anything_is_sent(
    client: FakeJobs, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert refused(capsys, *words).removeprefix("dapo-async: ").startswith(line)
    assert client.submitted == []


def test_a_file_that_is_no_runtime_environment_is_refused(
    client: FakeJobs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for content in ("- a\n", "a: [\n"):
        (tmp_path / "env.yaml").write_text(content)
        line = refused(capsys, CONFIG, "--runtime-env", str(tmp_path / "env.yaml"))
        assert line.endswith("; correct the file")


def test_a_working_directory_from_elsewhere_may_have_any_config(
    client: FakeJobs, tmp_path: Path
) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("working_dir: s3://bucket/code.zip\n")
    words = ("my/run.yaml", "learner.lr=1", "--runtime-env", str(file), "--detach")
    assert main(["submit", *words]) == 0
    (job,) = client.submitted
    assert (job["id"], job["command"]) == ("run", "dapo-async train my/run.yaml learner.lr=1")
    assert "commit" not in job["about"]
