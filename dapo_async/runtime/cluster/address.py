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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.own_ray import temp_folder

if TYPE_CHECKING:
    import grpc

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
    authenticated: bool = True


def choose(address: str, *, allow_unauthenticated: bool = False) -> Choice:
    """Decides for `ray.address`. Raises ValueError when a cluster is named that can't be joined.

    `allow_unauthenticated`: also joins a cluster that asks nobody for a token, with a warning.
    """
    choice = _choose(address)
    if choice.authenticated:
        return choice
    risk = "anybody who can reach its ports can run any code there"
    if not allow_unauthenticated:
        raise ValueError(
            f"the Ray cluster at {choice.address} has no authentication: {risk}; start it with "
            "RAY_AUTH_MODE=token, or set ray.address=local, or join it anyway with "
            "ray.allow_unauthenticated=true"
        )
    note = f"warning: the Ray cluster at {choice.address} has no authentication: {risk}"
    return replace(choice, note=note)


def _choose(address: str) -> Choice:
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
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(
            f"{named_by} ({address}) has an IPv6 address without brackets; write [{host}]:{port}"
        )
    if os.environ.get("RAY_USE_TLS") == "1":  # only Ray itself has the certificates
        return Choice(address)
    return Choice(address, authenticated=_probe(address, named_by))


def _probe(address: str, named_by: str) -> bool:
    """Asks the GCS at `address` whether it lives; False when it answers without a token.

    Raises Gone, or ValueError when it refuses the token of this environment.
    """
    import grpc  # an own Ray needs no probe

    token = _token()
    # No proxy between the nodes of a cluster, as in Ray.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check = channel.unary_unary(CHECK)
        for tried in ("", token) if token else ("",):
            metadata = [("authorization", f"Bearer {tried}")] if tried else []
            try:
                check(b"", timeout=PROBE_S, metadata=metadata)
                return bool(tried)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAUTHENTICATED and tried != token:
                    continue
                raise _unreachable(error, address, named_by, has_token=bool(token)) from error
    raise AssertionError("the last try returns or raises")


def _unreachable(
    error: grpc.RpcError, address: str, named_by: str, *, has_token: bool
) -> ValueError:
    """Nobody answers, or the token is refused."""
    if error.code().name != "UNAUTHENTICATED":
        return Gone(
            f"{named_by} ({address}) can't be joined: no Ray cluster answered within "
            f"{PROBE_S:g} s ({error.code().name}); start a cluster there, or set "
            "ray.address=local to start a new Ray"
        )
    return ValueError(
        f"{named_by} ({address}) can't be joined: the cluster asks for "
        f"{'another token' if has_token else 'a token'}; export RAY_AUTH_MODE=token and its "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or set ray.address=local to start a "
        "new Ray"
    )


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
