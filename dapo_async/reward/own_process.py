"""The program of a process that runs the user's verifier: requests come in as JSON lines, a reply
for each leaves.

`own_verifier.py` starts it with `python -m` and the name of the function. The process imports the
function once and keeps its state between calls. What the function prints goes to standard error.

The process ends when standard input ends, and when a call takes longer than its deadline. The
watchdog of faulthandler sees to that: it runs no Python code, so it ends a hang in C code, too. It
also writes to standard error where the function hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from dapo_async.reward.own_verifier import load_own_verifier
from dapo_async.reward.verdict import Verdict
from dapo_async.utils.plugins import has_parameter


def answer_requests(name: str) -> None:
    """Reports that it is ready, then answers until standard input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        function = load_own_verifier(name, knob="reward.verifier")
    except ValueError as error:
        _say(out, {"error": str(error)})
        return
    takes_prompt = has_parameter(function, "prompt")
    _say(out, {"ready": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["timeout_s"], exit=True, file=sys.stderr)
        keywords = {"prompt": request["prompt"]} if takes_prompt else {}
        reply = _judged(name, function, request, keywords)
        faulthandler.cancel_dump_traceback_later()
        _say(out, reply)


def _judged(
    name: str, function: Callable[..., object], request: dict[str, Any], keywords: dict[str, str]
) -> dict[str, Any]:
    try:
        verdict = function(request["response"], request["gold"], **keywords)
    except BaseException as error:  # noqa: BLE001 (whatever it raises is a failed verdict)
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": f"{name} raised {what} ({place.filename}:{place.lineno})"}
    if not isinstance(verdict, Verdict):
        found = type(verdict).__name__
        return {"error": f"{name} returned {found}, must return dapo_async.reward.Verdict"}
    if not 0.0 <= verdict.accuracy <= 1.0:
        return {"error": f"{name} returned accuracy {verdict.accuracy}, which must lie in [0, 1]"}
    extracted = None if verdict.extracted is None else str(verdict.extracted)
    correct = verdict.correct if isinstance(verdict.correct, bool) else verdict.accuracy
    return {"correct": correct, "extracted": extracted, "reason": str(verdict.reason)}


def _say(out: TextIO, reply: dict[str, Any]) -> None:
    """Writes one line; the process ends when its parent is gone."""
    try:
        out.write(json.dumps(reply) + "\n")
        out.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    answer_requests(sys.argv[1])
