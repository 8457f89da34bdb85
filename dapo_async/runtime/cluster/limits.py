"""Limits of a machine against what a run needs: open files, inodes, disk, memory and ports.

`preflight` calls it on the driver's machine before anything is made. Every actor raises its own
limit of open files, since the actors of a joined cluster inherit other limits. Imports no Ray.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from dapo_async.config import Config
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.utils.network import chosen_by_kernel

# Ray's connections, the libraries' files, and what is open while a checkpoint is written.
BASE_FILES = 256
FILES_PER_PEER = 8  # a process has connections to every other process of the run
ENOUGH_FILES = 65_536  # more are not asked for: some programs close every number up to the limit
TOKEN_BYTES = 20  # of a response token in a packed group: three numbers and its text
BATCHES = 2  # in shared memory at a time: the one that trains, and the next
SHARED_MEMORY = Path("/dev/shm")


def num_processes(config: Config) -> int:
    """Processes of a run that open connections to each other."""
    return (
        config.learner.num_ranks + config.rollout.num_workers * config.rollout.tensor_parallel + 2
    )


def open_files_needed(config: Config) -> int:
    """By one process of a run."""
    return BASE_FILES + FILES_PER_PEER * num_processes(config)


def raise_open_files() -> None:
    """Raises the soft limit of this process as far as the hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_files_fault(config: Config) -> str | None:
    """Why this process may open too few files, in one line; None where it may open enough."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = open_files_needed(config)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    return (
        f"a process may open {soft} files at most, this run needs {needed}; raise the limit with "
        "ulimit -n 8192, or LimitNOFILE of the service that starts this command"
    )


def inodes_fault(root: Path, config: Config) -> str | None:
    """Why the disk of `root` can't hold the files of the run, in one line; None where it can."""
    train = config.train
    needed = train.num_steps * (1 + train.record) + 50 * (train.keep_checkpoints + 2)
    try:
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        inodes = os.statvfs(there)
    except OSError:
        return None  # the run directory can't be made, which is reported elsewhere
    if not inodes.f_files or inodes.f_favail >= needed:  # some file systems have no such limit
        return None
    return (
        f"the disk of run_dir {root} can hold {inodes.f_favail} more files (inodes), this run "
        f"writes up to {needed}; remove files there, or choose another run_dir"
    )


def ports_notes(config: Config) -> Iterator[str]:
    """What `network.ports` does not cover on this machine, in one line: gloo and NCCL have no
    setting for their ports."""
    if not config.network.ports or config.ray.address == LOCAL:
        return
    given, kernels = config.network.port_range, chosen_by_kernel()
    if kernels.start in given and kernels.stop - 1 in given:
        return
    shown = f"{kernels.start}-{kernels.stop - 1}"
    yield (
        f"network    gloo and NCCL listen at ports that the kernel chooses, here {shown}, outside "
        f"network.ports ({config.network.ports}); firewalls between the nodes must let them pass, "
        "or set net.ipv4.ip_local_port_range on each node (sysctl)"
    )


def space_notes(root: Path, config: Config, *, checkpoint_bytes: int) -> Iterator[str]:
    """What may become short later, in one line each: the run starts, and copes with it."""
    try:
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        total, _, free = shutil.disk_usage(there)
    except OSError:
        total, free = 0, 0
    # The newest ones, the best one, and the one that is being written.
    count = config.train.keep_checkpoints + 2
    if total and free < count * checkpoint_bytes:
        yield (
            f"disk       {free / 2**20:,.1f} MiB free for {count} checkpoints of "
            f"{checkpoint_bytes / 2**20:,.1f} MiB; lower train.keep_checkpoints or free some space"
        )
    replay = config.replay
    tokens = replay.groups_per_step * replay.group_size * config.rollout.max_response_tokens
    needed = BATCHES * TOKEN_BYTES * tokens
    try:
        shared = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return  # an own Ray that needs it is refused
    if shared < needed:
        yield (
            f"memory     {SHARED_MEMORY} has {shared / 2**20:,.1f} MiB free, batches need up to "
            f"{needed / 2**20:,.1f} MiB, so Ray writes some to disk, which is slower; enlarge it "
            "(docker run --shm-size)"
        )
