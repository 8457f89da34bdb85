"""How a run ends: status and reason for its summary, and the exit code of its process."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2


class WrongInput(Exception):
    """The user has to change something that only the cluster could show: exit code 2."""


class Status(StrEnum):
    DONE = "done"
    SOLVED = "solved"  # every recent group was all correct: nothing is left to learn
    OUT_OF_TIME = "out_of_time"  # train.max_wall_s: to be resumed
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended, or would end if nothing else happened."""

    status: Status = Status.DONE
    reason: str = "all steps trained"
    exit_code: int = 0
    lost_actor: str | None = None  # its death ended the run
    lost_node: bool = False  # the driver's node has no raylet: no actor can be asked for anything
    hangs: bool = False  # a passed deadline ended the run: something may hang
    restartable: bool = True  # False: the run would end in the same way again

    @property
    def is_unfinished(self) -> bool:
        """Whether steps are left to train."""
        return self.status not in (Status.DONE, Status.SOLVED)
