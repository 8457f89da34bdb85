"""A Python in which some libraries can not be imported."""

import subprocess
import sys
from collections.abc import Sequence

from paths import ROOT


def run_without(
    names: Sequence[str], script: str, *, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs `script` in a Python that finds none of `names`, as if they were not installed."""
    blocker = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {tuple(names)!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
    return subprocess.run(
        [sys.executable, "-c", blocker + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
