"""Why a file could not be read, in words for an error message."""

from __future__ import annotations

import json


def unreadable(error: Exception) -> str:
    """The reason of an OSError, of a JSON error, or of a value that a JSON file lacks."""
    if isinstance(error, OSError):
        return (error.strerror or "it can't be read").lower()
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        return "it is not JSON"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return "it is JSON of another form"
