"""Ray jobs: submits a command to the job server of a cluster, follows it, waits for it, stops it.

In: the address of the cluster's dashboard, and a `Job`. Out: the text of the job's log, and its
`JobState`. The command `submit` calls it. Ray's own client makes all requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

Answer = TypeVar("Answer")
ANSWER_S = 60.0  # for one answer of the job server; an upload of the working directory: UPLOAD_S
UPLOAD_S = 1800.0
READY_S = 120.0  # for a cluster that has just started and has no node yet that takes jobs
LOST_S = 300.0  # a job is followed without an answer of the job server
POLL_S = 1.0
# Ray kills a job that has not ended so long after it was stopped. The last checkpoint has to fit.
STOP_VARIABLE, STOP_WAIT_S = "RAY_JOB_STOP_WAIT_TIME_S", 600
NOT_READY = "No available agent to submit job"  # Ray's words
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED_CODE = 143  # of a process that SIGTERM ended
LONGEST_REASON = 300
# Besides .gitignore and .rayignore, which Ray reads: what a folder without them would send along.
EXCLUDES = (
    ".git", ".venv*", "/venv", "/runs", "/wandb", "/mlruns", "/mlflow.db", "__pycache__",
    ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis",
)  # fmt: skip
# Ray's client writes of each upload and of each closed connection to standard error.
LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Unreachable(ValueError):
    """The job server does not answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is submitted. `alone`: a second one of the same name would disturb the first."""

    name: str
    command: str
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]
    alone: bool


@dataclass(frozen=True, slots=True)
class JobState:
    """Where a job stands. `state` is PENDING, RUNNING or one of OVER."""

    id: str
    state: str
    command: str = ""
    reason: str = ""  # of a failure
    driver_code: int | None = None
    seconds: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def exit_code(self) -> int:
        """That of the job's command, as a shell shows it."""
        if self.state == "SUCCEEDED":
            return 0
        if self.state == "STOPPED":
            return STOPPED_CODE
        code = self.driver_code or 1
        return 128 - code if code < 0 else code


class Client(Protocol):
    """What is used of ray.job_submission.JobSubmissionClient."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
    ) -> str: ...

    def list_jobs(self) -> list[Any]: ...

    def get_job_info(self, job_id: str) -> Any: ...

    def get_job_logs(self, job_id: str) -> str: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...

    def stop_job(self, job_id: str) -> bool: ...


def connect(address: str) -> JobServer:
    """Raises ValueError when the address is malformed, or its token is refused, or nobody answers.

    An address in the environment does not replace the given one, as Ray's client would have it.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--address ({address}) must be the URL of the cluster's dashboard, such as "
            "http://10.0.0.1:8265"
        )
    from ray.job_submission import JobSubmissionClient

    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with _without_variables(ADDRESS_VARIABLES):
        client = _ask(address, lambda: JobSubmissionClient(address))
    return JobServer(client, address)


