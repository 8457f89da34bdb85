"""A copy of a run's checkpoints on an object store, by fsspec (`train.checkpoint_mirror`).

    URL/NAME/config.yaml, metrics.jsonl, …           small files, as of the newest checkpoint
    URL/NAME/checkpoints/step_000020/…               the files of a checkpoint
    URL/NAME/checkpoints/step_000020/state/manifest.json    written last, removed first

A checkpoint counts when its manifest is there. In: whole checkpoints of a run directory. Out: the
same files in another run directory, each compared with its checksum. The checkpointer calls
`Uploads`; the command `train` calls `Mirror.download`. Credentials come from the environment.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.files import atomic_write
from dapo_async.utils.manifest import MANIFEST, damage, read_manifest
from dapo_async.utils.paths import for_shell

# What a resumed run reads besides a checkpoint. The config comes last: it makes the folder a run.
FILES = ("metrics.jsonl", "evaluations.jsonl", "quarantine.jsonl", "mlflow.json", "config.yaml")
COMPLETE = re.compile(rf"step_(\d{{6,}})/{STATE}/{MANIFEST}")
LONGEST_REASON = 200


def mirror_of(base: str, root: Path) -> Mirror:
    """The mirror of the run in `root`, below the URL `base`. Raises ValueError."""
    return Mirror(f"{base.rstrip('/')}/{root.name}")


@dataclass(frozen=True, slots=True)
class Download:
    """What `Mirror.download` has done."""

    notes: tuple[str, ...]  # lines about it
    damaged: tuple[int, ...]  # versions whose copies have other content than was written


class Mirror:
    """One run on an object store."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a URL that fsspec can't open."""
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._store, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{self.url} can't be opened: {_reason(error)}; for s3:// install dapo-async[s3], "
                "for another store its package of fsspec"
            ) from error
        self._root = str(root).rstrip("/")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def versions(self) -> list[int]:
        """Versions of the complete checkpoints, ascending. Raises ValueError without an answer."""
        folder = f"{self._root}/checkpoints"
        try:
            self._store.invalidate_cache()
            found = self._store.find(folder) if self._store.exists(folder) else []
        except Exception as error:
            raise ValueError(
                f"{self.url} can't be read: {_reason(error)}; check the URL and the credentials"
            ) from error
        names = (COMPLETE.fullmatch(_after(path, "/checkpoints/")) for path in found)
        return sorted(int(match[1]) for match in names if match)

    def upload(self, run_dir: RunDir, version: int) -> None:
        """Copies a checkpoint and the small files of the run. Raises what fsspec raises, and
        OSError where the store holds other sizes than the manifest says."""
        folder = CheckpointFolder(run_dir.checkpoints)
        sums, source, target = folder.manifest(version), folder.path(version), self._path(version)
        assert sums is not None
        self._remove(version)
        names = sorted(sums)
        self._store.put(
            [str(source / name) for name in names], [f"{target}/{name}" for name in names]
        )
        self._store.invalidate_cache()
        stored = self._store.find(target, detail=True)
        sizes = {_after(path, f"/{source.name}/"): info["size"] for path, info in stored.items()}
        for name in names:
            if sizes.get(name) != sums[name].num_bytes:
                raise OSError(
                    f"{self.url} has {sizes.get(name, 0)} bytes of {source.name}/{name}, "
                    f"{sums[name].num_bytes} were sent"
                )
        for name in FILES:
            if (run_dir.root / name).exists():
                self._store.pipe_file(f"{self._root}/{name}", (run_dir.root / name).read_bytes())
        manifest = (source / STATE / MANIFEST).read_bytes()
        self._store.pipe_file(f"{target}/{STATE}/{MANIFEST}", manifest)

    def keep(self, wanted: Collection[int]) -> None:
        """Removes all other checkpoints that are older than the newest of `wanted`."""
        self.remove([each for each in self.versions() if each not in wanted and each < max(wanted)])

    def remove(self, versions: Collection[int]) -> None:
        """Removes checkpoints. Raises what fsspec raises."""
        for version in versions:
            self._remove(version)

    def config(self) -> str:
        """The run's config.yaml. Raises ValueError if it can't be read."""
        try:
            return str(self._store.cat_file(f"{self._root}/config.yaml").decode())
        except Exception as error:
            raise ValueError(
                f"{self.url}/config.yaml can't be read: {_reason(error)}; check the URL"
            ) from error

    def download(self, root: Path, *, after: int = -1) -> Download:
        """Makes `root` a run directory with the newest whole checkpoint of those after `after`.

        Every file is compared with the manifest, and a damaged checkpoint is stepped over. Raises
        ValueError when none is whole, and when the newest can't be downloaded now: an older one
        would take its place.
        """
        notes: list[str] = []
        damaged: list[int] = []
        folder = CheckpointFolder(RunDir(root).checkpoints)
        root.mkdir(parents=True, exist_ok=True)
        (root / "rollouts").mkdir(exist_ok=True)
        for version in reversed([each for each in self.versions() if each > after]):
            began_s = time.monotonic()
            name = folder.path(version).name
            try:
                self._fetch_small(root, FILES[:-1])  # a later start must find them
                fault = self._fetch(version, folder)
                if not fault:
                    self._fetch_small(root, FILES[-1:])
            except (FileNotFoundError, ValueError) as error:  # a file or the manifest is gone
                fault = _reason(error)
            except Exception as error:
                raise ValueError(
                    f"{name} of {self.url} can't be downloaded: {_reason(error)}; repeat the "
                    "command when the store answers"
                ) from error
            if fault:
                notes.append(f"{self.url} has a damaged {name}, so it is not used: {fault}")
                damaged.append(version)
                continue
            took_s = time.monotonic() - began_s
            notes.append(f"downloaded {name} from {self.url} in {took_s:.1f} s")
            return Download(tuple(notes), tuple(damaged))
        why = f": {notes[0]}" if notes else ""
        raise ValueError(
            f"{self.url} has no whole checkpoint{why}; give the URL of a run, such as "
            "s3://bucket/runs/NAME"
        )

    def _fetch_small(self, root: Path, files: Sequence[str]) -> None:
        for file in files:
            if self._store.exists(f"{self._root}/{file}"):
                text = self._store.cat_file(f"{self._root}/{file}").decode()
                atomic_write(root / file, text)

    def _fetch(self, version: int, folder: CheckpointFolder) -> str:
        """Downloads one checkpoint, and commits it if it is whole. Returns what is wrong."""
        partial, source = folder.begin(version), self._path(version)
        manifest = partial / STATE / MANIFEST
        self._store.get_file(f"{source}/{STATE}/{MANIFEST}", str(manifest))
        sums = read_manifest(manifest)
        for name in sums:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:  # it came over a network
                return f"its manifest names the file {name!r}"
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
        names = sorted(sums)
        self._store.get(
            [f"{source}/{name}" for name in names], [str(partial / name) for name in names]
        )
        if found := damage(partial, sums):
            return found[0]
        if version in folder.versions():  # of a download that was killed
            shutil.rmtree(folder.path(version))
        folder.commit(version)
        return ""

    def _path(self, version: int) -> str:
        return f"{self._root}/checkpoints/step_{version:06d}"

    def _remove(self, version: int) -> None:
        """The manifest first: without it a checkpoint does not count."""
        path = self._path(version)
        self._store.invalidate_cache()
        if self._store.exists(f"{path}/{STATE}/{MANIFEST}"):
            self._store.rm_file(f"{path}/{STATE}/{MANIFEST}")
        self._store.invalidate_cache()
        if self._store.exists(path):
            self._store.rm(path, recursive=True)


