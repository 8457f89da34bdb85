"""Real data sets beside the checkout. Tests that need them are skipped where they are absent."""

import pytest
from paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason=f"the real data sets, {DATA} (or in the folder DAPO_ASYNC_SHARED), are absent",
)
EVALUATION_SETS = {
    "aime24": DATA / "aime24" / "data.jsonl",
    "aime25": DATA / "aime25" / "data.jsonl",
    "amc23": DATA / "amc23" / "data.jsonl",
    "math500": DATA / "math500" / "data.jsonl",
    "gsm8k": DATA / "gsm8k" / "test.jsonl",
}
