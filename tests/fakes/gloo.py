"""Several gloo processes for one test.

Each process calls the same module-level function with its mesh. Results come back in rank order.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Collection
from typing import Any

import torch

from dapo_async.model import build_mesh, join_store, open_store

HOST, TIMEOUT_S = "127.0.0.1", 60.0


def _rank(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    sizes: dict[str, int],
    pipe: Any,
) -> None:
    try:
        torch.set_num_threads(1)
        if rank == 0:
            store = open_store(HOST, timeout_s=TIMEOUT_S)
            pipe.send_bytes(pickle.dumps(store.port))
        else:
            store = join_store((HOST, pickle.loads(pipe.recv_bytes())), timeout_s=TIMEOUT_S)
        mesh = build_mesh(
            store,
            rank=rank,
            **sizes,
            host=HOST,
            device=torch.device("cpu"),
            timeout_s=TIMEOUT_S,
        )
        # Plain pickle: multiprocessing's own would pass tensors in files that this process deletes.
        pipe.send_bytes(pickle.dumps((True, work(mesh, *arguments))))
    except BaseException:  # noqa: BLE001 (sent to the test, which raises it)
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        os._exit(1)


def on_ranks(
    work: Callable[..., Any],
    *arguments: Any,
    dp: int = 1,
    cp: int = 1,
    tp: int = 1,
    dying: Collection[int] = (),
) -> list[Any]:
    """`work(mesh, *arguments)` on dp × cp × tp processes; None for the ranks in `dying`.

    Raises AssertionError with the traceback of the first failing rank, or if a rank takes too long.
    """
    # Forked, so that the patches of a test hold there too. The first rank opens the rendezvous, not
    # this process: a store has a thread, and a lock that this thread holds during a fork would stay
    # locked in the new process.
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    sizes = {"dp": dp, "cp": cp, "tp": tp}
    for rank in range(dp * cp * tp):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(work, arguments, rank, sizes, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        assert pipes[0].poll(TIMEOUT_S), f"rank 0 opened no rendezvous within {TIMEOUT_S} s"
        port = pipes[0].recv_bytes()
        for pipe in pipes[1:]:
            pipe.send_bytes(port)
        results: list[Any] = []
        for rank, pipe in enumerate(pipes):
            if rank in dying:
                results.append(None)
                continue
            assert pipe.poll(2 * TIMEOUT_S), f"rank {rank} gave no answer within {2 * TIMEOUT_S} s"
            good, value = pickle.loads(pipe.recv_bytes())
            assert good, f"rank {rank}: {value}"
            results.append(value)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()
