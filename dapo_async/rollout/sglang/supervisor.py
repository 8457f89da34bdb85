"""Holds an engine's server on a leash: it ends with whoever started it, however that ended, and with everything that it started itself.

A small process of its own between the rollout actor and the server. It runs as a file, so that it imports nothing of this package:

    one line of JSON on standard input {command, environment, secret, log} ─▶ the server, in a session of its own
    the end of standard input (close, or the death of whoever held it)    ─▶ SIGKILL to its whole process group: it has nothing to save
    the end of the server, whatever ended it                             ─▶ the rest of its group is killed; its exit code on standard output
    the end of the leash itself                                          ─▶ the server is killed by the kernel

It is nobody's child: Ray's workers kill theirs when they exit, and nothing would hold the server then. The server's output goes to `log`, line by
line, without `secret`: servers print their arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading

PR_SET_PDEATHSIG = 1  # prctl: the signal that this process gets when its parent ends
LOG_S = 2.0  # for what it printed last


def hold() -> int:
    """Starts what standard input orders; returns its exit code when everything of it is gone."""
    order = json.loads(sys.stdin.readline())
    secret: str = order["secret"]
    with tempfile.TemporaryDirectory(prefix="dapo-async-") as folder:
        command = list(order["command"])
        if secret:
            # In a file that only this user can read: a command line is everybody's to see.
            config = os.path.join(folder, "secret.yaml")
            with open(os.open(config, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                json.dump({"api-key": secret}, file)
            command += ["--config", config]
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # What it leaves in its temporary files goes with it; its ranks meet over a file, where they would open a port to everybody.
            env={
                **os.environ,
                "TMPDIR": folder,
                "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{folder}/store",
                **order["environment"],
            },
            start_new_session=True,
            preexec_fn=before_the_server,
        )
        log = threading.Thread(target=copy, args=(server, order["log"], secret.encode()))
        log.start()
        threading.Thread(target=end, args=(server,), daemon=True).start()
        code = server.wait()
        kill(server)
        log.join(LOG_S)
    return code


def before_the_server() -> None:
    """In the server's process: it ends with the leash, and heeds SIGTERM, from which Ray's processes are shielded."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def copy(server: subprocess.Popen[bytes], path: str, secret: bytes) -> None:
    """The server's output into the file `path`."""
    assert server.stdout is not None
    with open(path, "ab", buffering=0) as log:
        for line in server.stdout:
            log.write(line.replace(secret, b"***") if secret else line)


def end(server: subprocess.Popen[bytes]) -> None:
    """Waits for the end of standard input, then ends the server."""
    sys.stdin.read()
    kill(server)


def kill(server: subprocess.Popen[bytes]) -> None:
    """Everything in the server's process group, which it leads."""
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    if os.fork() == 0:
        code = hold()
        with contextlib.suppress(BrokenPipeError):  # whoever held it may be gone
            print(code, flush=True)
        os._exit(0)  # at once, though the thread that reads standard input still waits
