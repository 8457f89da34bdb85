"""A process between a rollout actor and its SGLang server: ends the server when its owner has died.

It runs as a script, so it imports nothing of this package. `server.py` starts it.

    one line of JSON on standard input          starts the server in a session of its own;
    {command, environment, secret, log}         its output goes to the file `log`
    standard input ends: the owner closed it    sends SIGKILL to the server's process group;
    or died                                     a server has nothing to save
    the server ends, for whatever reason        kills the rest of its process group and
                                                writes the exit code to standard output
    the supervisor itself ends                  the kernel kills the server

The supervisor detaches from its parent: a Ray worker kills its children when it exits, and then
nothing would end the server. It removes `secret` from the log, because servers print their
arguments.
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

PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent ends
LOG_S = 2.0  # for copying the server's last output


def supervise() -> int:
    """Runs the server that standard input describes; returns its exit code when it has ended."""
    order = json.loads(sys.stdin.readline())
    secret: str = order["secret"]
    with tempfile.TemporaryDirectory(prefix="dapo-async-") as folder:
        command = list(order["command"])
        if secret:  # in a file that only this user can read: every user can read command lines
            command += ["--config", write_secret(secret, folder)]
        environment = {
            **os.environ,
            "TMPDIR": folder,  # the server's temporary files are removed with it
            # Its ranks meet over a file: a port would be open to everybody.
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{folder}/store",
            **order["environment"],
        }
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=prepare_server_process,
        )
        log = threading.Thread(target=copy_output, args=(server, order["log"], secret.encode()))
        log.start()
        threading.Thread(target=kill_when_input_ends, args=(server,), daemon=True).start()
        code = server.wait()
        kill_group(server)
        log.join(LOG_S)
    return code


def write_secret(secret: str, folder: str) -> str:
    """Writes the API key as a config file of SGLang; returns its path."""
    path = os.path.join(folder, "secret.yaml")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        json.dump({"api-key": secret}, file)
    return path


def prepare_server_process() -> None:
    """Runs in the server's process: it dies with the supervisor and accepts SIGTERM.

    Ray blocks SIGTERM in its processes, and children inherit that.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def copy_output(server: subprocess.Popen[bytes], path: str, secret: bytes) -> None:
    """Appends the server's output to the file `path`, line by line, without `secret`."""
    assert server.stdout is not None
    with open(path, "ab", buffering=0) as log:
        for line in server.stdout:
            log.write(line.replace(secret, b"***") if secret else line)


def kill_when_input_ends(server: subprocess.Popen[bytes]) -> None:
    """Waits until standard input ends, then kills the server."""
    sys.stdin.read()
    kill_group(server)


def kill_group(server: subprocess.Popen[bytes]) -> None:
    """Kills every process of the server's process group."""
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    if os.fork() == 0:
        code = supervise()
        with contextlib.suppress(BrokenPipeError):  # the owner may have died
            print(code, flush=True)
        os._exit(0)  # at once: a thread may still be reading standard input
