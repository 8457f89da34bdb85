"""A run in MLflow: what stores hold, what a store without an answer costs, no password anywhere."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service import utils
from tracking_world import (
    ask,
    check_history,
    config_with,
    free_port,
    mlflow_server,
    run_dir_with,
    silent_port,
    step_row,
)

from dapo_async import config as knobs
from dapo_async.config import Config, LearnerConfig, redacted
from dapo_async.tracking import mlflow_store
from dapo_async.tracking.metric_names import MAX_PARAMETER_CHARACTERS, flat_parameters
from dapo_async.tracking.mlflow_faults import Course, fault_of
from dapo_async.tracking.mlflow_run import (
    Description,
    MlflowRun,
    prepare_environment,
    store_uri,
)
from dapo_async.tracking.mlflow_store import NEWEST_ROLLOUT_FILES, MlflowStore, known_run_id
from dapo_async.tracking.run_dir import RunDir

PATIENCE_S = 120.0  # deadline of a working store on a busy machine
SERVER_AWAY_S = 5.0  # most that a server costs at the end if it gives no answer within 1 s


def track(
    config: Config,
    run_dir: RunDir,
    rows: Sequence[dict[str, Any]],
    *,
    status: str = "done",
    deadline_s: float = PATIENCE_S,
    before_end: Callable[[str], None] | None = None,
) -> MlflowStore:
    """A whole run's tracking; what was said is in `said`. `before_end` gets the id of the run."""
    said: list[str] = []
    store = MlflowStore(config, run_dir, say=said.append, run_id=known_run_id(config, run_dir))
    store.start()
    for row in rows:
        store.log_step(row)
    if before_end is not None:
        wait_until(lambda: store.run_id is not None)
        before_end(str(store.run_id))
    store.finish(status, "all steps trained", deadline_s=deadline_s)
    store.said = said  # type: ignore[attr-defined]
    return store


