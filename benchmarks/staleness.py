"""What staleness costs, and what each correction saves of it: the quickstart's task with every trained group exactly S versions old.

All rooms but the runtime, in one process: the workers are as fast as the replay room lets them be. Whatever credits there are is generated before
each step, so that the buffer holds S batches beside the one that is taken, the oldest; after the first S steps each token is S versions old.

- `truncate`: decoupled, behaviour weights cut at 2 (the default)        - `mask`: decoupled, tokens with a weight outside [0.5, 2] dropped
- `off`: coupled PPO, the clip is around the behaviour policy            - `m2po`: coupled, with M2PO's second-moment mask at 0.04
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import commit, hardware
from matplotlib import pyplot

from dapo_async import config as knobs
from dapo_async.algorithm import summarise
from dapo_async.config import Config
from dapo_async.data import load_set, load_tokenizer
from dapo_async.learner import LearnerRank
from dapo_async.model import load_decoder
from dapo_async.replay import ReplayBuffer, has_tokens
from dapo_async.reward import get_verifier, score_group
from dapo_async.rollout import GroupRequest, SamplingParams, TorchEngine
from dapo_async.types import Admission, Completion, Prompt

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
FORMS: dict[str, dict[str, Any]] = {
    "truncate": {},
    "off": {"proximal": "behaviour", "correction": "none"},
    "mask": {"correction": "mask", "correction_floor": 0.5},
    "m2po": {"proximal": "behaviour", "correction": "none", "second_moment": 0.04},
}
STALENESS, SEEDS = (0, 2, 8, 16), (0, 1, 2)
GROUPS, GROUP_SIZE, LR = 16, 16, 3e-4
EVALUATE_EVERY, HELD_OUT = 5, 256
LAST = 4  # evaluations that the table's final accuracy is the mean of
CURVE = ("entropy", "kl", "behaviour_ess", "response_tokens", "grad_norm", "staleness", "group_staleness_max")
PROBE = np.arange(8, dtype=np.int32)


def num_steps(staleness: int) -> int:
    return max(60, 10 * staleness + staleness)


class Study:
    """One run: a form of correction, a staleness, a seed."""

    def __init__(self, config: Config, *, form: str, staleness: int, seed: int, steps: int) -> None:
        base = Path(config.model.path)
        tokenizer = load_tokenizer(base)
        self.config, self.staleness, self.seed, self.steps, self.tokenizer = config, staleness, seed, steps, tokenizer
        self.prompts = load_set(config, config.data.train, tokenizer).prompts
        self.held_out = load_set(config, config.data.heldout, tokenizer).prompts[:HELD_OUT]
        self.order = np.random.default_rng(seed).permutation(len(self.prompts))
        self.verify = get_verifier(config.reward.verifier)
        self.engine = TorchEngine(load_decoder(base), num_slots=128, max_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens)
        algorithm, learner = replace(config.algorithm, **FORMS[form]), replace(config.learner, lr=LR)
        self.rank = LearnerRank(load_decoder(base), algorithm=algorithm, learner=learner, seed=seed)
        self.coupled = algorithm.proximal == "behaviour"
        self.stop = self.rank.decoder.config.eos_token_ids
        self.replay = ReplayBuffer(
            groups_per_step=GROUPS, max_staleness=staleness, num_steps=steps, filters=(has_tokens,), patience=10**9, incarnation="study"
        )

    def run(self) -> dict[str, Any]:
        """The curve of each step, and held-out accuracy each `EVALUATE_EVERY` of them."""
        self.replay.serve(0)
        rows, accuracies = [], [[0, self.accuracy()]]
        for step in range(self.steps):
            self.fill()
            batch = self.replay.take(step)
            assert batch is not None, self.replay.explain_wait(step)
            assert set(batch.oldest_versions) == {max(0, step - self.staleness)}, "a group is not as old as it was to be"
            metrics = summarise(self.rank.step(batch.references))
            self.replay.trained(batch.admission_indices)
            weights = {name: parameter.detach() for name, parameter in self.rank.decoder.named_parameters()}
            self.engine.update_weights(weights, version=step + 1, probe_ids=PROBE)
            self.replay.serve(step + 1)
            self.replay.release(batch.admission_indices)
            # Of the policy that trains against the one that sampled: the coupled forms have no other proximal policy than that.
            metrics["kl"] = metrics["current_kl_k3" if self.coupled else "behaviour_kl_k3"]
            rows.append({name: metrics.get(name) for name in CURVE})
            if (step + 1) % EVALUATE_EVERY == 0:
                accuracies.append([step + 1, self.accuracy()])
        return {"held_out": accuracies, **{name: [row[name] for row in rows] for name in CURVE}}

    def fill(self) -> None:
        """Generates whatever may be generated, all of it under the newest weights."""
        admissions = []
        while self.replay.admissible():
            index = self.replay.admit("rollout-0")
            admissions.append(Admission(index, self.prompts[self.order[index % len(self.prompts)]], group_size=GROUP_SIZE))
        sampling = SamplingParams(max_tokens=self.config.rollout.max_response_tokens, temperature=1.0, stop_token_ids=self.stop, seed=self.seed)
        answers = self.generate([GroupRequest(each.index, each.prompt.token_ids, GROUP_SIZE, sampling) for each in admissions])
        for admission in admissions:
            completions = answers[admission.index]
            group = score_group(
                admission,
                completions,
                texts=[self.text(completion) for completion in completions],
                verify=self.verify,
                max_response_tokens=self.config.rollout.max_response_tokens,
                incarnation="study",
                temperature=1.0,
            )
            self.replay.offer(group, payload=group)

    def generate(self, requests: list[GroupRequest]) -> dict[int, tuple[Completion, ...]]:
        for request in requests:
            self.engine.submit(request)
        done: dict[int, tuple[Completion, ...]] = {}
        while self.engine.has_work:
            done.update(self.engine.step())
        return done

    def accuracy(self) -> float:
        """Greedy, on the held-out prompts."""
        greedy = SamplingParams(max_tokens=self.config.rollout.max_response_tokens, temperature=0.0, stop_token_ids=self.stop, seed=0)
        answers = self.generate([GroupRequest(-1 - number, prompt.token_ids, 1, greedy) for number, prompt in enumerate(self.held_out)])
        return statistics.mean(self.right(prompt, answers[-1 - number][0]) for number, prompt in enumerate(self.held_out))

    def right(self, prompt: Prompt, completion: Completion) -> float:
        return float(self.verify(self.text(completion), prompt.answer).correct)

    def text(self, completion: Completion) -> str:
        text: str = self.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        return text


def measure(form: str, staleness: int, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    curves = Study(knobs.load(CONFIG), form=form, staleness=staleness, seed=seed, steps=steps).run()
    return {"form": form, "S": staleness, "seed": seed, "steps": steps, "seconds": round(time.perf_counter() - start_s, 1), **curves}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per form and staleness: mean over the seeds, and the lowest and highest."""
    rows = []
    for form, staleness in dict.fromkeys((run["form"], run["S"]) for run in runs):
        mine = [run for run in runs if (run["form"], run["S"]) == (form, staleness)]
        finals = [statistics.mean(accuracy for _, accuracy in run["held_out"][-LAST:]) for run in mine]
        tail = max(1, mine[0]["steps"] // 4)

        def last(name: str, mine: list[dict[str, Any]] = mine, tail: int = tail) -> float:
            return statistics.mean(value for run in mine for value in run[name][-tail:])

        rows.append(
            {
                "form": form,
                "S": staleness,
                "steps": mine[0]["steps"],
                "accuracy": f"{statistics.mean(finals):.3f} ({min(finals):.3f} to {max(finals):.3f})",
                "best": f"{statistics.mean(max(accuracy for _, accuracy in run['held_out']) for run in mine):.3f}",
                "KL, last quarter": f"{last('kl'):.2g}",
                "effective samples": f"{last('behaviour_ess'):.2f}",
                "entropy": f"{last('entropy'):.3f}",
            }
        )
    return rows


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    staleness = sorted({run["S"] for run in runs})
    figure, axes = pyplot.subplots(3, len(staleness), figsize=(4 * len(staleness), 9), squeeze=False, sharey="row")
    names = list(dict.fromkeys(run["form"] for run in runs))
    for run in runs:
        column, color = staleness.index(run["S"]), f"C{names.index(run['form'])}"
        label = run["form"] if run["seed"] == SEEDS[0] else None
        axes[0][column].plot(*zip(*run["held_out"], strict=True), color=color, label=label)
        axes[1][column].plot(run["kl"], color=color)
        axes[2][column].plot(run["entropy"], color=color)
    for column, value in enumerate(staleness):
        axes[0][column].set_title(f"every group {value} versions old")
        axes[1][column].set_yscale("log")
        axes[2][column].set_xlabel("learner step")
    for row, name in enumerate(("held-out accuracy", "KL to the behaviour policy, nats", "entropy, nats")):
        axes[row][0].set_ylabel(name)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every curve there, and a picture beside it")
    parser.add_argument("--quick", action="store_true", help="five steps at S = 2, one seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.quick:
        jobs = [(form, 2, 0, 5) for form in FORMS]
    else:
        jobs = [(form, staleness, seed, num_steps(staleness)) for staleness in sorted(STALENESS, reverse=True) for form in FORMS for seed in SEEDS]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = []
        for future in as_completed([pool.submit(measure, *job) for job in jobs]):
            runs.append(future.result())
            print(f"{len(runs)} of {len(jobs)}: {runs[-1]['form']}, S = {runs[-1]['S']}, {runs[-1]['seconds']} s", file=sys.stderr)
    runs.sort(key=lambda run: (list(FORMS).index(run["form"]), run["S"], run["seed"]))
    rows = table(runs)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "benchmark": "staleness",
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "table": rows,
            "runs": runs,
        }
        options.json.write_text(json.dumps(report) + "\n")
        draw(runs, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
