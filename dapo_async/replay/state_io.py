"""What the replay part of a checkpoint says of its groups, read before a run is resumed.

The replay actor writes the buffer's state as JSON, and the finished groups beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo_async.replay.ledger import Counts, GroupOutcome
from dapo_async.types import RejectReason
from dapo_async.utils.reasons import unreadable

STATE_FILE, GROUPS_FILE = "replay.json", "groups.safetensors"


def read_outcomes(folder: Path) -> tuple[Counts, dict[str, int]]:
    """The groups that were admitted before the checkpoint, by outcome; failures by their kind.

    Raises ValueError, which names the file, when a file of the state is missing or can't be read.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
        counts, failures = _counts(state), dict(state["failures"])
        path = folder / GROUPS_FILE
        path.open("rb").close()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} can't be read ({unreadable(error)}); "
            "copy the checkpoint whole, or take another one"
        ) from error
    return counts, failures


def _counts(state: dict[str, Any]) -> Counts:
    reasons = {reason.value for reason in RejectReason}
    ended = {name: int(count) for name, count in state["ended"].items()}
    return Counts(
        admitted=int(state["admitted"]),
        in_flight=len(state["buffered"]) + len(state["reissue"]),
        rejected={RejectReason(name): count for name, count in ended.items() if name in reasons},
        **{GroupOutcome(name).value: n for name, n in ended.items() if name not in reasons},
    )
