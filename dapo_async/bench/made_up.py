"""Prompts, response lengths and groups without a data set. The subjects take them.

Token ids are random. Speed does not depend on them: stop tokens are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout

DEFAULT_SIGMA = 1.0  # of the logarithm of response lengths: a usual tail of reasoning models
DEFAULT_PROMPT_TOKENS = 256
BEHAVIOUR_LOGPROB = -1.0


@dataclass(frozen=True, slots=True)
class ResponseLengths:
    """Where the numbers of tokens of made-up responses come from."""

    label: str  # in the rows of a result
    mean: float
    longest: int
    sigma: float = 0.0  # of a lognormal distribution; 0: all lengths are the mean
    observed: tuple[int, ...] = ()  # of a run; they are drawn with replacement

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths between 1 and `longest`."""
        if self.observed:
            lengths = random.choice(self.observed, count)
        else:
            # The mean of exp(N(m, s)) is exp(m + s²/2).
            location = np.log(self.mean) - self.sigma**2 / 2
            lengths = np.rint(np.exp(random.normal(location, self.sigma, count)))
        cut: NDArray[np.int64] = np.clip(lengths, 1, self.longest).astype(np.int64)
        return cut


def fixed_lengths(tokens: int) -> ResponseLengths:
    """Every response has this many tokens."""
    return ResponseLengths("fixed", tokens, tokens)


def lognormal_lengths(mean: float, *, sigma: float, longest: int) -> ResponseLengths:
    """Lognormal before the cut at `longest`."""
    return ResponseLengths(f"lognormal {sigma:g}", mean, longest, sigma)


def lengths_of_run(run_dir: Path, *, longest: int) -> ResponseLengths:
    """The response lengths in the `rollouts/` of a run. Raises ValueError if there are none."""
    observed: list[int] = []
    for path in sorted((run_dir / "rollouts").glob("step_*.jsonl")):
        try:
            lines = path.read_bytes().splitlines()  # a response may hold U+2028
            observed += [int(json.loads(line)["tokens"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has no rows of rollouts: {error}; give a run_dir") from error
    if not observed:
        raise ValueError(
            f"--lengths-from {run_dir} has no rollouts/step_*.jsonl; give the directory of a run"
        )
    cut = tuple(min(each, longest) for each in observed)
    return ResponseLengths("run", float(np.mean(cut)), longest, observed=cut)


def random_ids(random: np.random.Generator, count: int, *, vocabulary: int) -> NDArray[np.int32]:
    """`count` token ids."""
    return random.integers(0, vocabulary, count, dtype=np.int32)


def made_up_group(
    group_id: int,
    lengths: NDArray[np.int64],
    *,
    prompt_tokens: int,
    vocabulary: int,
    version: int = 0,
) -> Group:
    """A group with one rollout per length; half of its rollouts are right."""
    random = np.random.default_rng(group_id)
    prompt = Prompt(
        group_id, "", random_ids(random, prompt_tokens, vocabulary=vocabulary), answer=""
    )
    rollouts = []
    for sibling, length in enumerate(lengths.tolist()):
        completion = Completion(
            random_ids(random, length, vocabulary=vocabulary),
            np.full(length, BEHAVIOUR_LOGPROB, np.float32),
            np.full(length, version, np.int32),
            version,
            FinishReason.LENGTH,
        )
        right = float(sibling % 2)
        rollouts.append(Rollout(completion, "", right, right, None))
    return Group(group_id, prompt, tuple(rollouts), "bench", temperature=1.0)
