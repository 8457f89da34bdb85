"""Decides which Ray a run uses, before Ray is imported.

It reads environment variables, Ray's address file, and makes one call to the cluster's GCS.

`ray.address`      joins
local              nothing: an own Ray is started
HOST:PORT          that cluster, or the run is refused
auto               the cluster of RAY_ADDRESS (which a Ray job sets), else the one that `ray start`
                   began on this machine, else nothing
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.own_ray import temp_folder

AUTO = "auto"
PROBE_S = 5.0  # a live GCS answers in milliseconds; Ray would wait minutes for a dead one
CHECK = "/ray.rpc.NodeInfoGcsService/CheckAlive"


class Gone(ValueError):
    """No Ray answers at the address."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`address` is LOCAL for an own Ray, else HOST:PORT of a cluster that answers; `note` is a line
    about the choice for the user."""

    address: str
    note: str = ""


def choose(address: str) -> Choice:
    """Decides for `ray.address`. Raises ValueError when a cluster is named that can't be joined."""
    named = os.environ.get("RAY_ADDRESS", "").strip()
    if address != AUTO:
        return _join(address, named_by="ray.address")
    if named not in ("", AUTO):
        return _join(named, named_by="RAY_ADDRESS")
    file = Path(temp_folder()) / "ray" / "ray_current_cluster"
    # Only `ray stop` removes the file that `ray start` writes: it may name a cluster that is gone.
    try:
        found = (file.read_text().strip() if file.is_file() else "") or LOCAL
    except (OSError, UnicodeDecodeError) as error:
        return Choice(LOCAL, f"{file} can't be read ({error}): this run starts its own Ray")
    try:
        return _join(found, named_by=str(file))
    except Gone:
        return Choice(
            LOCAL,
            f"the Ray cluster at {found}, which {file} names, is gone: this run starts its own Ray",
        )


def _join(address: str, *, named_by: str) -> Choice:
    if address == LOCAL:
        return Choice(LOCAL)
    if "://" in address:
        raise ValueError(
            f"{named_by} ({address}) must be HOST:PORT of the cluster's GCS, such as "
            "10.0.0.1:6379; the URL of its dashboard is for ray job submit --address, or for "
            "RAY_API_SERVER_ADDRESS"
        )
    host, _, port = address.rpartition(":")
    if not host or not (port.isdecimal() and port.isascii() and 0 < int(port) < 2**16):
        raise ValueError(
            f"{named_by} ({address}) must be auto, local or HOST:PORT, such as 10.0.0.1:6379; "
            "set ray.address to one of them"
        )
    if os.environ.get("RAY_USE_TLS") != "1":  # only Ray itself has the certificates
        _probe(address, named_by)
    return Choice(address)


def _probe(address: str, named_by: str) -> None:
    """Asks the GCS at `address` whether it lives.

    Raises Gone, or ValueError when it refuses the token of this environment.
    """
    import grpc  # an own Ray needs no probe

    token = _token()
    # No proxy between the nodes of a cluster, as in Ray.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CHECK)(
                b"",
                timeout=PROBE_S,
                metadata=[("authorization", f"Bearer {token}")] if token else [],
            )
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise Gone(
                    f"{named_by} ({address}) can't be joined: no Ray cluster answered within "
                    f"{PROBE_S:g} s ({error.code().name}); start a cluster there, or set "
                    "ray.address=local to start a new Ray"
                ) from error
            raise ValueError(
                f"{named_by} ({address}) can't be joined: the cluster asks for "
                f"{'another token' if token else 'a token'}; export RAY_AUTH_MODE=token and its "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or set ray.address=local to start a "
                "new Ray"
            ) from error


def _token() -> str:
    """The token that Ray would use, empty without one.

    It is in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (
        os.environ.get("RAY_AUTH_TOKEN") or (file.read_text() if file.is_file() else "")
    ).strip()