def wait_until(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s, f"it has not happened within {PATIENCE_S:g} s"
        time.sleep(0.05)


def artifacts(client: MlflowClient, run_id: str) -> set[str]:
    top = {item.path for item in client.list_artifacts(run_id)}
    return top - {"rollouts"} | {item.path for item in client.list_artifacts(run_id, "rollouts")}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowStore, RunDir]:
    """A run of 40 steps in the store beside its run directory."""
    run_dir = run_dir_with(tmp_path_factory.mktemp("runs") / "first", num_steps=40)
    rows = run_dir.rows()
    rows[3]["entropy"] = None
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return track(config_with("local", num_steps=40), run_dir, rows), run_dir


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store. To make one takes MLflow seconds, to copy one takes nothing."""
    file = tmp_path_factory.mktemp("new") / "mlflow.db"
    prepare_environment()
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def with_database(new_database: Path, tmp_path: Path) -> Path:
    """The folder of a test, with an empty store of the run directories in it."""
    shutil.copy(new_database, tmp_path / "mlflow.db")
    return tmp_path


def client_of(run_dir: RunDir) -> MlflowClient:
    uri, _ = store_uri("local", run_dir.root.parent)
    return MlflowClient(uri)


def test_store_beside_the_run_directory_has_every_number_at_its_step(
    local: tuple[MlflowStore, RunDir],
) -> None:
    store, run_dir = local
    assert store.run_id is not None
    assert (store.caught, store.said) == ({}, [])  # type: ignore[attr-defined]
    check_history(client_of(run_dir), store.run_id, run_dir.rows())


def test_history_check_notices_one_wrong_number(local: tuple[MlflowStore, RunDir]) -> None:
    store, run_dir = local
    with pytest.raises(AssertionError, match=r"only in the rows: \{\('accuracy', 8, 0\.9\)\}"):
        check_history(
            client_of(run_dir),
            str(store.run_id),
            [{**row, **({"accuracy": 0.9} if row["step"] == 7 else {})} for row in run_dir.rows()],
        )


def test_parameters_are_the_dotted_knobs_and_the_tags_say_how_it_ended(
    local: tuple[MlflowStore, RunDir],
) -> None:
    store, run_dir = local
    run = client_of(run_dir).get_run(str(store.run_id))
    assert run.data.params.keys() == {name for name, *_ in knobs.knobs()}
    assert (
        run.data.params["learner.lr"],
        run.data.params["algorithm.dual_clip"],
        run.data.params["train.num_steps"],
    ) == ("1e-06", "null", "40")
    assert (run.data.tags["status"], run.data.tags["reason"], run.data.tags["run_dir"]) == (
        "done",
        "all steps trained",
        str(run_dir.root),
    )
    assert not any("git" in name for name in run.data.tags)
    assert run.data.tags["mlflow.source.name"] == "dapo-async train"
    text = run.data.tags["mlflow.note.content"]
    assert text.startswith("Trained 0 steps.\n\n- model `")
    assert f"draw it with `dapo-async report {run_dir.root}`" in text
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")


def test_artifacts_are_the_readable_files_and_some_rollouts(
    local: tuple[MlflowStore, RunDir],
) -> None:
    store, run_dir = local
    sampled = {*range(0, 40, 4), 37, 38, 39}  # ten along the run and the newest three
    expected = {
        "config.yaml",
        "summary.json",
        "dynamics.png",
        *(f"rollouts/step_{step:06d}.jsonl" for step in sampled),
    }
    assert artifacts(client_of(run_dir), str(store.run_id)) == expected
    copies = run_dir.root.parent / "mlartifacts" / str(store.run_id) / "artifacts"
    assert (copies / "config.yaml").read_text() == run_dir.config.read_text()
    assert NEWEST_ROLLOUT_FILES == 3


def test_mlflow_json_names_the_run_for_a_resume(local: tuple[MlflowStore, RunDir]) -> None:
    store, run_dir = local
    assert json.loads(run_dir.mlflow.read_text()) == {
        "uri": "local",  # beside the run folder, wherever that is moved
        "experiment": "dapo-async",
        "run_id": store.run_id,
    }
    assert known_run_id(config_with("local"), run_dir) == store.run_id
    assert known_run_id(config_with("sqlite:////elsewhere/mlflow.db"), run_dir) is None


@pytest.mark.parametrize(
    ("status", "closed"),
    [
        ("failed", "FAILED"),
        ("interrupted", "KILLED"),
        ("out_of_time", "FINISHED"),
        ("solved", "FINISHED"),
    ],
)
def test_resumed_run_continues_its_mlflow_run_after_any_end(
    with_database: Path, status: str, closed: str
) -> None:
    run_dir = run_dir_with(with_database / "run", num_steps=4)
    client, rows = client_of(run_dir), run_dir.rows()
    first = track(config_with("local"), run_dir, rows[:3], status=status)
    assert client.get_run(str(first.run_id)).info.status == closed
    longer = replace(config_with("local", num_steps=6), learner=LearnerConfig(lr=2e-6))
    again = track(
        longer, run_dir, rows[2:]
    )  # step 2 came after the checkpoint: it is trained and logged once more
    assert again.run_id == first.run_id
    check_history(client, str(first.run_id), rows)
    run = client.get_run(str(first.run_id))
    assert (run.info.status, run.data.params["train.num_steps"]) == ("FINISHED", "4")
    assert (run.data.tags["resumed.train.num_steps"], run.data.tags["resumed.learner.lr"]) == (
        "6",
        "2e-06",
    )


def test_resumed_run_whose_store_was_removed_begins_a_new_one(with_database: Path) -> None:
    run_dir = run_dir_with(with_database / "run")
    run_dir.mlflow.write_text(
        json.dumps(
            {
                "uri": "local",
                "experiment": "dapo-async",
                "run_id": "0" * 32,
            }
        )
    )
    store = track(config_with("local"), run_dir, run_dir.rows())
    assert store.run_id not in (None, "0" * 32)
    assert json.loads(run_dir.mlflow.read_text())["run_id"] == store.run_id


def cpu_history(client: MlflowClient, run_id: str) -> list[Metric]:
    return list(client.get_metric_history(run_id, "system/cpu_utilization_percentage"))


def check_system_metrics(client: MlflowClient, run_id: str) -> None:
    """Of this machine, in MLflow's units, with steps that go on when the run is resumed."""
    metrics = client.get_run(run_id).data.metrics
    for name in ("cpu_utilization_percentage", "system_memory_usage_percentage"):
        assert 0.0 <= metrics[f"system/{name}"] <= 100.0
    assert metrics["system/system_memory_usage_megabytes"] > 0.0
    assert metrics["system/disk_usage_megabytes"] > 0.0
    assert {"system/network_receive_megabytes", "system/network_transmit_megabytes"} <= {*metrics}
    steps = [point.step for point in cpu_history(client, run_id)]
    assert steps == [*range(len(steps))]