class JobServer:
    """The job server of one cluster."""

    def __init__(
        self, client: Client, address: str, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._client, self.address, self._pause = client, address, pause

    def submit(self, job: Job) -> str:
        """Sends the working directory, and starts the job under the first free id; returns the id.

        Waits for a cluster that has just started. Raises ValueError when a job that has to be alone
        still runs, and for what Ray refuses.
        """
        deadline_s = time.monotonic() + READY_S
        while True:
            known = {
                each.submission_id: str(each.status.value)
                for each in _ask(self.address, self._client.list_jobs)
                if each.submission_id
            }
            name = free_id(job, known)
            try:
                return _ask(
                    self.address,
                    lambda name=name: self._client.submit_job(  # type: ignore[misc]
                        entrypoint=job.command,
                        submission_id=name,
                        runtime_env=dict(job.runtime_env),
                        metadata=dict(job.metadata),
                    ),
                    within_s=UPLOAD_S,
                )
            except Unreachable:
                raise
            except ValueError as error:
                if "already exists" in str(error):  # another submit has taken the id meanwhile
                    continue
                if NOT_READY not in str(error):
                    raise
                if time.monotonic() > deadline_s:
                    raise ValueError(
                        f"no node of the cluster at {self.address} took the job within "
                        f"{READY_S:g} s; if another Ray on the head has the port of its agent, "
                        "give ray start another --dashboard-agent-listen-port"
                    ) from error
                self._pause(POLL_S)

    def state(self, job: str) -> JobState:
        """Raises ValueError for an unknown job, Unreachable without an answer."""
        return _state_of(_ask(self.address, lambda: self._client.get_job_info(job)))

    def log(self, job: str) -> str:
        """All that the job has printed so far."""
        return _ask(self.address, lambda: self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], None]) -> JobState:
        """Writes the log from its beginning as it grows, until the job is over.

        A connection that breaks is made again, and nothing is written twice. Raises Unreachable
        after LOST_S without an answer.
        """
        shown = 0

        def show(text: str) -> None:
            nonlocal shown
            write(text)
            shown += len(text)

        while True:
            with suppress(Exception):  # Ray and aiohttp raise many kinds; the state decides
                asyncio.run(self._tail(job, skip=shown, write=show))
            state = self._patiently(job)
            if state.is_over:
                show(self.log(job)[shown:])
                return state
            self._pause(POLL_S)

    def wait(self, job: str, changed: Callable[[JobState], None]) -> JobState:
        """Waits until the job is over; calls `changed` for each new state. Raises Unreachable."""
        last = ""
        while True:
            state = self._patiently(job)
            if state.state != last:
                changed(state)
                last = state.state
            if state.is_over:
                return state
            self._pause(POLL_S)

    def stop(self, job: str) -> JobState:
        """Stops the job, and waits until it is over: its run writes a checkpoint first.

        Raises ValueError when it is not over within the time after which Ray kills it.
        """
        deadline_s = time.monotonic() + STOP_WAIT_S + ANSWER_S
        asked = False
        while not (state := self._patiently(job)).is_over:
            # A job that has not started yet has nobody who could stop it.
            asked = asked or _ask(self.address, lambda: self._client.stop_job(job))
            if time.monotonic() > deadline_s:
                raise ValueError(
                    f"the job {job} is not over {STOP_WAIT_S + ANSWER_S:.0f} s after it was "
                    f"stopped; see ray job logs --address {self.address} {job}"
                )
            self._pause(POLL_S)
        return state

    def _patiently(self, job: str) -> JobState:
        """The state; waits up to LOST_S for a job server that does not answer."""
        deadline_s = time.monotonic() + LOST_S
        while True:
            try:
                return self.state(job)
            except Unreachable as error:
                if time.monotonic() > deadline_s:
                    raise Unreachable(
                        f"{error}; the job {job} may go on: ask again with "
                        f"dapo-async submit --address {self.address} --status {job}"
                    ) from error
            self._pause(POLL_S)

    async def _tail(self, job: str, *, skip: int, write: Callable[[str], None]) -> None:
        """Writes the log without its first `skip` characters until the connection ends.

        While nothing comes, it looks whether the job server still answers.
        """
        lines = self._client.tail_job_logs(job)
        while True:
            coming = asyncio.ensure_future(anext(lines))
            while not (await asyncio.wait([coming], timeout=ANSWER_S))[0]:
                if (await asyncio.to_thread(self.state, job)).is_over:
                    coming.cancel()
                    return
            try:
                text = coming.result()
            except StopAsyncIteration:
                return
            write(text[skip:])
            skip = max(0, skip - len(text))


