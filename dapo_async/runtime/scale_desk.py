"""`dapo-async scale RUN_DIR rollout=N`: how the command and the driver of a run talk.

Both use the folder `scale/` of the run directory, so the command may run on any machine that has
it. The command writes a request; the driver looks for it once a second, and writes its answer:

    request.json   {id, rollout}
    answer.json    {id, accepted, line}
    asked.json     {rollout, instead_of}: the number accepted last, and that of the start's config

The driver also writes the number into config.yaml, so a resumed run has it. `asked.json` is for a
start with `train.resume=auto`, whose config file has the old number.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dapo_async import config as knobs
from dapo_async.config import Config, to_yaml
from dapo_async.config.validate import check
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.run_status import RunState, read_status
from dapo_async.utils.files import atomic_write
from dapo_async.utils.paths import for_shell

LOOK_S = 0.1  # between two looks for the answer


@dataclass(frozen=True, slots=True)
class Request:
    """A number of rollout workers that somebody asks for."""

    id: str
    rollout: int


def with_workers(config: Config, count: int) -> Config:
    """Raises ValueError where the run can't have so many workers, in one line."""
    if config.rollout.server_urls:
        raise ValueError(
            "rollout.servers names the servers of this run, one per worker, so their number can't "
            "change while it goes on; end it, and resume it with other rollout.servers and "
            "rollout.num_workers"
        )
    if config.model.is_shared:
        raise ValueError(
            "learner and engines of this run take turns on the same devices, so the number of "
            "workers can't change while it goes on; end it, and resume it with another "
            "rollout.num_workers"
        )
    changed = replace(config, rollout=replace(config.rollout, num_workers=count))
    check(changed, files=False)
    return changed


class ScaleDesk:
    """The driver's side."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        """Requests from before the start of this driver are dropped."""
        self._run_dir, self.folder = run_dir, run_dir.scale
        self._given = config.rollout.num_workers
        (self.folder / "request.json").unlink(missing_ok=True)
        asked = _read(self.folder / "asked.json")
        if asked.get("rollout") == self._given:
            self._given = int(asked["instead_of"])
        elif asked:  # this start has another number
            (self.folder / "asked.json").unlink(missing_ok=True)

    def take(self) -> Request | None:
        """The request that is not answered yet, once."""
        path = self.folder / "request.json"
        match _read(path):
            case {"id": str(number), "rollout": int(count)}:
                path.unlink(missing_ok=True)
                return Request(number, count)
        return None

    def accept(self, request: Request, line: str) -> None:
        """Keeps the number for a resumed run. Raises OSError when the disk refuses it."""
        saved = knobs.load(self._run_dir.config, files=False)
        rollout = replace(saved.rollout, num_workers=request.rollout)
        atomic_write(self._run_dir.config, to_yaml(replace(saved, rollout=rollout)))
        asked = {"rollout": request.rollout, "instead_of": self._given}
        atomic_write(self.folder / "asked.json", json.dumps(asked) + "\n")
        self._answer(request, line, accepted=True)

    def refuse(self, request: Request, line: str) -> None:
        self._answer(request, line, accepted=False)

    def _answer(self, request: Request, line: str, *, accepted: bool) -> None:
        answer = {"id": request.id, "accepted": accepted, "line": line}
        with suppress(OSError):  # a full disk: the command says that it got no answer
            atomic_write(self.folder / "answer.json", json.dumps(answer) + "\n")


def asked_for(root: Path, config: Config) -> Config:
    """`config`, with the number of workers that `scale` has asked for last.

    A config with another number than that of the run's start is left as it is: somebody has chosen
    it since.
    """
    asked = _read(RunDir(root).scale / "asked.json")
    if not asked or config.rollout.num_workers != asked.get("instead_of"):
        return config
    return replace(config, rollout=replace(config.rollout, num_workers=int(asked["rollout"])))


def asked_line(root: Path, config: Config) -> str | None:
    """One line where a resumed run has the number of `scale`."""
    asked = _read(RunDir(root).scale / "asked.json")
    if not asked or asked["rollout"] != config.rollout.num_workers:
        return None
    return (
        f"rollout.num_workers={asked['rollout']}, as dapo-async scale has asked for last "
        f"(it was {asked['instead_of']})"
    )


def request_workers(root: Path, count: int, *, timeout_s: float) -> str:
    """`dapo-async scale`: asks the driver of the run in `root`; returns its answer.

    Raises ValueError where no run goes on there, or where the run can't have so many workers, and
    TimeoutError.
    """
    run_dir = RunDir(root)
    if not run_dir.config.is_file():
        raise ValueError(f"there is no run in {root}; give the folder that a run has printed")
    config = knobs.load(run_dir.config, files=False)
    with_workers(config, count)
    state = read_status(root).state
    if state not in (RunState.RUNNING, RunState.STUCK):
        raise ValueError(
            f"the run in {root} does not go on ({state.value}); continue it with dapo-async train "
            f"--resume {for_shell(root)} rollout.num_workers={count}"
        )
    request, answer = run_dir.scale / "request.json", run_dir.scale / "answer.json"
    run_dir.scale.mkdir(exist_ok=True)
    number = secrets.token_hex(8)
    atomic_write(request, json.dumps({"id": number, "rollout": count}) + "\n")
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        found = _read(answer)
        if found.get("id") == number:
            if not found["accepted"]:
                raise ValueError(str(found["line"]))
            return str(found["line"])
        time.sleep(LOOK_S)
    request.unlink(missing_ok=True)  # nobody is surprised by it later
    raise TimeoutError(
        f"the driver of {root} has not answered within {timeout_s:g} s, so nothing changes: it is "
        f"starting or ending, another scale command came in between, or it hangs (dapo-async "
        f"status {for_shell(root)})"
    )


def say_answer(root: Path, count: int, *, timeout_s: float, say: Callable[[str], None]) -> int:
    """Prints the answer; returns the exit code of the command."""
    try:
        say(request_workers(root, count, timeout_s=timeout_s))
    except TimeoutError as error:
        say(str(error))
        return 1
    return 0


def _read(path: Path) -> dict[str, Any]:
    """Empty where it can't be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