def test_system_metrics_go_on_after_a_store_did_not_answer_once(
    with_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    client = MlflowClient(f"sqlite:///{with_database}/mlflow.db")
    run = MlflowRun(
        Description(f"sqlite:///{with_database}/mlflow.db", "x", "run", None, {}, {}), None
    )
    assert run._monitor is not None
    wait_until(lambda: len(cpu_history(client, run.run_id)) >= 1)
    with monkeypatch.context() as away:
        away.setattr("mlflow.tracking.client.MlflowClient.get_run", no_answer)
        wait_until(lambda: not run._monitor._process.is_alive())
    before = len(cpu_history(client, run.run_id))
    run.log(1, {"accuracy": 0.5}, time_ms=0)
    wait_until(lambda: len(cpu_history(client, run.run_id)) > before)
    run.close("FINISHED")
    check_system_metrics(client, run.run_id)


def no_answer(*_: object) -> None:
    raise MlflowException("no answer")


def test_system_metrics_can_be_turned_off(
    with_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    description = Description(f"sqlite:///{with_database}/mlflow.db", "x", "run", None, {}, {})
    assert MlflowRun(description, None)._monitor is None


@pytest.mark.slow
def test_a_real_server_takes_a_run_and_shows_it_and_the_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{PATIENCE_S:g}")  # a busy server is slow
    local = track(config_with("local"), run_dir_with(tmp_path / "local"), [step_row(0)])
    with mlflow_server(tmp_path) as url:
        run_dir = run_dir_with(tmp_path / "remote")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "served")
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
        client, seen = MlflowClient(url), list[int]()

        def wait_for_samples(run_id: str) -> None:
            wait_until(lambda: len(cpu_history(client, run_id)) >= len(seen) + 2)
            seen.extend(point.step for point in cpu_history(client, run_id))

        remote = track(
            config_with(url),
            run_dir,
            run_dir.rows(),
            status="failed",
            before_end=wait_for_samples,
        )
        assert (remote.caught, remote.said) == ({}, [])  # type: ignore[attr-defined]
        for store, status in ((local, "FINISHED"), (remote, "FAILED")):
            assert ask(url, f"runs/get?run_id={store.run_id}")["run"]["info"]["status"] == status
        history = ask(url, f"metrics/get-history?run_id={remote.run_id}&metric_key=accuracy")[
            "metrics"
        ]
        assert [(point["step"], point["value"]) for point in history] == [
            (step + 1, 0.25 * step) for step in range(4)
        ]
        resumed = track(config_with(url), run_dir, [], status="failed", before_end=wait_for_samples)
        assert resumed.run_id == remote.run_id
        check_system_metrics(client, str(remote.run_id))
        files = {
            item["path"] for item in ask(url, f"artifacts/list?run_id={remote.run_id}")["files"]
        }
        assert files == {"config.yaml", "summary.json", "dynamics.png", "rollouts"}
    assert list((tmp_path / "served").rglob("dynamics.png"))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_the_documented_command_serves_the_local_store(tmp_path: Path) -> None:
    store = track(config_with("local"), run_dir_with(tmp_path / "run"), [step_row(0)])
    with mlflow_server(tmp_path, command=("ui",)) as url:
        found = ask(url, "runs/search", {"experiment_ids": ["1"]})["runs"]
    assert [run["info"]["run_id"] for run in found] == [store.run_id]


@pytest.mark.slow
def test_store_in_a_folder_of_any_name_takes_all_and_may_be_moved(tmp_path: Path) -> None:
    runs = tmp_path / "what?x # %20ü'; b"
    run_dir = run_dir_with(runs / "run 1")
    first = track(config_with("local"), run_dir, run_dir.rows())
    assert (first.caught, first.said) == ({}, [])  # type: ignore[attr-defined]
    assert sorted(path.name for path in runs.iterdir()) == ["mlartifacts", "mlflow.db", "run 1"]
    assert [path.name for path in tmp_path.iterdir()] == [runs.name]
    copies = f"mlartifacts/{first.run_id}/artifacts"
    assert (runs / copies / "config.yaml").is_file()
    moved = tmp_path / "moved"
    runs.rename(moved)
    there = RunDir(moved / "run 1")
    (moved / copies / "summary.json").unlink()
    utils._artifact_repos_cache.clear()  # a resumed run is another process
    again = track(config_with("local"), there, there.rows())
    assert (again.run_id, again.caught) == (first.run_id, {})
    assert (moved / copies / "summary.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    client = client_of(there)
    run = client.get_run(str(first.run_id))
    assert run.info.artifact_uri == (moved / copies).as_uri()
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.artifact_location == (moved / "mlartifacts").as_uri()
    # What time does not change is told once: first the deleted run, then its experiment.
    client.delete_run(str(first.run_id))
    new = track(config_with("local"), there, there.rows())
    assert new.run_id not in (None, first.run_id)
    assert new.caught == {}
    client.delete_experiment(experiment.experiment_id)
    began_s = time.monotonic()
    refused = track(config_with("local"), there, there.rows())
    assert time.monotonic() - began_s < PATIENCE_S / 2
    (line,) = refused.said  # type: ignore[attr-defined]
    assert (
        "can't be used and gets nothing more: its experiment dapo-async was deleted; restore it "
        "with mlflow experiments restore --experiment-id 1, or set MLFLOW_EXPERIMENT_NAME to"
    ) in line
    assert refused.caught == {"mlflow: Unusable": 1}


class Answering(BaseHTTPRequestHandler):
    """Answers every request in the same way."""

    status, body = 200, b""
    credentials: list[str | None]  # of the requests so far

    def answer(self) -> None:
        self.credentials.append(self.headers["Authorization"])
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = do_PATCH = answer

    def log_message(self, *_: object) -> None: ...


@contextmanager
def answering(status: int, body: str, credentials: list[str | None] | None = None) -> Iterator[str]:
    """A server that gives this answer to every request; its URL. `credentials` gets those."""
    seen = [] if credentials is None else credentials
    values = {"status": status, "body": body.encode(), "credentials": seen}
    handler = type("Handler", (Answering,), values)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def opening_error(uri: str, tmp_path: Path, name: str = "x") -> Exception:
    prepare_environment()
    with pytest.raises(Exception) as caught:
        MlflowRun(Description(uri, name, "run", None, {}, {}), None)
    return caught.value


def test_credentials_come_from_the_environment_and_not_from_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    seen: list[str | None] = []
    with answering(404, "{}", seen) as url:
        opening_error(url, tmp_path)
    assert set(seen) == {f"Basic {base64.b64encode(b'me:secret').decode()}"}


@pytest.mark.parametrize(
    ("status", "body", "remedy"),
    [
        (401, "You are not authenticated.", "MLFLOW_TRACKING_USERNAME"),
        (401, '{"detail": "Unauthorized"}', "MLFLOW_TRACKING_USERNAME"),
        (403, "<html>no</html>", "permission"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "permission"),
        (404, "<html>no</html>", "no MLflow server answers there"),
        (404, '{"detail": "Not Found"}', "no MLflow server answers there"),
        (405, "no", "no MLflow server answers there"),
        (200, "<html>Log in</html>", "no MLflow server answers there"),
        (400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "a name"}', "EXPERIMENT_NAME"),
        (200, "{}", "correct tracking.mlflow"),
        (200, '{"hello": 1}', "correct tracking.mlflow"),
        (204, "", "no MLflow server answers there"),
        (400, "{}", "or a proxy before it refuses the request"),
        (401, '{"error": "invalid_token"}', "MLFLOW_TRACKING_TOKEN"),
        (403, '{"error": {"status": 403}}', "MLFLOW_TRACKING_TOKEN"),
        (404, '{"error": "no such page"}', "no MLflow server answers there"),
        (407, "no", "HTTPS_PROXY"),
        (418, "no", "no MLflow server answers there"),
        (511, "<html>Log in</html>", "no MLflow server answers there"),
        (408, "later", None),
        (429, "later", None),
        (500, "oh", None),
        (502, "oh", None),
        (503, '{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}', None),
    ],
)
def test_what_a_server_answers_decides_whether_it_is_tried_again(
    status: int, body: str, remedy: str | None, tmp_path: Path
) -> None:
    with answering(status, body) as url:
        fault = fault_of(opening_error(url, tmp_path), opening=True)
    assert fault.course is (Course.RETRY if remedy is None else Course.STOP)
    assert (remedy or "") in fault.remedy


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("http://no-such-host.invalid:5000", "host name"),
        ("http://127.0.0.1:99999", "correct tracking.mlflow"),
        ("http://", "correct the host name in tracking.mlflow"),
        ("http://a..b:5000", "correct tracking.mlflow"),
        ("nosuchscheme://host/path", "correct tracking.mlflow"),
        ("sqlite:////dev/null/mlflow.db", "folder writable"),
        ("sqlite:///{folder}", "folder writable"),
        ("sqlite:////proc/mlflow.db", "folder writable"),
        ("file://{folder}/mlruns", "set tracking.mlflow=local"),
        ("databricks", "DATABRICKS_TOKEN"),
        ("sqlite:///{folder}/text", "move that file away"),
        ("postgresql+nosuchdriver://127.0.0.1/x", "correct tracking.mlflow"),
        ("http://127.0.0.1:{closed}", None),
    ],
)
def test_an_address_that_can_not_work_is_not_tried_again(
    uri: str, remedy: str | None, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no database " * 1000)
    error = opening_error(uri.format(folder=tmp_path, closed=free_port()), tmp_path)
    fault = fault_of(error, opening=True)
    assert fault.course is (Course.RETRY if remedy is None else Course.STOP), repr(error)
    assert (remedy or "") in fault.remedy, repr(error)


def test_a_database_that_can_not_be_opened_is_told_within_seconds(tmp_path: Path) -> None:
    began_s = time.monotonic()
    error = opening_error(f"sqlite:///{tmp_path}", tmp_path)
    assert time.monotonic() - began_s < 30.0  # MLflow alone tries for a hundred seconds
    assert fault_of(error, opening=True).course is Course.STOP
    MlflowRun(Description(f"sqlite:///{tmp_path}/a/b/x.db", "x", "run", None, {}, {}), None)
    assert (tmp_path / "a" / "b" / "x.db").is_file()


def test_an_experiment_name_that_mlflow_refuses_is_told_with_the_remedy(
    with_database: Path,
) -> None:
    uri = f"sqlite:///{with_database}/mlflow.db"
    error = opening_error(uri, with_database, name="x" * 600)
    fault = fault_of(error, opening=True)
    assert fault.course is Course.STOP, repr(error)
    assert "MLFLOW_EXPERIMENT_NAME" in fault.remedy


@pytest.mark.parametrize(
    ("text", "course"),
    [
        ("The run 1 must be in the 'active' state. Current state is deleted.", Course.STOP),
        ("Detected out-of-date database schema (found version a, but expected b)", Course.STOP),
        ("attempt to write a readonly database", Course.STOP),
        ("certificate verify failed: self-signed certificate", Course.STOP),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", Course.STOP),
        ("No module named 'psycopg2'", Course.STOP),
        ('FATAL: password authentication failed for user "u"', Course.STOP),
        ('FATAL: database "m" does not exist', Course.STOP),
        ("(1045, \"Access denied for user 'u'@'h'\")", Course.STOP),
        ("database is locked", Course.RETRY),
        ("database or disk is full", Course.RETRY),
        ("Connection refused", Course.RETRY),
        ("Connection reset by peer", Course.RETRY),
        ("Temporary failure in name resolution", Course.RETRY),
        ("Read timed out. (read timeout=3)", Course.RETRY),
    ],
)
def test_text_of_an_error_in_the_middle_of_a_run_decides_too(text: str, course: Course) -> None:
    for opening in (True, False):
        assert fault_of(OSError(text), opening=opening).course is course
    assert fault_of(PermissionError("/a"), opening=False).course is Course.SKIP


def test_an_error_that_time_does_not_change_is_told_after_one_that_it_might(
    tmp_path: Path,
) -> None:
    class Leaving(Flaky):
        def log(self, step: int, values: dict[str, float], *, time_ms: int) -> None:
            self.failures += 1
            raise OSError("away" if self.failures < 3 else "attempt to write a readonly database")

    run, said = Leaving(), list[str]()
    store = flaky_store(tmp_path, run, said, retry_s=0.01)
    store.start()
    for step in range(9):
        store.log_step(step_row(step))
    while len(said) < 2:
        time.sleep(0.01)
    store.finish("done", "", deadline_s=PATIENCE_S)
    assert run.failures == 3
    assert "does not answer and is tried again: away; the run goes on" in said[0]
    assert "can't be used and gets nothing more: attempt to write" in said[1]
    assert "make its folder writable" in said[1]
    assert len(said) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_server_without_an_answer_costs_one_line_and_no_training_time(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_dir_with(tmp_path / "run")
    with silent_port() as silent:
        uri = f"http://me:secret@127.0.0.1:{silent if kind == 'silent' else free_port()}"
        said: list[str] = []
        store = MlflowStore(config_with(uri), run_dir, say=said.append)
        began_s = time.monotonic()
        store.start()
        for row in run_dir.rows():
            store.log_step(row)
        # A training path that waits takes the 3 s of a request without an answer.
        assert time.monotonic() - began_s < 2.5, "the training path waited for MLflow"
        while not said:
            time.sleep(0.01)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        began_s = time.monotonic()
        store.finish("done", "all steps trained", deadline_s=PATIENCE_S)
        assert time.monotonic() - began_s < SERVER_AWAY_S
    assert store.run_id is None
    (line,) = said
    assert line.startswith("MLflow at http://***@127.0.0.1:")
    assert f"the run goes on, and {run_dir.root} has everything" in line
    assert "secret" not in line
    assert sum(store.caught.values()) == 1
    assert not run_dir.mlflow.exists()


def test_end_of_a_run_waits_no_longer_than_its_deadline(tmp_path: Path) -> None:
    never = threading.Event()

    def hang(*_: object) -> Any:
        never.wait()

    said: list[str] = []
    store = MlflowStore(
        config_with("local"), run_dir_with(tmp_path / "run"), say=said.append, open_run=hang
    )
    store.finish("done", "all steps trained", deadline_s=0.2)
    never.set()
    assert store.caught["mlflow: late"] == 1
    assert "has not taken everything within 0.2 s" in said[0]


class Flaky:
    """An MLflow run whose server fails `failures` calls and refuses a metric `bad`."""

    run_id = "f" * 32

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.steps: list[int] = []

    def log(self, step: int, values: dict[str, float], *, time_ms: int) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("away")
        if "bad" in values:
            raise MlflowException("Invalid metric name", error_code=1000)
        self.steps.append(step)

    def add_file(self, *_: object) -> None: ...

    def tag(self, *_: object) -> None: ...

    def close(self, status: str) -> None: ...


def flaky_store(tmp_path: Path, run: Flaky, said: list[str], *, retry_s: float) -> MlflowStore:
    return MlflowStore(
        config_with("local"),
        run_dir_with(tmp_path / "run"),
        say=said.append,
        open_run=lambda *_: cast(MlflowRun, run),
        retry_s=retry_s,
    )


def test_a_server_that_comes_back_gets_every_step_in_order(tmp_path: Path) -> None:
    run, said = Flaky(failures=3), list[str]()
    store = flaky_store(tmp_path, run, said, retry_s=0.01)
    store.start()
    for step in range(5):
        store.log_step(step_row(step))
    while len(run.steps) < 5:
        time.sleep(0.01)
    store.finish("done", "", deadline_s=PATIENCE_S)
    assert run.steps == [1, 2, 3, 4, 5]
    assert (len(said), store.caught) == (1, {"mlflow: ConnectionError": 3})


def test_a_server_that_went_away_gets_one_last_attempt_at_the_end(tmp_path: Path) -> None:
    for failures, sent in ((1, [1, 2]), (3, [])):
        run = Flaky(failures)
        store = flaky_store(tmp_path / str(failures), run, [], retry_s=600.0)
        store.log_step(step_row(0))
        store.log_step(step_row(1))
        store.finish("done", "", deadline_s=PATIENCE_S)
        assert run.steps == sent


def test_what_the_store_refuses_is_counted_and_holds_up_nothing(tmp_path: Path) -> None:
    run, said = Flaky(), list[str]()
    store = flaky_store(tmp_path, run, said, retry_s=600.0)
    for step in range(3):
        store.log_step(step_row(step, **({"bad": 1.0} if step == 1 else {})))
    store.finish("done", "", deadline_s=PATIENCE_S)
    assert run.steps == [1, 3]
    assert (len(said), store.caught) == (1, {"mlflow: MlflowException": 1})


def test_artifacts_that_can_not_be_written_hold_up_no_metric(tmp_path: Path) -> None:
    class Moved(Flaky):
        def add_file(self, *_: object) -> None:
            raise PermissionError("/home/of/another/mlartifacts")

    run, said = Moved(), list[str]()
    store = flaky_store(tmp_path, run, said, retry_s=600.0)
    store.start()
    store.log_step(step_row(0))
    store.finish("done", "", deadline_s=PATIENCE_S)
    assert run.steps == [1]
    assert len(said) == 1


def test_a_full_queue_drops_and_counts_instead_of_growing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "MAX_WAITING", 3)
    run = Flaky()
    store = flaky_store(tmp_path, run, [], retry_s=600.0)
    for step in range(1, 10):
        store.log_step(step_row(step))
    assert store.caught["mlflow: queue full"] > 0
    store.finish("done", "", deadline_s=PATIENCE_S)
    assert len(run.steps) <= 3


def test_no_password_of_a_tracking_uri_is_written_down() -> None:
    assert (
        redacted("at http://me:s%2Fecret@host and https://token@host/a?b=c@d")
        == "at http://***@host and https://***@host/a?b=c@d"
    )
    assert (
        redacted("postgresql://me:secret@host:5432/runs, then sqlite:////a/b@c.db")
        == "postgresql://***@host:5432/runs, then sqlite:////a/b@c.db"
    )
    config = config_with("http://me:secret@host:5000")
    assert "secret" not in knobs.to_yaml(config)
    assert "http://***@host:5000" in knobs.to_yaml(config)
    assert "secret" not in str(mlflow_store.describe(config, RunDir(Path("runs/a"))).parameters)


def test_parameters_are_cut_to_what_mlflow_takes() -> None:
    flat = dict(flat_parameters({"data": {"template": "x" * 9000}, "seed": 0, "off": None}))
    assert flat == {"data.template": "x" * MAX_PARAMETER_CHARACTERS, "seed": "0", "off": "null"}
