"""Which Ray a run uses and where it writes, decided before Ray is imported."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from paths import QUICKSTART
from run_support import command

from dapo_async.runtime.cluster import address
from dapo_async.runtime.cluster.address import CHECK, Choice, Gone, choose
from dapo_async.runtime.cluster.environment import JOB, RUNS, prepare, run_root


class FakeGcs(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers as Ray's GCS does: a call without the right token is refused."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return (
            grpc.unary_unary_rpc_method_handler(self._answer) if details.method == CHECK else None
        )

    def _answer(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        if (
            self._token
            and ("authorization", f"Bearer {self._token}") not in context.invocation_metadata()
        ):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""


@contextmanager
def gcs(*handlers: grpc.GenericRpcHandler) -> Iterator[str]:
    """A gRPC server; its HOST:PORT."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait(5.0)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without Ray; its address file, which is not there yet."""
    for name in (
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_USE_TLS",
        JOB,
        RUNS,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def refusal(given: str) -> str:
    with pytest.raises(ValueError) as error:
        choose(given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_auto_without_any_cluster_is_an_own_ray() -> None:
    assert choose("auto") == Choice("local")


def test_auto_joins_the_live_cluster_of_the_address_file(machine: Path) -> None:
    with gcs(FakeGcs(token="right")) as live:
        machine.write_text(f"{live}\n")
        assert choose("auto") == Choice(live)
        assert choose("local") == Choice("local")


def test_stale_address_file_is_said_and_an_own_ray_used(machine: Path) -> None:
    machine.write_text(gone := closed_port())
    choice = choose("auto")
    assert choice.address == "local"
    assert (
        choice.note
        == f"the Ray cluster at {gone}, which {machine} names, is gone: this run starts its own Ray"
    )


def test_ray_address_wins_over_the_address_file_and_must_live(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write_text(closed_port())
    with gcs(FakeGcs(token="right")) as live:
        monkeypatch.setenv("RAY_ADDRESS", live)
        assert choose("auto") == Choice(live)
    assert refusal("auto").startswith(
        f"RAY_ADDRESS ({live}) can't be joined: no Ray cluster answered "
    )
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert choose("auto").address == "local"


def test_named_cluster_must_live_and_be_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    with gcs(FakeGcs(token="right")) as live:
        assert choose(live) == Choice(live)
    assert refusal(live).startswith(
        f"ray.address ({live}) can't be joined: no Ray cluster answered within 5 s "
        "(UNAVAILABLE); start "
    )
    with gcs() as other:  # gRPC, but no Ray
        assert "(UNIMPLEMENTED)" in refusal(other)
    monkeypatch.setattr(address, "PROBE_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began_s = time.monotonic()
        with pytest.raises(Gone, match="DEADLINE_EXCEEDED"):
            choose(f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began_s < 30.0  # without a deadline it would not end


def test_cluster_that_asks_for_another_token_is_named_and_never_replaced(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with gcs(FakeGcs(token="right")) as live:
        machine.write_text(live)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.delenv(name)
        assert (
            "the cluster asks for a token; export RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN"
            in refusal("auto")
        )
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")  # not used without the mode
        assert "the cluster asks for a token; " in refusal(live)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        assert choose("auto") == choose(live) == Choice(live)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert "the cluster asks for another token; " in refusal("auto")
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        (tmp_path / "token").write_text("right\n")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        assert choose("auto") == Choice(live)


def test_cluster_without_authentication_is_joined_only_if_the_user_says_so(
    machine: Path,
) -> None:
    with gcs(FakeGcs(token=None)) as live:
        machine.write_text(live)
        for given in ("auto", live):
            assert refusal(given) == (
                f"the Ray cluster at {live} has no authentication: anybody who can reach its ports "
                "can run any code there; start it with RAY_AUTH_MODE=token, or set "
                "ray.address=local, or join it anyway with ray.allow_unauthenticated=true"
            )
            choice = choose(given, allow_unauthenticated=True)
            assert choice.address == live
            assert choice.note == (
                f"warning: the Ray cluster at {live} has no authentication: anybody who can reach "
                "its ports can run any code there"
            )
        assert choose("local") == Choice("local")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            "http://10.0.0.1:8265",
            "must be HOST:PORT of the cluster's GCS, such as 10.0.0.1:6379; "
            "the URL of its dashboard is for ray job submit",
        ),
        ("ray://10.0.0.1:10001", "must be HOST:PORT of the cluster's GCS"),
        ("fd00::1:6379", "has an IPv6 address without brackets; write [fd00::1]:6379"),
        ("head", "must be auto, local or HOST:PORT"),
        ("head:", "must be auto, local or HOST:PORT"),
    ],
)
def test_address_of_another_form_is_one_line(
    monkeypatch: pytest.MonkeyPatch, given: str, line: str
) -> None:
    assert refusal(given).startswith(f"ray.address ({given}) {line}")
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert refusal("auto").startswith(f"RAY_ADDRESS ({given}) {line}")


def test_dead_ray_address_ends_the_command_with_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed_port())
    ended = command("train", str(QUICKSTART), f"run_dir={tmp_path / 'run'}")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("dapo-async: RAY_ADDRESS (127.0.0.1:")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_says_which_ray_it_would_use(machine: Path) -> None:
    machine.write_text(closed_port())
    assert "is gone: this run starts its own Ray\n" in (
        own := command("train", str(QUICKSTART), "--dry-run").stdout
    )
    assert " on a new Ray on this machine, " in own
    with gcs(FakeGcs(token="right")) as live:
        machine.write_text(live)
        assert (
            f" on the Ray cluster at {live}, "
            in command("train", str(QUICKSTART), "--dry-run").stdout
        )


def test_own_ray_gets_a_token_of_its_own_and_forgets_the_cluster_around_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    for name, value in (
        ("RAY_ADDRESS", "10.0.0.1:6379"),
        ("RAY_AUTH_TOKEN", "of the cluster"),
        ("RAY_AUTH_MODE", "token"),
        (JOB, "{}"),
    ):
        monkeypatch.setenv(name, value)
    prepare("10.0.0.1:6379")
    assert (os.environ["RAY_AUTH_TOKEN"], os.environ["RAY_ADDRESS"], os.environ[JOB]) == (
        "of the cluster",
        "10.0.0.1:6379",
        "{}",
    )
    prepare("local")
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert not {"RAY_ADDRESS", JOB} & os.environ.keys()


def test_run_directory_is_relative_to_the_runs_folder_or_else_to_the_current_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_root("", name="quickstart-1") == tmp_path / "runs" / "quickstart-1"
    assert run_root("here", name="quickstart-1") == tmp_path / "here"
    monkeypatch.setenv(RUNS, "/shared/runs")
    assert run_root("", name="quickstart-1") == Path("/shared/runs/quickstart-1")
    assert run_root("here", name="quickstart-1") == Path("/shared/runs/here")
    assert run_root("/elsewhere", name="quickstart-1") == Path("/elsewhere")
    monkeypatch.setenv(RUNS, "runs")
    with pytest.raises(
        ValueError, match=r"DAPO_ASYNC_RUNS \(runs\) must be an absolute path; set it to"
    ):
        run_root("", name="quickstart-1")


def test_run_directory_within_the_copy_of_a_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, "{}")
    for given, shown in (("", "empty"), ("runs/a", "runs/a")):
        with pytest.raises(
            ValueError,
            match=rf"run_dir \({shown}\) must be an absolute path in a Ray job, .*; "
            "set run_dir, or DAPO_ASYNC_RUNS ",
        ):
            run_root(given, name="quickstart-1")
    assert run_root("/shared/a", name="quickstart-1") == Path("/shared/a")
    monkeypatch.setenv(RUNS, "/shared/runs")
    assert run_root("runs/a", name="quickstart-1") == Path("/shared/runs/runs/a")


def test_run_directory_of_nobody_is_one_line() -> None:
    with pytest.raises(
        ValueError,
        match=r"run_dir \('~no_such_user/run'\) is no usable path: .*; give another path",
    ):
        run_root("~no_such_user/run", name="quickstart-1")
