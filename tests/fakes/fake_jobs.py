"""A job server that does as its script says, behind the methods of Ray's client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


def details(
    job: str,
    state: str,
    *,
    message: str = "",
    code: int | None = None,
    command: str = "dapo-async train a.yaml",
    metadata: dict[str, str] | None = None,
) -> Any:
    """As Ray's JobDetails."""
    return SimpleNamespace(
        submission_id=job,
        job_id=None,
        status=SimpleNamespace(value=state),
        entrypoint=command,
        message=message,
        driver_exit_code=code,
        start_time=1000,
        end_time=42_000 if state not in ("PENDING", "RUNNING") else None,
        metadata=metadata or {},
    )


@dataclass
class FakeJobs:
    """`states`: what `get_job_info` answers in turn, the last one for ever; an exception is raised.

    `connections`: what each connection to the log yields; an exception breaks it.
    """

    states: list[Any] = field(default_factory=list)
    log: str = ""
    connections: list[Sequence[str | Exception]] = field(default_factory=list)
    known: list[Any] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)  # ids that others take while they are submitted
    submitted: list[dict[str, Any]] = field(default_factory=list)
    stop_answers: list[bool] = field(default_factory=list)
    submit_errors: list[Exception] = field(default_factory=list)  # raised first, in turn
    num_asked: int = 0

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
    ) -> str:
        if self.submit_errors:
            raise self.submit_errors.pop(0)
        if submission_id in self.taken:
            self.known.append(details(submission_id, "RUNNING"))
            raise RuntimeError(
                "Request failed with status code 400: Traceback (most recent call last):\n"
                f"ValueError: Job with submission_id {submission_id} already exists."
            )
        self.submitted.append(
            {"command": entrypoint, "id": submission_id, "env": runtime_env, "about": metadata}
        )
        return submission_id

    def list_jobs(self) -> list[Any]:
        return self.known

    def get_job_info(self, job_id: str) -> Any:
        self.num_asked += 1
        answer = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for piece in self.connections.pop(0) if self.connections else ():
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def stop_job(self, job_id: str) -> bool:
        return self.stop_answers.pop(0)
