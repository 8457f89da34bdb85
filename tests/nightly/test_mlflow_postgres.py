"""MLflow over PostgreSQL: a real server with an artifact store, and the database without a server.

PostgreSQL comes from the system (Debian: `apt-get install postgresql`). Without it the test is
skipped.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tracking_world import check_history, config_with, free_port, mlflow_server, run_dir_with

from dapo_async.tracking.mlflow_store import MlflowStore, known_run_id
from dapo_async.tracking.run_dir import RunDir

pytestmark = pytest.mark.timeout(600)
PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
DEADLINE_S = 120.0


def program(name: str) -> str | None:
    """Debian keeps PostgreSQL's programs out of the search path."""
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, PLACES)]))


@pytest.fixture
def database() -> Iterator[str]:
    """The URI of an empty database on a new PostgreSQL server of this machine."""
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # The server refuses root, and pytest's folders are closed to other users.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(f"/tmp/dapo-async-postgres-{os.getpid()}")
    folder.mkdir()
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port, data = free_port(), folder / "data"

    def run(*words: str) -> None:
        ran = subprocess.run(
            words, user=user, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr

    try:
        run(initdb, "-D", str(data), "-U", "mlflow", "--auth=trust", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(folder / "log")
        run(pg_ctl, "-D", str(data), "-l", log, "-o", options, "-w", "start")
        try:
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def track(uri: str, run_dir: RunDir) -> MlflowStore:
    """A whole run's tracking."""
    config, said = config_with(uri), list[str]()
    store = MlflowStore(config, run_dir, say=said.append, run_id=known_run_id(config, run_dir))
    store.start()
    for row in run_dir.rows():
        store.log_step(row)
    store.finish("done", "all steps trained", deadline_s=DEADLINE_S)
    assert (store.caught, said) == ({}, [])
    return store


def test_a_server_over_postgresql_and_the_database_alone_take_a_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{DEADLINE_S:g}")
    run_dir = run_dir_with(tmp_path / "served")
    with mlflow_server(tmp_path, database=database) as url:
        served = track(url, run_dir)
        check_history(MlflowClient(url), str(served.run_id), run_dir.rows())
        assert served.run_id == track(url, run_dir).run_id  # a resumed run continues it
    assert list((tmp_path / "served").rglob("dynamics.png"))
    direct_dir = run_dir_with(tmp_path / "direct")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "direct")
    direct = track(database, direct_dir)
    check_history(MlflowClient(database), str(direct.run_id), direct_dir.rows())
