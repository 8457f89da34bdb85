"""A Python in which some libraries can not be imported."""

import subprocess
import sys
from collections.abc import Sequence

from paths import ROOT


def run_without(names: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` in a Python where importing any of `names` fails."""
    blocker = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {tuple(names)!r}:
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Blocker())
"""
    return subprocess.run(
        [sys.executable, "-c", blocker + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
