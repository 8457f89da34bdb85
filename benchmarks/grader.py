"""Speed of the verifier of mathematical answers, and its agreement with recorded verdicts.

python benchmarks/grader.py [--json OUT] [--quick]

Plain answers are integers, judged by one thread of this process. Symbolic answers go to the pool
of verifier processes, from as many threads as it has processes. The recorded verdicts are in
shared/data/grader_vectors beside the checkout, or in the folder that DAPO_ASYNC_SHARED names.
Without them the agreement is not measured. Each disagreement is printed with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine import hardware

from dapo_async.bench.about import commit
from dapo_async.reward.math_verifier.pool import NUM_PROCESSES
from dapo_async.reward.math_verifier.verify import verify

SHARED = Path(os.environ.get("DAPO_ASYNC_SHARED") or Path(__file__).parents[2] / "shared")
VECTORS = SHARED / "data" / "grader_vectors"
REASONS: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "grader_disagreements.json").read_text()
)
SYMBOLIC = (
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"(1,\frac{9}{2})", "(1,4.5)"),
    (r"\tan^2(y)+1", r"\sec^2(y)"),
    (r"(-\infty,3]", r"(-\infty,3)"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\frac{\pi}{2}", r"\pi"),
)


def rate(judge: Callable[[int], Any], count: int, threads: int = 1) -> float:
    """Calls per second."""
    began_s = time.perf_counter()
    if threads == 1:
        for number in range(count):
            judge(number)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(judge, range(count)))
    return count / (time.perf_counter() - began_s)


def plain(number: int) -> None:
    response = (
        f"<think>{'some thought and a number 17. ' * 60}</think>\nSo we get it.\nAnswer: {number}"
    )
    assert verify(response, str(number - number % 2)).correct == (number % 2 == 0)


def symbolic(number: int) -> None:
    gold, answer = SYMBOLIC[number % len(SYMBOLIC)]
    assert verify(rf"Thus \boxed{{{answer}}}.", gold).reason in ("correct", "wrong")


def agreement(
    rows: Sequence[dict[str, Any]], judge: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The number of `rows` that are judged as expected; the others by id with their reason."""
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        verdicts = list(pool.map(judge, rows))
    wrong = [
        (row["id"], verdict)
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict != row["expected"]
    ]
    return {
        "rows": len(rows),
        "agree": len(rows) - len(wrong),
        "share": round((len(rows) - len(wrong)) / len(rows), 4),
        "disagreements": [
            {
                "id": name,
                "accepted": verdict,
                "reason": REASONS.get(name, {"reason": "NOT REASONED"})["reason"],
            }
            for name, verdict in wrong
        ],
    }


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (VECTORS / name).read_text().splitlines()]


def of_the_vectors() -> dict[str, Any]:
    """Agreement on the rows of math-verify's tests and on the recorded responses to GSM8K."""
    rows, responses = read("math_verify.jsonl"), read("gsm8k_model_outputs.jsonl")

    def marked(row: dict[str, Any]) -> bool:
        return bool(verify(row["prediction"], row["gold"]).correct)

    def anywhere(row: dict[str, Any]) -> bool:
        return bool(verify(row["prediction"], row["gold"], extraction="any").correct)

    def answer(row: dict[str, Any]) -> bool:
        return bool(
            verify(row["prediction"].rpartition("A:")[2], row["gold"], extraction="none").correct
        )

    return {
        "math_verify, portable": agreement([row for row in rows if row["portable"]], anywhere),
        "math_verify, not portable": agreement(
            [row for row in rows if not row["portable"]], anywhere
        ),
        "gsm8k, marker": agreement(responses, marked),
        "gsm8k, any": agreement(responses, anywhere),
        "gsm8k, none, after A:": agreement(responses, answer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument("--quick", action="store_true", help="a tenth of the verdicts")
    options = parser.parse_args()
    scale = 1 if options.quick else 10
    began_s = time.perf_counter()
    symbolic(0)
    start_s = time.perf_counter() - began_s
    report = {
        "benchmark": "grader",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "quick": options.quick,
        "processes": NUM_PROCESSES,
        "start_s": round(start_s, 2),
        "plain_per_s": round(rate(plain, 2000 * scale)),
        "symbolic_per_s": round(rate(symbolic, 40 * scale, NUM_PROCESSES), 1),
        "agreement": of_the_vectors() if VECTORS.is_dir() else f"not measured: {VECTORS} is absent",
    }
    print(
        f"plain integers {report['plain_per_s']}/s, symbolic {report['symbolic_per_s']}/s; "
        f"start of the processes {report['start_s']} s"
    )
    if isinstance(report["agreement"], dict):
        for name, result in report["agreement"].items():
            print(f"{name}: {result['agree']} of {result['rows']} ({result['share']:.1%})")
            for each in result["disagreements"]:
                verdict = "accepted" if each["accepted"] else "rejected"
                print(f"  {each['id']} {verdict}: {each['reason']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
