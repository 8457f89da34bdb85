"""What screening finds in DAPO-Math-17k, and how long loading takes.

The evaluation sets are AIME 2024 and 2025, AMC, MATH-500 and GSM8K. The sets are read from the
folder `DAPO_ASYNC_SHARED`, or from ../shared beside the checkout; no model is needed. With
`--quick`, and without the sets, it generates problems; every tenth of them is an evaluation problem
that is typeset differently.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from engine import hardware

from dapo_async.bench.about import commit
from dapo_async.config import Source
from dapo_async.data import Screening, load_fingerprints, load_prompts, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DAPO_ASYNC_SHARED", ROOT.parent / "shared")) / "data"
TRAINING = ("dapo_math_17k", "dapo_math_17k/data.jsonl")
EVALUATION = {
    "aime24": "aime24/data.jsonl",
    "aime25": "aime25/data.jsonl",
    "amc23": "amc23/data.jsonl",
    "math500": "math500/data.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
}


def generated(folder: Path) -> tuple[Source, dict[str, Source]]:
    """200 problems, 20 of them evaluation problems with other spaces and signs around."""
    training = [
        {"prompt": f"What is {number} plus {number + 1}?", "answer": str(2 * number + 1)}
        for number in range(200)
    ]
    held_out = [
        {"prompt": f"**What  is ${number}$ plus ${number + 1}$?**", "answer": "0"}
        for number in range(0, 200, 10)
    ]
    for name, rows in (("training", training), ("heldout", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=folder / "training.jsonl"), {
        "generated": Source(path=folder / "heldout.jsonl")
    }


def measure(training: Source, evaluation: dict[str, Source]) -> dict[str, Any]:
    tokenizer = load_tokenizer(
        ROOT / "configs" / "base" / "random"
    )  # one token per byte; its speed is not measured
    began_s = time.perf_counter()
    against = {name: load_fingerprints(source) for name, source in evaluation.items()}
    found = load_prompts(
        training,
        tokenizer=tokenizer,
        max_prompt_tokens=10**6,
        screening=Screening(contamination="drop", against=against),
    )
    return {
        "problems": len(found.prompts) + sum(found.left_out.counts.values()),
        "prompts": len(found.prompts),
        "left_out": dict(found.left_out.counts),
        "contaminated": {name: found.contaminated.get(name, 0) for name in evaluation},
        "seconds": round(time.perf_counter() - began_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument("--quick", action="store_true", help="on generated problems")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick or not SHARED.is_dir():
            what, (training, evaluation) = "generated", generated(Path(folder))
        else:
            what, training = TRAINING[0], Source(preset=TRAINING[0], path=SHARED / TRAINING[1])
            evaluation = {
                name: Source(preset=name, path=SHARED / file) for name, file in EVALUATION.items()
            }
        result = measure(training, evaluation)
    report = {
        "benchmark": "data",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "set": what,
        **result,
    }
    print(json.dumps({"set": what, **result}, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
