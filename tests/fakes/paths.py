"""Where the checkout is, and what tests read in it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
SHARED = Path(os.environ.get("DAPO_ASYNC_SHARED") or ROOT.parent / "shared")
