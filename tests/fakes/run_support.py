"""Runs of the real command line in processes of their own, and checks of what their files say.

Each guarantee of a run is a check that raises AssertionError when the files break it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from paths import QUICKSTART

from dapo_async.utils.checkpoint_dir import CheckpointFolder

COMMAND = str(Path(sys.executable).with_name("dapo-async"))
MARKER = "DAPO_ASYNC_TEST_RUN"  # every process of a run inherits it, Ray's own included
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# The smallest run of the real system. Without filters it does not depend on the base model's skill.
TINY = (
    "replay.groups_per_step=4",
    "replay.group_size=8",
    "replay.dynamic_sampling=false",
    "rollout.num_slots=64",
    "learner.warmup_steps=1",
    "evaluation.num_prompts=64",
    "evaluation.every_steps=0",
    "train.num_steps=6",
    "tracking.sinks=none",
)


def environment(**more: str) -> dict[str, str]:
    # Without the last one SGLang's processes overwrite their environment, by which we find them.
    return {**os.environ, "OMP_NUM_THREADS": "1", "SPT_NOENV": "1", **more}


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself and starts no Ray."""
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def patched(before: str) -> list[str]:
    """The command line after these Python statements."""
    main = "import sys; from dapo_async.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", f"{before}\n{main}"]


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run left behind."""

    root: Path
    exit_code: int
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.root / "summary.json").read_text())
        return summary

    @property
    def checkpoint(self) -> Path:
        """The newest one; the base model's folder before the first."""
        return self.root / str(self.summary["checkpoint"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_rows(self.root / "metrics.jsonl")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return read_rows(self.root / "evaluations.jsonl")

    @property
    def trace(self) -> list[dict[str, Any]]:
        trace: list[dict[str, Any]] = json.loads((self.root / "timeline.json").read_text())[
            "traceEvents"
        ]
        return trace

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        return read_rows(self.root / "rollouts" / f"step_{step:06d}.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes_of(mark: str, *, session: int) -> dict[int, str]:
    """Command lines of live processes with this MARKER or in this session, by pid.

    The session is needed for Ray's agents, which overwrite their environment with their title.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARKER}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and (marked or int(its_session) == session):
                found[int(folder.name)] = (
                    (folder / "cmdline").read_text().replace("\0", " ").strip()
                )
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


class Live:
    """A run that goes on; its output is appended to that of the lives before it."""

    def __init__(
        self,
        root: Path,
        arguments: Sequence[str],
        *,
        before: str = "",
        reader: bool = True,
        inside: Sequence[str] = (),
    ) -> None:
        """Without `reader`, standard output and error are a pipe that nobody reads, as `| true`.
        `inside`: words before the command, which enter the host where it runs."""
        self.root, self._mark = root, uuid.uuid4().hex
        self._output = root.with_name(f"{root.name}.out")
        self._before = len(self._output.read_text()) if self._output.exists() else 0
        with self._output.open("a") if reader else _closed_pipe() as file:
            self._process = subprocess.Popen(
                [*inside, *(patched(before) if before else [COMMAND]), "train", *arguments],
                env=environment(**{MARKER: self._mark}),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()[self._before :]

    @property
    def driver(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: str, *, timeout_s: float = 180.0) -> re.Match[str]:
        """The first match in what the run has printed."""
        deadline_s = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.output, re.MULTILINE)) is None:
            assert self._process.poll() is None, (
                f"the run ended before it printed {pattern!r}:\n{self.output}"
            )
            assert time.monotonic() < deadline_s, f"no {pattern!r} in {timeout_s} s:\n{self.output}"
            time.sleep(0.005)
        return match

    def wait_for_checkpoint(self, *, timeout_s: float = 60.0) -> None:
        """Until the first one is complete."""
        saved, deadline_s = (
            CheckpointFolder(self.root / "checkpoints"),
            time.monotonic() + timeout_s,
        )
        while saved.newest is None:
            assert time.monotonic() < deadline_s, f"no checkpoint in {timeout_s} s:\n{self.output}"
            time.sleep(0.005)

    def pid(self, actor: str) -> int:
        """Of the newest process of `actor`."""
        pattern = rf"^{actor} +pid (\d+) "
        self.wait_for(pattern)
        return int(re.findall(pattern, self.output, re.MULTILINE)[-1])

    def finish(self, *, timeout_s: float) -> Finished:
        """Waits for the end by itself. Raises subprocess.TimeoutExpired."""
        code = self._process.wait(timeout_s)
        return Finished(self.root, code, self.output)

    def processes(self) -> dict[int, str]:
        """Command lines of everything that this run started and that still lives, by pid."""
        return processes_of(self._mark, session=self.driver)

    def seconds_until_nothing_is_left(self, *, timeout_s: float) -> float:
        """Fails with the command lines of what is left after `timeout_s`."""
        began_s = time.monotonic()
        while left := self.processes():
            assert time.monotonic() - began_s < timeout_s, (
                f"after {timeout_s} s there still is: {left}"
            )
            time.sleep(0.1)
        return time.monotonic() - began_s

    def destroy(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(10)


def _closed_pipe() -> IO[str]:
    """The writing end of a pipe whose reader has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@contextmanager
def running(
    root: Path,
    *overrides: str,
    config: Path | None = QUICKSTART,
    before: str = "",
    reader: bool = True,
    inside: Sequence[str] = (),
) -> Iterator[Live]:
    """Starts `dapo-async train`, without a config `--resume`; kills what is left at exit.

    `before`: Python statements that the driver runs first, to set a constant of the config.
    `inside`: see `Live`.
    """
    live = Live(
        root,
        ["--resume", str(root), *overrides]
        if config is None
        else [str(config), *overrides, f"run_dir={root}"],
        before=before,
        reader=reader,
        inside=inside,
    )
    try:
        yield live
    finally:
        live.destroy()


def finished(
    root: Path,
    *overrides: str,
    config: Path | None = QUICKSTART,
    timeout_s: float = 240.0,
    reader: bool = True,
) -> Finished:
    """A whole run that ends by itself."""
    with running(root, *overrides, config=config, reader=reader) as live:
        return live.finish(timeout_s=timeout_s)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# The guarantees of a run, as its files show them.


def check_conservation(groups: Mapping[str, Any]) -> None:
    """Conservation: `admitted` is the sum of all outcomes and of what is in flight."""
    others = sum(
        sum(count.values()) if isinstance(count, Mapping) else count
        for name, count in groups.items()
        if name != "admitted"
    )
    assert groups["admitted"] == others, (
        f"{groups['admitted']} groups were admitted, {others} ended or are in flight: {groups}"
    )


def check_token_flow(flow: Mapping[str, int]) -> None:
    """Every generated token is trained, wasted for one reason, or in flight."""
    work = ("prefilled", "recomputed", "generated", "resumed")
    ended = sum(count for name, count in flow.items() if name not in work)
    assert flow["generated"] + flow["resumed"] == ended, f"tokens do not add up: {flow}"
    # Two reports are some milliseconds apart: only what is in flight may show that.
    assert all(count >= 0 for name, count in flow.items() if name != "in_flight"), flow


Row = list[tuple[str, float, float]]  # state, start and end in seconds


def rows_of(trace: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """The spans of each actor in order of time.

    Raises unless this is a Chrome trace of complete events and arrows, with a named row per actor.
    """
    names: dict[int, str] = {}
    rows: defaultdict[str, Row] = defaultdict(list)
    for event in trace:
        assert event["ph"] in ("M", "X", "s", "t", "f"), event
        assert isinstance(event["pid"], int), event
        assert isinstance(event["tid"], int), event
        if event["ph"] in ("s", "t", "f"):
            continue
        if event["ph"] == "M":
            assert event["name"] == "process_name", event
            names[event["pid"]] = event["args"]["name"]
        else:
            assert event["dur"] >= 0, event
            rows[names[event["pid"]]].append(
                (event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
            )
    assert len(set(names.values())) == len(names) == len(rows), (
        f"{len(names)} named rows, {len(rows)} with spans"
    )
    return {actor: sorted(row, key=lambda span: span[1]) for actor, row in rows.items()}


def check_time_law(rows: Mapping[str, Row]) -> None:
    """Time accounting: each actor's states are disjoint and add up, within 1 %, to the time from
    its start to its last report. An actor reports last while the driver stops."""
    _, stop_s, end_s = rows["driver"][-1]
    for actor, row in rows.items():
        for (before, _, ends_s), (after, starts_s, _) in pairwise(row):
            assert starts_s >= ends_s - 1e-5, (
                f"{actor} is in {before} and in {after} at the same time"
            )
        reported_s = end_s if actor == "driver" else min(max(row[-1][2], stop_s), end_s)
        elapsed_s, in_states_s = reported_s - row[0][1], sum(end - start for _, start, end in row)
        assert abs(in_states_s - elapsed_s) <= 0.01 * elapsed_s, (
            f"{actor}: {in_states_s:.2f} s in states, {elapsed_s:.2f} s elapsed"
        )


def overlap_share(rows: Mapping[str, Row]) -> float:
    """The share of the learner's train spans during which some engine generated."""
    trains = [span for span in rows["learner"] if span[0] == "train"]
    generates = [
        span
        for actor, row in rows.items()
        if actor.startswith("rollout")
        for span in row
        if span[0] == "generate"
    ]
    overlapped = [
        any(min(end, until) > max(start, since) for _, since, until in generates)
        for _, start, end in trains
    ]
    return sum(overlapped) / len(trains)


def check_asynchrony(rows: Mapping[str, Row], rollouts: Sequence[Mapping[str, Any]]) -> None:
    """Engines generate while the learner trains, and continue responses across a weight update."""
    share = overlap_share(rows)
    assert share >= 0.8, f"something was generated in {share:.0%} of the train spans only"
    assert any(len(rollout["weight_versions"]) > 1 for rollout in rollouts), (
        f"none of {len(rollouts)} responses carries two weight versions"
    )


def check_staleness(rollouts: Sequence[Mapping[str, Any]], *, max_staleness: int) -> None:
    """Staleness bound: the step that trained a response is at most `max_staleness` versions after
    its oldest token and its prefill."""
    for rollout in rollouts:
        oldest = min(
            [rollout["prefill_version"], *(version for version, _, _ in rollout["weight_versions"])]
        )
        assert 0 <= rollout["step"] - oldest <= max_staleness, (
            f"version {oldest} was trained at step {rollout['step']}: {rollout}"
        )


def check_metrics(row: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]]) -> None:
    """One row of metrics.jsonl agrees with the numbers computed from all responses of its step."""
    spans = [span for rollout in rollouts for span in rollout["weight_versions"]]
    num_tokens = sum(rollout["tokens"] for rollout in rollouts)
    oldest = min(
        min(version for version, _, _ in spans),
        min(rollout["prefill_version"] for rollout in rollouts),
    )
    expected = {
        "rollouts": len(rollouts),
        "tokens": num_tokens,
        "accuracy": sum(rollout["accuracy"] for rollout in rollouts) / len(rollouts),
        "reward": sum(rollout["reward"] for rollout in rollouts) / len(rollouts),
        "response_tokens": num_tokens / len(rollouts),
        "groups": len({rollout["group_id"] for rollout in rollouts}),
        "truncated": sum(rollout["finish_reason"] == "length" for rollout in rollouts)
        / len(rollouts),
        "mixed_versions": sum(len(rollout["weight_versions"]) > 1 for rollout in rollouts)
        / len(rollouts),
        "staleness": sum((row["step"] - version) * (end - start) for version, start, end in spans)
        / num_tokens,
        "staleness_max": row["step"] - min(version for version, _, _ in spans),
        "group_staleness_max": row["step"] - oldest,
    }
    for name, value in expected.items():
        assert abs(row[name] - value) <= 1e-9 * max(1.0, abs(value)), (
            f"step {row['step']}: {name} is {row[name]} in the metrics, {value} in the rollouts"
        )


def check_checkpoint(folder: Path, *, differs_from: Path | None = None) -> None:
    """transformers loads the folder and computes finite logits, which differ from those of
    `differs_from` if it is given."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(each)(ids).logits
            for each in (folder, differs_from)
            if each is not None
        ]
    assert bool(torch.isfinite(logits[0]).all())
    if differs_from is not None:
        largest = float((logits[0] - logits[1]).abs().max())
        assert largest > 1e-4, f"the checkpoint's logits are those of {differs_from}"
