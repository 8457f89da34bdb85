"""Errors of an MLflow store: which of them time may change, and what to do about the others.

`mlflow_store` asks for every error that its thread catches. All kinds are in this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Course(StrEnum):
    """What the thread does after an error."""

    RETRY = "retry"  # the store does not answer now
    SKIP = "skip"  # the store answered and refused this one request
    STOP = "stop"  # no later request can succeed


@dataclass(frozen=True, slots=True)
class Fault:
    course: Course
    remedy: str = ""


class Unusable(Exception):
    """The store answers, and the run can't be kept in it; `remedy` says what to do."""

    def __init__(self, reason: str, *, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


ADDRESS = "correct tracking.mlflow"
OTHER_STORE = "set tracking.mlflow to another store"
CREDENTIALS = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to "
    "credentials that it accepts"
)
PERMISSION = "ask its administrator for the permission to write to this experiment"
FOREIGN = (
    f"no MLflow server answers there, or a proxy before it refuses the request; {ADDRESS}, or "
    f"{CREDENTIALS}"
)
DELETED = "restore it in MLflow, or set MLFLOW_EXPERIMENT_NAME to another name"

# What the text of an error says, whatever its class: MLflow wraps most errors in its own one.
FINAL_TEXTS = (
    (r"must be in the 'active' state", DELETED),
    (r"out-of-date database schema|can't locate revision", "run mlflow db upgrade after a backup"),
    (
        r"file is not a database|file is encrypted|disk image is malformed",
        f"move that file away, or {OTHER_STORE}",
    ),
    (
        r"unable to open database file|readonly database|read-only file system",
        f"make its folder writable, or {OTHER_STORE}",
    ),
    (
        r"password authentication failed|access denied for user|login failed for user"
        r"|(role|database) \S+ does not exist|unknown database",
        "correct user, password and database in tracking.mlflow",
    ),
    (
        r"databricks (credential|authentication)|default auth: cannot configure",
        "set DATABRICKS_HOST and DATABRICKS_TOKEN, or run databricks configure",
    ),
    (r"is in maintenance mode", "set tracking.mlflow=local, or to sqlite:///FILE"),
    (r"no module named|could not import", "install that package beside dapo_async"),
    (
        r"name or service not known|nodename nor servname|no address associated",
        "correct the host name in tracking.mlflow",
    ),
    (
        r"certificate.verify.failed|self.signed certificate",
        "set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of its authority",
    ),
    (
        r"wrong.version.number|record.layer.failure|http request was sent to https",
        "correct http or https in tracking.mlflow",
    ),
    (
        r"invalid url|failed to parse|no host supplied|no connection adapters|unsupported uri"
        r"|'idna' codec|invalid tracking uri|unsupported scheme|can't load plugin"
        r"|could not parse (sqlalchemy|rfc)|port out of range|nonnumeric port",
        ADDRESS,
    ),
    (
        r"not in a valid json format|error code ([23]\d\d|402|405|406|410|418|451|501|505|511) !=",
        f"no MLflow server answers there; {ADDRESS}",
    ),
    (r"error code 407 !=", "correct HTTPS_PROXY and HTTP_PROXY, or unset them"),
    (r"unauthenticated|unauthorized|not authenticated", CREDENTIALS),
    (r"forbidden|permission_denied", PERMISSION),
)
# Of an answered request. While the run is opened they concern the address or the experiment.
REFUSED_STATUSES = (400, 404, 405, 409, 413)
FINAL_STATUSES = {401: CREDENTIALS, 403: PERMISSION}
OPENING_STATUSES = {
    400: "correct MLFLOW_EXPERIMENT_NAME or tracking.mlflow",
    404: f"no MLflow server answers there; {ADDRESS}",
}


def fault_of(error: Exception, *, opening: bool) -> Fault:
    """The course after `error`. `opening`: no request has succeeded yet."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, Unusable):
        return Fault(Course.STOP, error.remedy)
    if isinstance(error, ImportError):
        return Fault(Course.STOP, "install that package beside dapo_async")
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
        remedy = f"make that folder writable, or {OTHER_STORE}"
        return Fault(Course.STOP if opening else Course.SKIP, remedy)
    status = _status(error) if isinstance(error, MlflowException) else 0
    if status in FINAL_STATUSES:
        return Fault(Course.STOP, FINAL_STATUSES[status])
    text = str(error).lower()
    for known, remedy in FINAL_TEXTS:
        # A refused request may quote anything; only an error of the whole store stops the thread.
        if (opening or status not in REFUSED_STATUSES or remedy is DELETED) and re.search(
            known, text
        ):
            return Fault(Course.STOP, remedy)
    if opening and _is_foreign(error):
        return Fault(Course.STOP, FOREIGN)
    if opening and ("not found" in text or status in OPENING_STATUSES):
        return Fault(Course.STOP, OPENING_STATUSES.get(status, OPENING_STATUSES[404]))
    if status in REFUSED_STATUSES:
        return Fault(Course.STOP if opening else Course.SKIP)
    return Fault(Course.RETRY)


def _is_foreign(error: Exception) -> bool:
    """Whether an error answer is JSON without the code that every MLflow server gives."""
    answer = getattr(error, "json", None)
    return isinstance(answer, dict) and "error_code" not in answer


def _status(error: Any) -> int:
    return int(error.get_http_status_code())
