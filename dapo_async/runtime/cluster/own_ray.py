"""Checks whether this machine can start an own Ray, and says what to change if it can't.

`preflight` calls `faults` before anything is made. `connect` calls `refusal` for the error of a
start that failed anyway. Imports no Ray.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from dapo_async.config import Config
from dapo_async.runtime.cluster.ports import ray_ports
from dapo_async.runtime.cluster.ray_variables import given_variables
from dapo_async.utils.network import address_of

MAX_SOCKET_BYTES = 107  # of the path of a Unix socket on Linux
SOCKET = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # the longest one
MIN_FREE_BYTES = 10 * 2**20  # in Ray's folder: a session begins with some 3 MB
LOOPBACK = "127.0.0.1"
ANSWER_S = 2.0
SHARED_MEMORY = Path("/dev/shm")
LONGEST_REASON = 300


def temp_folder() -> str:
    """Where Ray puts its folder `ray`, as Ray chooses it."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def faults(config: Config) -> Iterator[str]:
    """What keeps an own Ray from starting on this machine, each as one line with its remedy."""
    for check in (_temp_folder, _shared_memory, _loopback):
        if (line := check()) is not None:
            yield line
    try:
        if config.network.interface:
            address_of(config.network.interface, like=LOOPBACK)
        ray_ports(config)
    except ValueError as error:
        yield str(error)


def _temp_folder() -> str | None:
    """Ray's sockets, logs and spilled objects lie in this folder."""
    folder, remedy = temp_folder(), "set RAY_TMPDIR to a short path with free space, such as /tmp"
    told = f"{_named()} ({folder!r})"
    if not os.path.isabs(folder):
        return f"{told} must be an absolute path, because Ray can't use a relative one; {remedy}"
    if not folder.isascii():
        return f"{told} must have ASCII characters only, because Ray can't use others; {remedy}"
    excess = len(os.path.join(folder, SOCKET.format(pid=os.getpid()))) - MAX_SOCKET_BYTES
    if excess > 0:
        return (
            f"{told} has {len(folder)} characters; it may have at most {len(folder) - excess}, "
            f"because the path of a socket has at most {MAX_SOCKET_BYTES} bytes; {remedy}"
        )
    try:
        there = _nearest(Path(folder) / "ray")
        if not there.is_dir():
            return f"{told} can't be used: {there} is a file; {remedy}"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{told} can't be used: {there} can't be written to; {remedy}"
        if (free := shutil.disk_usage(there).free) < MIN_FREE_BYTES:
            return (
                f"{told} has {free / 2**20:.1f} MiB free, Ray needs at least "
                f"{MIN_FREE_BYTES / 2**20:.0f} MiB; free some space, or {remedy}"
            )
        if os.statvfs(there).f_files and not os.statvfs(there).f_favail:
            return f"{told} can't hold more files (no inodes are left); free some, or {remedy}"
    except OSError as error:
        return f"{told} can't be used: {error.strerror}; {remedy}"
    return None


def _named() -> str:
    """What named the folder for temporary files."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if os.environ.get(name):
            return name
    return "the folder for temporary files"


def _nearest(path: Path) -> Path:
    """`path`, or the innermost of its parents that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _shared_memory() -> str | None:
    if not SHARED_MEMORY.is_dir() or not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        return (
            f"{SHARED_MEMORY} is missing or can't be written to, and Ray keeps its objects there; "
            f"mount a tmpfs on {SHARED_MEMORY} (docker run --shm-size=2g)"
        )
    return None


def _loopback() -> str | None:
    """Connects to a port of this machine, as Ray's processes do."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=ANSWER_S).close()
    except OSError as error:
        return (
            f"no process of this machine can be reached at {LOOPBACK} "
            f"({error.strerror or 'no answer'}), and Ray's processes talk to each other; bring the "
            "loopback interface up (ip link set lo up), and leave ports free for it"
        )
    return None


def refusal(error: BaseException) -> str:
    """One line for the error of Ray's start: what failed, and what to change."""
    reason = " ".join(str(error).split())[:LONGEST_REASON] or repr(error)
    remedy = next(
        (line() for known, line in _REMEDIES.items() if known in reason.lower()), _any_remedy()
    )
    return f"Ray can't start on this machine: {reason.rstrip('.;')}; {remedy}"


def _any_remedy() -> str:
    """Where the error does not say what to change."""
    suspects = []
    size, _ = resource.getrlimit(resource.RLIMIT_AS)
    if size != resource.RLIM_INFINITY:
        suspects.append(f"the address space is limited to {size / 2**30:.1f} GiB (ulimit -v)")
    given = given_variables()
    suspects += [f"the environment has {', '.join(given)}"] if given else []
    found = f"; {'; '.join(suspects)}" if suspects else ""
    return (
        f"Ray's logs are in {temp_folder()}/ray/session_latest/logs; check free memory, disk space "
        f"in {temp_folder()} and the limits of this shell (ulimit -a){found}"
    )


_REMEDIES: dict[str, Callable[[], str]] = {
    "af_unix": lambda: "set RAY_TMPDIR to a short path, such as /tmp",
    "no space left": lambda: f"free some space in {temp_folder()}, or set RAY_TMPDIR elsewhere",
    "read-only file system": lambda: "set RAY_TMPDIR to a folder that can be written to",
    "permission denied": lambda: "set RAY_TMPDIR to a folder of your own",
    "too many open files": lambda: "raise the limit of open files with ulimit -n 8192",
    "resource temporarily unavailable": lambda: (
        "raise the limit of processes and threads (ulimit -u, or pids.max of the container)"
    ),
    "cannot allocate memory": lambda: "give this machine or container more memory",
    "object store memory": lambda: "give this machine or container more memory",
    "object store size": lambda: (
        "enlarge /dev/shm (docker run --shm-size), or set RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE=1"
    ),
    "address already in use": lambda: (
        "end the process that holds the port, or unset the RAY_ variable that names it"
    ),
}
