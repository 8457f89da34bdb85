"""How a run ends: the status and the reason of its summary, and the exit code of its process."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

EXIT_WRONG_INPUT = 2


class WrongInput(Exception):
    """What the user has to change is found out only with the cluster at hand: exit code 2."""


class Status(StrEnum):
    DONE = "done"
    SOLVED = "solved"  # every recent group was all correct: nothing is left to learn
    OUT_OF_TIME = "out_of_time"  # train.max_wall_s: to be resumed
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(slots=True)
class RunOutcome:
    """How a run ended; `exit_code` is that of the process."""

    status: Status = Status.DONE
    reason: str = "all steps trained"
    exit_code: int = 0
