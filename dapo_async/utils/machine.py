"""What this machine has. Called where memory decides."""

from __future__ import annotations

import os


def machine_bytes() -> int:
    """The memory of this machine, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
