"""On-policy identity: at staleness 0 the learner's logprobs equal those of the native engine.

The importance ratio is then 1 up to rounding on every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from native_engine_world import FAMILIES, group, run, tiny_decoder

from dapo_async.algorithm import summarise
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.model import Decoder
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.types import Group, Prompt, Rollout

BOUND = 1e-5  # of |log π_learner − log π_engine|, float32 on CPU
PROMPTS = ([5, 6, 7], [1], list(range(40, 59)), [9, 9], [30, 2, 11, 4, 4])
STOPS = tuple(range(50, 61))  # eleven of 61 tokens end a response: ragged lengths


def learner_on(decoder: Decoder) -> LearnerRank:
    # Microbatches of 70 tokens: sequences have other neighbours than in the engine's slots.
    return LearnerRank(
        decoder,
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(lr=1e-2, warmup_steps=0, microbatch_tokens=70),
    )


def generated(
    engine: TorchEngine, *, temperature: float, recorded: float | None = None
) -> list[Group]:
    """Five groups of four on three slots, so that slots are refilled within groups.

    `recorded`: another temperature that the groups carry.
    """
    requests = [
        group(key, prompt, siblings=4, max_tokens=25, temperature=temperature, stop=STOPS)
        for key, prompt in enumerate(PROMPTS)
    ]
    finished = run(engine, *requests)
    groups = []
    for request in requests:
        # Any rewards will do: the ratio is measured before the first update.
        rollouts = tuple(
            Rollout(completion, "", 0.0, float(number), None)
            for number, completion in enumerate(finished[request.group_id])
        )
        groups.append(
            Group(
                request.group_id,
                Prompt(request.group_id, "", request.prompt_ids, ""),
                rollouts,
                "first",
                recorded or temperature,
            )
        )
    return groups


def worst_log_ratio(learner: LearnerRank, groups: Sequence[Group]) -> float:
    """Largest |log π_prox − log π_beh| over all tokens of a step."""
    metrics = summarise(learner.step(groups))
    assert metrics["loss_tokens"] == sum(
        rollout.num_tokens for group_ in groups for rollout in group_.rollouts
    )
    assert (
        metrics["current_log_ratio_max"] == 0.0
    )  # before the first update the current policy is the proximal policy, bit for bit
    return metrics["behaviour_log_ratio_max"]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_learner_agrees_with_the_engine_on_every_token_it_sampled(
    family: str, temperature: float
) -> None:
    engine = TorchEngine(tiny_decoder(family), num_slots=3, max_len=64)
    groups = generated(engine, temperature=temperature)
    lengths = {rollout.num_tokens for group_ in groups for rollout in group_.rollouts}
    assert len(lengths) > 5
    assert worst_log_ratio(learner_on(tiny_decoder(family)), groups) <= BOUND


def test_the_next_version_agrees_again_once_its_weights_are_swapped_in() -> None:
    engine, learner = (
        TorchEngine(tiny_decoder(), num_slots=3, max_len=64),
        learner_on(tiny_decoder()),
    )
    for version in range(3):
        groups = generated(engine, temperature=0.7)
        assert {
            int(token)
            for group_ in groups
            for rollout in group_.rollouts
            for token in rollout.completion.weight_versions
        } == {version}
        assert worst_log_ratio(learner, groups) <= BOUND
        engine.update_weights(
            learner.decoder.state_dict(),
            version=learner.version,
            probe_ids=np.arange(4, dtype=np.int32),
        )


def test_an_engine_at_another_temperature_than_its_group_breaks_the_identity() -> None:
    """The engine samples at 0.7, the group carries 1.0."""
    engine = TorchEngine(tiny_decoder(), num_slots=3, max_len=64)
    assert (
        worst_log_ratio(
            learner_on(tiny_decoder()), generated(engine, temperature=0.7, recorded=1.0)
        )
        > 1000 * BOUND
    )


def test_weights_that_were_published_but_not_loaded_break_the_identity() -> None:
    """The engine takes the number of the new version and keeps its old weights."""
    engine, learner = (
        TorchEngine(tiny_decoder(), num_slots=3, max_len=64),
        learner_on(tiny_decoder()),
    )
    assert worst_log_ratio(learner, generated(engine, temperature=1.0)) <= BOUND
    engine.version = learner.version
    groups = generated(engine, temperature=1.0)
    assert {group_.oldest_version for group_ in groups} == {
        learner.version
    }  # nothing but the ratio can tell
    assert worst_log_ratio(learner, groups) > 1000 * BOUND


def test_a_prompt_prefilled_under_older_weights_breaks_the_identity() -> None:
    """`keep_kv` with an update inside a response: later tokens still use the KV of old weights."""
    engine, learner = (
        TorchEngine(tiny_decoder(), num_slots=3, max_len=64, weight_update="keep_kv"),
        learner_on(tiny_decoder()),
    )
    engine.submit(group(0, PROMPTS[2], siblings=3, max_tokens=12))
    engine.step()
    learner.step(generated(TorchEngine(tiny_decoder(), num_slots=3, max_len=64), temperature=1.0))
    engine.update_weights(
        learner.decoder.state_dict(), version=1, probe_ids=np.arange(4, dtype=np.int32)
    )
    completions = run(engine)[0]
    rollouts = tuple(
        Rollout(completion, "", 0.0, float(number), None)
        for number, completion in enumerate(completions)
    )
    mixed = Group(0, Prompt(0, "", np.array(PROMPTS[2], np.int32), ""), rollouts, "first", 1.0)
    assert mixed.oldest_version == 0
    assert worst_log_ratio(learner, [mixed]) > 1000 * BOUND
