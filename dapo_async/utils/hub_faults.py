"""Errors of a download from the Hugging Face hub: what happened, and what to do about it.

In: whatever `huggingface_hub` or `datasets` raised. Out: reason and remedy for one line. The
libraries wrap errors, so the causes of an error are read too. `model/download.py` and
`data/sources.py` call it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

NETWORK = "check the network of this machine, and HF_ENDPOINT and HTTPS_PROXY if they are set"
LONGEST_REASON = 300
DISK_FAULTS = {
    errno.ENOSPC: "free some space in its folder, or set HF_HOME to another one",
    errno.EDQUOT: "free some space in its folder, or set HF_HOME to another one",
    errno.EACCES: "set HF_HOME to a folder that can be written to",
    errno.EPERM: "set HF_HOME to a folder that can be written to",
    errno.EROFS: "set HF_HOME to a folder that can be written to",
    errno.ENOENT: "set HF_HOME to a folder that can be written to",
    errno.ENOTDIR: "set HF_HOME to a folder that can be written to",
}


class HubFault(NamedTuple):
    """Why a repository could not be downloaded, and the remedy."""

    reason: str
    remedy: str
    may_pass: bool = False  # the same download may work later


def hub_fault(error: BaseException, repository: str, revision: str | None) -> HubFault | None:
    """The fault of `repository` (OWNER/NAME) at `revision` that `error` reports; None: another."""
    for each in _causes(error):
        for kind in (_refused, _unreachable, _local):
            if (fault := kind(each, repository, revision)) is not None:
                return fault
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, the innermost last."""
    seen = set[int]()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _refused(error: BaseException, repository: str, revision: str | None) -> HubFault | None:
    """The hub answered with an error."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status, has_token = int(error.response.status_code), _has_token()
    if isinstance(error, errors.GatedRepoError):
        access = f"ask for access on the page of {repository}"
        return HubFault(
            f"its owner gives access on request (HTTP {status})",
            f"{access}, and wait until it is granted"
            if has_token
            else f"{access}, and set HF_TOKEN to a token of that account",
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubFault(f"the hub has disabled it (HTTP {status})", "use another one")
    if isinstance(error, errors.RevisionNotFoundError):
        named = f" {revision}" if revision else ""
        return HubFault(
            f"it has no revision{named} (HTTP {status})", "correct the revision, or leave it out"
        )
    # Without a token the hub answers 401 for an unknown name too.
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and not has_token):
        return HubFault(
            f"the hub has none of this name, or a private one (HTTP {status})",
            "correct the name, or use a token of an account that may read it"
            if has_token
            else "correct the name, or set HF_TOKEN if it is private",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubFault(f"one of its files is missing (HTTP {status})", "use another revision")
    return _refused_by_status(status, _text(error))


def _refused_by_status(status: int, text: str) -> HubFault:
    """An answer that says nothing about the repository."""
    if status == 401:
        return HubFault(
            "the hub does not accept the token (HTTP 401)",
            "set HF_TOKEN to a valid token, or remove it (unset HF_TOKEN; hf auth logout)",
        )
    if status == 403:
        return HubFault(
            "the token may not read it (HTTP 403)",
            "give the token the permission to read this repository, or set HF_TOKEN to another one",
        )
    if status == 404:
        return HubFault("the hub does not know it (HTTP 404)", "correct the name, and HF_ENDPOINT")
    if status == 429:
        return HubFault(
            "the hub got too many requests (HTTP 429)", "wait some minutes, or set HF_TOKEN", True
        )
    if status >= 500:
        return HubFault(f"the hub has a fault (HTTP {status})", "try again later", True)
    return HubFault(f"{text} (HTTP {status})", "correct the name")


def _unreachable(error: BaseException, repository: str, revision: str | None) -> HubFault | None:
    """The hub did not answer."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return HubFault(
            "HF_HUB_OFFLINE is set, and it is not on this machine",
            "unset HF_HUB_OFFLINE to download it",
        )
    if not isinstance(error, httpx.TransportError):
        return None
    text = _text(error)
    if isinstance(error, httpx.ProxyError):
        return HubFault(f"the proxy does not connect ({text})", "correct HTTPS_PROXY, or unset it")
    if isinstance(error, httpx.UnsupportedProtocol):
        return HubFault(f"the address of the hub is wrong ({text})", "correct HF_ENDPOINT")
    if "certificate" in text.lower():
        return HubFault(
            f"the hub's certificate is not trusted ({text})",
            "set SSL_CERT_FILE to the certificate of your network's authority",
        )
    late = isinstance(error, httpx.TimeoutException)
    what = "the hub does not answer in time" if late else "the hub can't be reached"
    return HubFault(f"{what} ({text})", NETWORK, True)


def _local(error: BaseException, repository: str, revision: str | None) -> HubFault | None:
    """This machine can't hold the download, or the name has a wrong form."""
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        return HubFault(_text(error), "correct the name")
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        place = f" ({error.filename})" if error.filename else ""
        return HubFault(
            f"a file can't be used: {(error.strerror or '').lower()}{place}",
            DISK_FAULTS[error.errno],
        )
    return None


def _has_token() -> bool:
    """Whether a request is sent with a token."""
    from huggingface_hub import get_token

    return os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "") in ("", "0") and bool(get_token())


def _text(error: BaseException) -> str:
    """The first line of an error's text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".;")[:LONGEST_REASON]
