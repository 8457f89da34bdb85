"""The loop of a run in one process, without the runtime and its waits, for studies of learning.

Before each step all free credits are used, and everything is generated with the newest weights. The
buffer then holds `staleness` batches beside the one that is taken, which is the oldest. So from
step `staleness` on, each trained group is exactly `staleness` versions old, unless filters reject
some groups.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapo_async.algorithm import summarise
from dapo_async.config import Config
from dapo_async.data import load_set, load_tokenizer
from dapo_async.learner import LearnerRank
from dapo_async.model import load_decoder
from dapo_async.replay import ReplayBuffer, dynamic_sampling, has_tokens
from dapo_async.reward import get_verifier, score_group
from dapo_async.rollout import GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.types import Admission, Completion, Group, Prompt

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
EVALUATE_EVERY, HELD_OUT, NUM_SLOTS = 5, 256, 128
PROBE = np.arange(8, dtype=np.int32)


@dataclass
class Curves:
    """What a study records."""

    rows: list[dict[str, float]] = field(default_factory=list)  # the metrics of each step
    # (step, greedy accuracy on held-out prompts), every `EVALUATE_EVERY` steps.
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def of(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "held_out": self.held_out,
            **{name: [row.get(name) for row in self.rows] for name in names},
        }


class InProcess:
    """One run of `config`'s task with its knobs of algorithm, learner, reward and replay."""

    def __init__(self, config: Config, *, staleness: int, seed: int, steps: int) -> None:
        base = Path(config.model.path)
        tokenizer = load_tokenizer(base)
        self.config, self.staleness, self.seed, self.steps, self.tokenizer = (
            config,
            staleness,
            seed,
            steps,
            tokenizer,
        )
        self.prompts = load_set(config, config.data.train, tokenizer, training=True).prompts
        self.held_out = load_set(config, config.data.heldout, tokenizer).prompts[:HELD_OUT]
        self.order = np.random.default_rng(seed).permutation(len(self.prompts))
        self.verify = get_verifier(config.reward.verifier)
        self.engine = TorchEngine(
            load_decoder(base),
            num_slots=NUM_SLOTS,
            max_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        )
        self.rank = LearnerRank(
            load_decoder(base), algorithm=config.algorithm, learner=config.learner
        )
        self.stop = self.rank.decoder.config.eos_token_ids
        self.generated = 0  # groups
        self.replay = ReplayBuffer(
            groups_per_step=config.replay.groups_per_step,
            max_staleness=staleness,
            num_steps=steps,
            filters=(has_tokens, dynamic_sampling)
            if config.replay.dynamic_sampling
            else (has_tokens,),
            max_rejected_in_a_row=10**9,
            incarnation="study",
        )

    def run(self) -> Curves:
        self.replay.serve(0)
        curves = Curves(held_out=[(0, self.accuracy())])
        for step in range(self.steps):
            before = self.generated
            while True:  # filters may reject what a batch needs
                self.fill()
                if (batch := self.replay.take(step)) is not None:
                    break
            metrics = summarise(self.rank.step(batch.references)) | {
                "oldest": float(step - min(batch.oldest_versions)),
                "newest": float(step - max(batch.oldest_versions)),
                "with_gradient": statistics.mean(
                    float(has_gradient(group)) for group in batch.references
                ),
                "generated": float(self.generated - before),
            }
            self.replay.trained(batch.group_ids)
            weights = {
                name: parameter.detach() for name, parameter in self.rank.decoder.named_parameters()
            }
            self.engine.update_weights(weights, version=step + 1, probe_ids=PROBE)
            self.replay.serve(step + 1)
            self.replay.release(batch.group_ids)
            curves.rows.append(metrics)
            if (step + 1) % EVALUATE_EVERY == 0:
                curves.held_out.append((step + 1, self.accuracy()))
        return curves

    def fill(self) -> None:
        """Generates a group for every free credit."""
        admissions, size = [], self.config.replay.group_size
        while self.replay.admissible():
            group_id = self.replay.admit("rollout-0")
            admissions.append(
                Admission(
                    group_id,
                    self.prompts[self.order[group_id % len(self.prompts)]],
                    group_size=size,
                )
            )
        limit = self.config.rollout.max_response_tokens
        sampling = SamplingParams(
            max_tokens=limit, temperature=1.0, stop_token_ids=self.stop, seed=self.seed
        )
        answers = self.generate(
            [
                GroupRequest(each.group_id, each.prompt.token_ids, size, sampling)
                for each in admissions
            ]
        )
        self.generated += len(admissions)
        for admission in admissions:
            completions = answers[admission.group_id]
            group = score_group(
                admission,
                completions,
                texts=[self.text(completion) for completion in completions],
                verify=self.verify,
                max_response_tokens=limit,
                overlong_cache_tokens=self.config.reward.overlong_cache_tokens,
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
        """Greedy accuracy on the held-out prompts."""
        greedy = SamplingParams(
            max_tokens=self.config.rollout.max_response_tokens,
            temperature=0.0,
            stop_token_ids=self.stop,
            seed=0,
        )
        answers = self.generate(
            [
                GroupRequest(-1 - number, prompt.token_ids, 1, greedy)
                for number, prompt in enumerate(self.held_out)
            ]
        )
        return statistics.mean(
            self.right(prompt, answers[-1 - number][0])
            for number, prompt in enumerate(self.held_out)
        )

    def right(self, prompt: Prompt, completion: Completion) -> float:
        return float(self.verify(self.text(completion), prompt.answer).correct)

    def text(self, completion: Completion) -> str:
        text: str = self.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        return text


def has_gradient(group: Group) -> bool:
    """Whether its rewards differ (punishment included). Otherwise all its advantages are 0."""
    return len({rollout.reward for rollout in group.rollouts}) > 1
