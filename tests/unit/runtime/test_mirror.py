"""Copies of checkpoints on an object store, here fsspec's store in memory."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from paths import QUICKSTART
from run_folders import run_of

from dapo_async.cli.main import main
from dapo_async.config import load
from dapo_async.runtime.mirror import Mirror, Uploads, fetched, mirror_of
from dapo_async.runtime.newest_point import newest_point, withdraw
from dapo_async.runtime.resume import choose_checkpoint
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.manifest import MANIFEST, write_manifest

BASE = "memory://bucket/runs"
ROOT = "/bucket/runs/run"
SEAL = f"{STATE}/{MANIFEST}"


@pytest.fixture
def store() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def sealed_run(folder: Path, *, versions: tuple[int, ...] = (2, 4)) -> RunDir:
    root = run_of(folder / "run", folder / "base", versions=versions)
    for version in versions:
        path = root / "checkpoints" / f"step_{version:06d}"
        write_manifest(path, path / SEAL)
    (root / "metrics.jsonl").write_text('{"step": 0}\n')
    return RunDir(root)


def mirrored(folder: Path) -> tuple[RunDir, Mirror]:
    run_dir = sealed_run(folder)
    mirror = mirror_of(BASE, run_dir.root)
    for version in (2, 4):
        mirror.upload(run_dir, version)
    return run_dir, mirror


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_a_downloaded_run_has_the_files_of_its_newest_checkpoint(
    tmp_path: Path, store: Any
) -> None:
    run_dir, mirror = mirrored(tmp_path)
    assert (mirror.url, mirror.versions()) == (f"{BASE}/run", [2, 4])
    root = tmp_path / "elsewhere" / "run"
    (line,) = fetched(Mirror(f"{BASE}/run/"), root)
    assert line.startswith(f"downloaded step_000004 from {BASE}/run in ")
    wanted = files_of(run_dir.root)
    assert files_of(root) == {
        name: content for name, content in wanted.items() if "step_000002" not in name
    }
    assert choose_checkpoint(root).version == 4
    with pytest.raises(ValueError, match=r"has a run already; continue it with --resume"):
        fetched(mirror, root)


def test_a_checkpoint_counts_once_its_manifest_is_there(tmp_path: Path, store: Any) -> None:
    run_dir, mirror = mirrored(tmp_path)
    written: list[str] = []
    pipe = store.pipe_file

    def noted(path: str, content: bytes, **options: Any) -> None:
        written.append(path)
        pipe(path, content, **options)

    store.pipe_file = noted
    try:
        mirror.upload(run_dir, 4)
    finally:
        del store.pipe_file
    assert written[-1] == f"{ROOT}/checkpoints/step_000004/{SEAL}"
    store.rm_file(written[-1])
    assert mirror.versions() == [2]


def test_an_upload_that_breaks_leaves_no_checkpoint_that_counts(tmp_path: Path, store: Any) -> None:
    run_dir, mirror = mirrored(tmp_path)
    weights = run_dir.checkpoints / "step_000004" / "model.safetensors"
    weights.write_text("cut")  # another size than the manifest says
    with pytest.raises(OSError, match=r"has 3 bytes of step_000004/model\.safetensors, 7 were"):
        mirror.upload(run_dir, 4)
    assert mirror.versions() == [2]


@pytest.mark.parametrize("name", ["model.safetensors", "state/learner/part.safetensors"])
def test_a_damaged_copy_is_stepped_over(tmp_path: Path, store: Any, name: str) -> None:
    _, mirror = mirrored(tmp_path)
    path = f"{ROOT}/checkpoints/step_000004/{name}"
    store.pipe_file(path, bytes(len(store.cat_file(path))))
    got = mirror.download(tmp_path / "new")
    lines = got.notes
    assert got.damaged == (4,)
    assert lines[0].startswith(f"{BASE}/run has a damaged step_000004, so it is not used: ")
    assert lines[0].endswith("has other content than was written")
    assert lines[1].startswith("downloaded step_000002 from ")
    assert CheckpointFolder(tmp_path / "new" / "checkpoints").versions() == [2]
    store.rm_file(f"{ROOT}/checkpoints/step_000002/{name}")
    with pytest.raises(ValueError, match=r"has no whole checkpoint: .* damaged step_000004"):
        mirror.download(tmp_path / "newer")
    assert not RunDir(tmp_path / "newer").config.exists()


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(
    tmp_path: Path, store: Any, name: str
) -> None:
    _, mirror = mirrored(tmp_path)
    for version in (2, 4):
        path = f"{ROOT}/checkpoints/step_{version:06d}/{SEAL}"
        manifest = json.loads(store.cat_file(path))
        manifest["files"][name] = {"bytes": 1, "sha256": "00"}
        store.pipe_file(path, json.dumps(manifest).encode())
    with pytest.raises(ValueError, match="its manifest names the file"):
        mirror.download(tmp_path / "new")
    assert not [*tmp_path.rglob("escaped")]


def test_a_download_that_was_killed_is_repeated(tmp_path: Path, store: Any) -> None:
    _, mirror = mirrored(tmp_path)
    root = tmp_path / "new"
    mirror.download(root)
    RunDir(root).config.unlink()
    (root / "checkpoints" / "step_000009.partial").mkdir()
    mirror.download(root)
    assert choose_checkpoint(root).version == 4


def test_uploads_keep_what_the_run_keeps(tmp_path: Path, store: Any) -> None:
    run_dir, mirror = mirrored(tmp_path)
    shutil.rmtree(run_dir.checkpoints / "step_000002")  # the run keeps one
    said: list[str] = []

    async def train() -> Uploads:
        uploads = Uploads(mirror, run_dir, first=4, say=said.append)
        uploads.offer(4)
        assert uploads.in_use == {4}
        await uploads.finish(deadline_s=30.0)
        return uploads

    uploads = asyncio.run(train())
    assert (mirror.versions(), said) == ([4], [])
    assert (uploads.summary()["uploaded"], uploads.summary()["not_uploaded"]) == (1, 0)


def test_uploads_never_remove_checkpoints_newer_than_the_start_of_the_run(
    tmp_path: Path, store: Any
) -> None:
    run_dir, mirror = mirrored(tmp_path)
    said: list[str] = []

    async def train() -> None:
        uploads = Uploads(mirror, run_dir, first=0, say=said.append)
        await uploads.offer(2)

    asyncio.run(train())
    assert mirror.versions() == [2, 4]
    (line,) = said
    assert f"{BASE}/run: it has version 4, and this run began at version 0; remove those" in line


def test_a_run_that_is_ahead_on_the_mirror_goes_on_from_there(tmp_path: Path, store: Any) -> None:
    run_dir, _ = mirrored(tmp_path)
    (run_dir.root / "metrics.jsonl").write_text("")
    shutil.rmtree(run_dir.checkpoints / "step_000004")
    said: list[str] = []
    point = newest_point(run_dir.root, BASE, say=said.append)
    (line,) = said
    assert line.startswith(f"downloaded step_000004 from {BASE}/run in ")
    assert line.endswith("; this machine has step_000002")
    assert (point.version, point.withdrawn) == (4, ())
    assert run_dir.metrics.read_text() == '{"step": 0}\n'
    shutil.rmtree(run_dir.checkpoints)  # a run without a checkpoint does not start from zero
    assert newest_point(run_dir.root, BASE, say=said.append).version == 4


def test_a_run_that_is_ahead_here_goes_on_from_here(tmp_path: Path, store: Any) -> None:
    run_dir, mirror = mirrored(tmp_path)
    mirror.remove([4])
    said: list[str] = []
    assert newest_point(run_dir.root, BASE, say=said.append).version == 4
    assert said == [f"{BASE}/run has nothing newer than step_000004 of this machine"]


def test_a_rollback_by_name_withdraws_the_newer_copies(tmp_path: Path, store: Any) -> None:
    run_dir, mirror = mirrored(tmp_path)
    said: list[str] = []
    point = newest_point(run_dir.root, BASE, at="step_000002", say=said.append)
    assert (point.version, point.withdrawn, mirror.versions()) == (2, (4,), [2, 4])
    assert said == [f"--from step_000002: step_000004 will be removed from {BASE}/run"]
    withdraw(BASE, run_dir.root, point.withdrawn)
    assert mirror.versions() == [2]


def test_newer_copies_that_cannot_be_downloaded_are_not_given_up(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, mirror = mirrored(tmp_path)
    shutil.rmtree(run_dir.checkpoints / "step_000004")

    def gone(*words: Any, **options: Any) -> None:
        raise ConnectionError("reset")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "get", gone)
        with pytest.raises(ValueError, match=r"step_000004 of .* can't be downloaded: reset; .*"):
            newest_point(run_dir.root, BASE, say=print)
    path = f"{ROOT}/checkpoints/step_000004/model.safetensors"
    store.pipe_file(path, bytes(len(store.cat_file(path))))
    remedy = r"which removes step_000004 there: --resume .* --from step_000002$"
    with pytest.raises(ValueError, match=rf"has no whole checkpoint: .* damaged .*{remedy}"):
        newest_point(run_dir.root, BASE, say=print)
    assert mirror.versions() == [2, 4]


def test_a_mirror_that_does_not_answer_stops_only_a_run_without_a_checkpoint(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = mirrored(tmp_path)

    def gone(*words: Any, **options: Any) -> None:
        raise ConnectionError("reset")

    monkeypatch.setattr(type(store), "exists", gone)
    said: list[str] = []
    assert newest_point(run_dir.root, BASE, say=said.append).version == 4
    assert said[0].endswith("the run continues from step_000004 of this machine")
    shutil.rmtree(run_dir.checkpoints)
    with pytest.raises(ValueError, match=r"can't be read: reset; check the URL"):
        newest_point(run_dir.root, BASE, say=print)


def test_the_copy_of_another_run_is_not_downloaded_over_this_one(
    tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, mirror = mirrored(tmp_path)
    shutil.rmtree(run_dir.checkpoints / "step_000004")
    text = mirror.config()
    store.pipe_file(f"{ROOT}/config.yaml", text.replace("lr: 0.0003", "lr: 0.5").encode())
    resume = ("train", "--resume", str(run_dir.root), f"train.checkpoint_mirror={BASE}")
    assert main(resume) == 2
    assert (
        f"{BASE}/run has another run than this machine: learner.lr is 0.5 there and 0.0003 here"
        in capsys.readouterr().err
    )


def test_a_failed_upload_is_one_line_and_the_end_tries_again(tmp_path: Path, store: Any) -> None:
    run_dir = sealed_run(tmp_path)
    mirror, said, fails = mirror_of(BASE, run_dir.root), list[str](), [True, False]

    class Flaky(Mirror):
        def upload(self, run_dir: RunDir, version: int) -> None:
            if fails.pop(0):
                raise PermissionError("access\ndenied")
            super().upload(run_dir, version)

    async def train() -> Uploads:
        uploads = Uploads(Flaky(mirror.url), run_dir, first=0, say=said.append)
        await uploads.offer(4)
        assert mirror.versions() == []
        await uploads.finish(deadline_s=30.0)
        return uploads

    uploads = asyncio.run(train())
    assert said == [
        f"the checkpoint of version 4 is not copied to {BASE}/run: access denied; training goes "
        "on, and the next one is tried"
    ]
    assert mirror.versions() == [4]
    assert (uploads.uploaded, uploads.failed) == (1, 1)


def test_a_store_that_hangs_does_not_hold_the_end_of_the_run(tmp_path: Path, store: Any) -> None:
    run_dir = sealed_run(tmp_path)

    class Hanging(Mirror):
        def upload(self, run_dir: RunDir, version: int) -> None:
            time.sleep(0.5)

    async def train() -> None:
        uploads = Uploads(Hanging(f"{BASE}/run"), run_dir, first=0, say=lambda _: None)
        uploads.offer(4)
        await uploads.finish(deadline_s=0.05)

    with pytest.raises(TimeoutError, match=rf"the driver waited 0\.05 s for {BASE}/run"):
        asyncio.run(train())


def test_a_new_run_is_refused_where_the_mirror_has_another(
    tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    mirrored(tmp_path)
    root = tmp_path / "new" / "run"
    train = ("train", str(QUICKSTART), f"run_dir={root}", f"train.checkpoint_mirror={BASE}")
    assert main(train) == 2
    assert f"{BASE}/run has checkpoints of a run; continue it with" in capsys.readouterr().err
    assert not root.exists()


def test_auto_resume_downloads_a_run_that_is_not_on_this_machine(
    tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    mirrored(tmp_path)
    root = tmp_path / "new" / "run"
    train = (
        "train", str(QUICKSTART), f"run_dir={root}", f"train.checkpoint_mirror={BASE}",
        "train.resume=auto", "train.num_steps=4", f"model.path={tmp_path}/base",
    )  # fmt: skip
    assert main([*train, "train.num_steps=9", "--dry-run"]) == 2  # the base has no weights
    assert f"would download step_000004 of {BASE}/run to {root}\n" in capsys.readouterr().out
    assert not root.exists()
    assert main(train) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"downloaded step_000004 from {BASE}/run in ")
    assert out[1] == f"the run in {root} is complete: all 4 steps (train.num_steps) are trained"


def test_resume_of_a_url_downloads_into_the_folder_of_all_runs(
    tmp_path: Path,
    store: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirrored(tmp_path)
    monkeypatch.setenv("DAPO_ASYNC_RUNS", str(tmp_path / "all"))
    resume = ("train", "--resume", f"{BASE}/run", "train.num_steps=4", "train.resume=auto")
    assert main([*resume, "--dry-run"]) == 0
    assert "would download the newest of the versions [2, 4] to" in capsys.readouterr().out
    assert main([*resume, "--from", "step_000002"]) == 2
    assert not (tmp_path / "all").exists()
    assert main(resume) == 0
    assert "is complete: all 4 steps" in capsys.readouterr().out
    assert choose_checkpoint(tmp_path / "all" / "run").version == 4
    assert main(["train", "--resume", f"{BASE}/nothing"]) == 2
    assert "has no whole checkpoint; give the URL of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("/shared/runs", r"^train\.checkpoint_mirror \(/shared/runs\) must be a URL"),
        ("s3://key:secret@bucket/runs", r"^train\.checkpoint_mirror must not have a password"),
    ],
)
def test_a_mirror_that_is_no_url_or_has_a_password_is_refused(url: str, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        load(QUICKSTART, [f"train.checkpoint_mirror={url}"])
    assert "secret" not in str(caught.value)


def test_a_store_without_its_package_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^no-such-store://a/b can't be opened: .*; for s3://"):
        Mirror("no-such-store://a/b")