def free_id(job: Job, known: Mapping[str, str]) -> str:
    """The name of the job, or with the first free number: NAME, NAME-2, NAME-3.

    `known`: the states of all jobs of the cluster, by id. Raises ValueError if the job has to be
    alone and one of its name is not over.
    """
    for number in count(1):
        name = job.name if number == 1 else f"{job.name}-{number}"
        if name not in known:
            return name
        if job.alone and known[name] not in OVER:
            raise ValueError(
                f"the job {name} is still {known[name].lower()}, and two runs can't have one run "
                f"directory; wait for its end, stop it with dapo-async submit --stop {name}, or "
                "give another run_dir"
            )
    raise AssertionError("numbers do not end")


def job_environment(
    given: Mapping[str, Any], names: list[str], environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Ray's runtime environment of a job.

    `given`: of the user's file. `names`: variables that the job gets from `environment`. Raises
    ValueError for one that is not set; no message has a value.
    """
    variables = {STOP_VARIABLE: str(STOP_WAIT_S), **(given.get("env_vars") or {})}
    for name in names:
        if "=" in name:
            raise ValueError(
                f"--env takes the name of a variable without its value: --env "
                f"{name.partition('=')[0]}; export the value before"
            )
        if name not in environment:
            raise ValueError(f"--env {name}: this variable is not set here; export it before")
        variables[name] = environment[name]
    return {
        "working_dir": ".",
        **given,
        "excludes": [*EXCLUDES, *(given.get("excludes") or ())],
        "env_vars": variables,
    }


def _ask(address: str, request: Callable[[], Answer], *, within_s: float | None = None) -> Answer:
    """The answer of the job server, within `within_s` seconds or ANSWER_S.

    Raises Unreachable without one, ValueError for a refusal. The request runs in a thread, because
    Ray's client waits without end.
    """
    limit_s = ANSWER_S if within_s is None else within_s
    answers: list[Answer] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(request())
        except Exception as error:  # noqa: BLE001 (Ray's client raises many kinds)
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if answers:
        return answers[0]
    if not errors:
        raise Unreachable(f"the job server at {address} has not answered within {limit_s:g} s")
    raise _refusal(errors[0], address) from errors[0]


def _refusal(error: Exception, address: str) -> ValueError:
    """One line for what Ray's client has raised."""
    from ray.exceptions import AuthenticationError

    # A refusal of the server has a traceback, whose last line is the reason.
    last = (str(error).strip().splitlines() or [repr(error)])[-1].strip().rstrip(".;")
    reason = last[-LONGEST_REASON:]
    if isinstance(error, AuthenticationError):
        return ValueError(
            f"the job server at {address} asks for another token; export RAY_AUTH_MODE=token and "
            "its RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    if isinstance(error, OSError) and error.filename is None:  # of requests, too
        return Unreachable(
            f"no job server answers at {address}; give --address http://HOST:8265, where HOST is "
            "the head of the cluster"
        )
    if "status code 404" in reason and "Job " in reason:
        return ValueError(
            f"{reason.partition('404: ')[2]} at {address}; ray job list --address {address} "
            "lists the jobs"
        )
    if "exceeds the maximum size" in str(error):
        return ValueError(
            f"the working directory is too large to send: {str(error).partition('. ')[0]}; list "
            "large folders in .rayignore, or start in a smaller folder"
        )
    return ValueError(f"the job server at {address} refuses: {reason}; correct it and try again")


def _state_of(details: Any) -> JobState:
    """From Ray's JobDetails."""
    state, code = str(details.status.value), details.driver_exit_code
    message = (details.message or "").strip().splitlines()
    seconds = None
    if details.start_time is not None:
        seconds = (details.end_time or time.time() * 1000) / 1000 - details.start_time / 1000
    return JobState(
        id=details.submission_id or details.job_id or "",
        state=state,
        command=details.entrypoint,
        # It ends with the last lines of the log.
        reason=message[-1][:LONGEST_REASON] if state == "FAILED" and message else "",
        driver_code=code,
        seconds=seconds,
        metadata=details.metadata or {},
    )


@contextmanager
def _without_variables(names: tuple[str, ...]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
