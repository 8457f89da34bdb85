"""Runs that the filters end, by the command line: solved, or stuck with the counts by reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from paths import QUICKSTART
from run_support import check_conservation, finished, read_rows, write_rows

from dapo_async import config as knobs
from dapo_async.data import PromptStream, load_tokenizer

# Runs that the filters end. Their data is made from the base model's own answers, so the tests
# hold for any base model.


def prompts_of(config: knobs.Config) -> list[str]:
    return [row["prompt"] for row in read_rows(Path(config.data.heldout))]


class Base:
    """The quickstart's base model in transformers, which shares no code with the decoder."""

    def __init__(self, config: knobs.Config) -> None:
        from transformers import AutoModelForCausalLM

        folder = Path(config.model.path)
        self._tokenizer, self._template = load_tokenizer(folder), config.data.template
        self._model = AutoModelForCausalLM.from_pretrained(folder)
        self._eos = self._model.config.eos_token_id

    @torch.no_grad()
    def logits(self, problem: str, response: Sequence[int] = ()) -> torch.Tensor:
        """Of the next token: [vocabulary]."""
        assert self._template is not None
        ids = self._tokenizer([self._template.replace("{problem}", problem)])["input_ids"][0]
        logits: torch.Tensor = self._model(torch.tensor([[*ids, *response]])).logits
        return logits[0, -1].double()

    def greedy(self, problem: str, *, num_tokens: int) -> tuple[str, float]:
        """The greedy response, and by how much each of its tokens leads at least (logits)."""
        response: list[int] = []
        margin = math.inf
        while len(response) < num_tokens and (not response or response[-1] != self._eos):
            best, second = self.logits(problem, response).topk(2)[0].tolist()
            margin = min(margin, best - second)
            response.append(int(self.logits(problem, response).argmax()))
        return self._tokenizer.decode(response, skip_special_tokens=True), margin

    def coin(self, problem: str) -> tuple[str, float]:
        """The likeliest first token as text, and the temperature that draws it half of the time."""
        logits = self.logits(problem)
        low, high = 1e-3, 1e3
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (
                (middle, high) if float((logits / middle).softmax(0).max()) > 0.5 else (low, middle)
            )
        return self._tokenizer.decode([int(logits.argmax())], skip_special_tokens=True), middle


@pytest.mark.ray
def test_run_that_has_nothing_left_to_learn_ends_solved(tmp_path: Path) -> None:
    # Gold answers are the base model's own clearest answers, and rollouts are almost greedy:
    # every rollout is right from the start.
    config = knobs.load(QUICKSTART)
    base = Base(config)
    greedy = {problem: base.greedy(problem, num_tokens=4) for problem in prompts_of(config)[:60]}
    clearest = sorted(
        (problem for problem in greedy if greedy[problem][0].strip()),
        key=lambda problem: -greedy[problem][1],
    )[:12]
    rows = [{"prompt": problem, "answer": greedy[problem][0]} for problem in clearest]
    data = write_rows(tmp_path / "own_answers.jsonl", rows)
    temperature = (
        min(greedy[problem][1] for problem in clearest) / 30
    )  # the second choice is e^30 times less likely
    clear = (
        f"rollout.temperature={temperature}",
        "rollout.max_response_tokens=4",
        "reward.verifier=exact",
        "reward.overlong_cache_tokens=null",
    )
    small = (
        "replay.groups_per_step=1",
        "learner.num_minibatches=1",
        "replay.group_size=4",
        "rollout.num_slots=16",
    )
    run = finished(tmp_path / "run", f"data.train={data}", f"data.heldout={data}", *clear, *small)
    summary = run.summary
    assert (run.exit_code, summary["status"]) == (0, "solved"), run.output
    assert summary["reason"] == "task solved: 32 groups in a row were all correct"
    assert summary["initial_accuracy"] == summary["final_accuracy"] == 1.0
    assert summary["groups"]["rejected"]["all_correct"] == summary["groups"]["admitted"] >= 32
    check_conservation(summary["groups"])
    assert (summary["steps"], summary["weight_versions"]) == (0, 1)


@pytest.mark.ray
def test_run_whose_groups_are_all_wrong_fails_with_the_counts_by_reason(tmp_path: Path) -> None:
    # Eighty problems whose answer can't be given. The first prompt is one whose siblings differ:
    # its group is accepted, but makes no batch.
    config = knobs.load(QUICKSTART)
    problems = prompts_of(config)[:81]
    answer, temperature = Base(config).coin(problems[0])
    rows = [{"prompt": problem, "answer": "impossible"} for problem in problems[1:]]
    order: Any = PromptStream(cast("Any", range(81)), seed=0)
    rows.insert(order[0], {"prompt": problems[0], "answer": answer})
    data = write_rows(tmp_path / "impossible.jsonl", rows)
    one_token = (
        f"rollout.temperature={temperature}",
        "rollout.max_response_tokens=1",
        "reward.verifier=exact",
        "reward.overlong_cache_tokens=null",
    )
    small = (
        "seed=0",
        "replay.groups_per_step=2",
        "learner.num_minibatches=1",
        "replay.group_size=16",
        "rollout.num_slots=32",
        "evaluation.num_prompts=8",
    )
    run = finished(tmp_path / "run", f"data.train={data}", *one_token, *small)
    summary = run.summary
    assert (run.exit_code, summary["status"]) == (1, "failed"), run.output
    assert summary["reason"].startswith("the filters rejected 64 groups in a row (all_wrong 64); ")
    (dump,) = (run.root / "dumps").iterdir()
    assert dump.read_text().startswith("why: the filters rejected 64 groups in a row")
    for name in ("driver", "replay", "learner", "rollout-0"):
        assert f"=== {name}\npid " in dump.read_text(), f"{name} did not answer"
    groups = summary["groups"]
    assert groups["unused"] == 1
    assert groups["rejected"]["all_wrong"] == groups["admitted"] - 1 >= 64
    check_conservation(groups)
    with pytest.raises(AssertionError, match="were admitted"):
        check_conservation({**groups, "unused": 0})
    assert run.checkpoint.is_dir()
