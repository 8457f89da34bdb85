"""The batch script of `dapo-async launch slurm` on two Ray nodes, with stand-ins for Slurm.

The stand-in `srun` starts what it is given, once per node, as a real one does, and adds a loopback
address and limits to `ray start`, because both nodes are this machine. The second node joins when
the run says that it has no room. Slurm itself is not here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from paths import QUICKSTART, ROOT
from run_support import MARKER, TINY, command, processes_of, read_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
NODES = ("127.0.0.4", "127.0.0.5")
STAND_INS = {
    "scontrol": """
        case "$1 $2" in
          "show hostnames") tr , '\\n' <<< "$3" ;;
          requeue*) echo "$2" >> "$STAND_IN/requeued" ;;
          *) exit 1 ;;
        esac
        """,
    "hostname": 'echo "$STAND_IN_NODE 10.9.9.9"',
    # Its options are checked by name: a real srun refuses unknown ones.
    "srun": """
        nodes=$(tr , ' ' <<< "$SLURM_JOB_NODELIST")
        while [[ $1 == --* ]]; do
          case $1 in
            --nodelist=*) nodes=${1#*=} ;;
            --exclude=*) nodes=${nodes//${1#*=}/} ;;
            --overlap | --no-kill | --cpus-per-task=2) ;;
            --nodes=* | --ntasks=* | --ntasks-per-node=*) ;;
            *) echo "srun: unknown option $1" >&2; exit 2 ;;
          esac
          shift
        done
        trap 'kill $(jobs -p) 2>/dev/null' TERM
        for node in $nodes; do
          more=()
          if [ "$1 $2" = "ray start" ]; then
            [[ $3 == --head ]] || until grep -q "no room yet" "$STAND_IN/log"; do sleep 0.2; done
            more=(--node-ip-address="$node" --num-cpus=2 --memory=2000000000)
            more+=(--object-store-memory=100000000)
            more+=(--dashboard-agent-listen-port=$((20000 + RANDOM % 10000)))
            if [[ $3 == --head ]]; then
              more+=(--include-dashboard=false --ray-client-server-port="$CLIENT_PORT")
            fi
          fi
          STAND_IN_NODE=$node "$@" "${more[@]}" &
        done
        while [ -n "$(jobs -pr)" ]; do wait; done
        """,
}


def free_port(host: str) -> str:
    with socket.socket() as free:
        free.bind((host, 0))
        return str(free.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Slurm:
    """A folder with the stand-ins, the script of a run, and the environment of its job."""

    folder: Path
    script: Path
    environment: dict[str, str]

    @property
    def run_dir(self) -> Path:
        return self.folder / "shared" / "runs" / "quickstart"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> subprocess.Popen[bytes]:
        """What Slurm does on the first node, each time that the job is started."""
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                ["bash", str(self.script)],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def wait_until(done: Callable[[], Any], *, timeout_s: float, what: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s: {what()}"
        time.sleep(0.1)


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    # Short: the path of a Unix socket has at most 107 characters.
    folder, mark = Path(tempfile.mkdtemp(prefix="dapo-", dir="/tmp")), uuid.uuid4().hex
    for name, body in STAND_INS.items():
        lines = "\n".join(line.strip() for line in body.strip().splitlines())
        (folder / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (folder / name).chmod(0o755)
    words = ("rollout.num_workers=3", *TINY, "train.num_steps=400")
    options = ("--out", str(folder), "--shared", str(folder / "shared"), "--cpus-per-node", "2")
    written = command("launch", "slurm", str(QUICKSTART), *words, *options)
    assert written.returncode == 0, written.stderr
    (script,) = folder.glob("*.slurm.sh")
    assert "#SBATCH --nodes=2\n" in script.read_text()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        MARKER: mark,
        "STAND_IN": str(folder),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": ",".join(NODES),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "2",
        "RAY_PORT": free_port(NODES[0]),
        "CLIENT_PORT": free_port(NODES[0]),
        "RAY_TMPDIR": str(folder),
        "WAIT_S": "120",
    }
    yield Slurm(folder, script, environment)
    for pid in processes_of(mark, session=-1):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def test_script_starts_the_nodes_trains_stops_before_the_limit_and_goes_on(slurm: Slurm) -> None:
    job = slurm.start()
    metrics = slurm.run_dir / "metrics.jsonl"
    wait_until(
        lambda: (metrics.exists() and len(read_rows(metrics)) >= 3) or job.poll() is not None,
        timeout_s=200.0,
        what=lambda: slurm.log,
    )
    assert job.poll() is None, slurm.log
    # The second node came late: the run said so, and waited for it.
    assert re.search(r"^  no room yet: rollout-\d", slurm.log, re.MULTILINE), slurm.log
    used = set(re.findall(r"^rollout-\d +pid \d+ on (\S+) ", slurm.log, re.MULTILINE))
    assert used == set(NODES)
    os.kill(job.pid, signal.SIGUSR1)  # #SBATCH --signal=B:USR1@300
    assert job.wait(90.0) == 143, slurm.log
    assert (slurm.folder / "requeued").read_text() == "17\n"
    summary = json.loads((slurm.run_dir / "summary.json").read_text())
    steps = summary["steps"]
    assert (summary["status"], steps >= 3) == ("interrupted", True)
    assert summary["checkpoint"] == f"checkpoints/step_{steps:06d}"
    # Slurm starts the same script again.
    short = slurm.script.read_text().replace("train.num_steps=400", f"train.num_steps={steps + 3}")
    slurm.script.write_text(short)
    again = slurm.start()
    assert again.wait(200.0) == 0, slurm.log
    assert f"resuming at step {steps} from " in slurm.log
    summary = json.loads((slurm.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("done", steps + 3)
    wait_until(
        lambda: not processes_of(slurm.environment[MARKER], session=-1),
        timeout_s=30.0,
        what=lambda: "processes of the job are left",
    )


def test_failed_run_is_queued_again_unless_retries_bring_no_checkpoint(slurm: Slurm) -> None:
    """A stand-in for the head's port, `ray` and the run: what counts is what the script does."""
    (slurm.folder / "ray").write_text(
        "#!/usr/bin/env bash\n[[ $2 == --head ]] || exec sleep 600\n"
        f'exec {sys.executable} -m http.server "$RAY_PORT" --bind {NODES[0]} 2>/dev/null\n'
    )
    (slurm.folder / "dapo-async").write_text('#!/usr/bin/env bash\nsleep 1\neval "$RUN"\n')
    for name in ("ray", "dapo-async"):
        (slurm.folder / name).chmod(0o755)
    requeued = slurm.folder / "requeued"

    def requeues(run: str, restarts: int) -> int:
        requeued.unlink(missing_ok=True)
        slurm.environment.update(RUN=run, SLURM_RESTART_COUNT=str(restarts))
        (slurm.folder / "log").write_text("no room yet\n")
        job = slurm.start()
        wait_until(lambda: job.poll() is not None, timeout_s=60.0, what=lambda: slurm.log)
        return len(requeued.read_text().splitlines()) if requeued.exists() else 0

    saves = f'mkdir -p "{slurm.run_dir}/checkpoints/step_00000$SLURM_RESTART_COUNT"; exit 1'
    assert requeues("exit 1", 2) == 1
    assert requeues("exit 1", 3) == 0
    assert "failed after 3 retries without a newer checkpoint (RETRIES)\n" in slurm.log
    assert requeues(saves, 7) == 1
    assert [requeues(f"exit {code}", 0) for code in (0, 2, 143)] == [0, 0, 0]


def test_script_says_which_head_does_not_answer(slurm: Slurm) -> None:
    (slurm.folder / "ray").write_text("#!/usr/bin/env bash\nsleep 600\n")
    (slurm.folder / "ray").chmod(0o755)
    slurm.environment["WAIT_S"] = "2"
    assert slurm.start().wait(30.0) == 1, slurm.log
    head = f"Ray's head on {NODES[0]} ({NODES[0]}:{slurm.environment['RAY_PORT']})"
    assert f"\n{head} did not answer within 2 s\n" in f"\n{slurm.log}"
    (slurm.folder / "ray").write_text("#!/usr/bin/env bash\nexit 3\n")
    slurm.environment["WAIT_S"] = "60"
    assert slurm.start().wait(30.0) == 1, slurm.log
    assert slurm.log.endswith(f"\n{head} did not start; its lines are above\n")
