"""The runs of a Ray cluster: each driver posts its newest state, and `dapo-async status` reads it.

The state is JSON text in the key-value store of the cluster's GCS, under the run directory.
"""

from __future__ import annotations

import json
from typing import Any

NAMESPACE = b"dapo_async"
PREFIX = b"run:"
ANSWER_S = 5


def post(root: str, text: str) -> None:
    """Called by a process that is connected to Ray. A cluster that is gone changes nothing."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    try:
        client = internal_kv_get_gcs_client()
        client.internal_kv_put(PREFIX + root.encode(), text.encode(), True, NAMESPACE, ANSWER_S)
    except Exception:  # noqa: BLE001 (Ray raises many kinds; the run goes on without its post)
        return


def posted(address: str) -> list[dict[str, Any]]:
    """The newest state of every run that the cluster at HOST:PORT knows, the newest first.

    Raises ValueError when the cluster does not answer.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        client = GcsClient(address=address)
        keys = client.internal_kv_keys(PREFIX, NAMESPACE, ANSWER_S)
        texts = [client.internal_kv_get(key, NAMESPACE, ANSWER_S) for key in keys]
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or repr(error)
        raise ValueError(
            f"the Ray cluster at {address} can't be asked for its runs: {reason}; give the "
            "address of its head, or a run directory"
        ) from error
    runs = [json.loads(text) for text in texts if text is not None]
    return sorted(runs, key=lambda run: -float(run["time_s"]))