class Uploads:
    """Copies checkpoints to the mirror beside the steps, one at a time.

    While one is copied, only the newest of the later ones waits. A failure costs one line; the next
    checkpoint tries again.
    """

    def __init__(
        self, mirror: Mirror, run_dir: RunDir, *, first: int, say: Callable[[str], None]
    ) -> None:
        """`first`: the version at which the run starts. The mirror has later ones only if another
        run writes there: then nothing is copied."""
        self._mirror, self._run_dir, self._first, self._say = mirror, run_dir, first, say
        self._folder = CheckpointFolder(run_dir.checkpoints)
        # Not asyncio's threads: its end would wait for an upload that hangs.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._task: asyncio.Task[None] | None = None
        self._next: int | None = None
        self._current: int | None = None
        self._newest: int | None = None  # that is on the mirror
        self._began = False
        self.uploaded = self.failed = 0
        self.upload_s = 0.0

    @property
    def in_use(self) -> set[int]:
        """Versions whose files are read, now or next."""
        return {each for each in (self._current, self._next) if each is not None}

    def offer(self, version: int) -> asyncio.Task[None]:
        """Called when a checkpoint is complete. The task ends when nothing is left to copy."""
        self._next = version
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="copy of a checkpoint")
        return self._task

    async def finish(self, *, deadline_s: float) -> None:
        """At the end of a run: returns when the newest checkpoint is copied, or can't be.

        Raises TimeoutError.
        """
        try:
            async with asyncio.timeout(deadline_s):
                if self._task is not None:
                    await self._task
                versions = self._folder.versions()
                if versions and self._newest != versions[-1]:
                    await self.offer(versions[-1])
        except TimeoutError as error:
            raise TimeoutError(
                f"the driver waited {deadline_s:g} s for {self._mirror.url}"
            ) from error

    def summary(self) -> dict[str, float]:
        seconds = self.upload_s / max(1, self.uploaded)
        return {"uploaded": self.uploaded, "not_uploaded": self.failed, "upload_s": seconds}

    async def _run(self) -> None:
        while self._next is not None:
            version, self._next = self._next, None
            self._current = version
            began_s = time.monotonic()
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._upload, version
                )
            except Exception as error:  # noqa: BLE001 (each store raises its own kinds)
                self.failed += 1
                self._say(
                    f"the checkpoint of version {version} is not copied to {self._mirror.url}: "
                    f"{_reason(error)}; training goes on, and the next one is tried"
                )
            else:
                self._newest = version
                self.uploaded += 1
                self.upload_s += time.monotonic() - began_s
            finally:
                self._current = None

    def _upload(self, version: int) -> None:
        if not self._began:
            newer = [each for each in self._mirror.versions() if each > self._first]
            if newer:
                raise ValueError(
                    f"it has version {newer[-1]}, and this run began at version {self._first}; "
                    f"remove those after {self._first} there if nobody needs them"
                )
            self._began = True
        self._mirror.upload(self._run_dir, version)
        self._mirror.keep([*self._folder.versions(), version])


def fetched(mirror: Mirror, root: Path) -> tuple[str, ...]:
    """Downloads a run into the new folder `root`; returns lines about it.

    Raises ValueError where a run is in `root` already.
    """
    if RunDir(root).config.exists():
        raise ValueError(
            f"--resume {mirror.url}: {root} has a run already; continue it with --resume "
            f"{for_shell(root)}, or remove it"
        )
    return mirror.download(root).notes


def _after(path: str, mark: str) -> str:
    """What follows the last `mark` in a path of the store."""
    return path.rpartition(mark)[2]


def _reason(error: BaseException) -> str:
    text: Any = " ".join(str(error).split()).rstrip(".;") or repr(error)
    return str(text)[:LONGEST_REASON]
