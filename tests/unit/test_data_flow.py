"""A tutorial: one group passes through all packages, in one process, in the order of a real run.

A real run does the same in Ray actors that work concurrently. The test does not depend on the
quality of the model: its own verifier decides which responses are correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from paths import QUICKSTART

from dapo_async.algorithm import summarise
from dapo_async.config import AlgorithmConfig, Config, LearnerConfig, load
from dapo_async.data import PromptStream, Tokenizer, load_prompts, load_tokenizer
from dapo_async.learner import LearnerRank
from dapo_async.model import checksum, load_decoder, score_tokens, take_snapshot
from dapo_async.replay import Counts, OfferOutcome, ReplayBuffer, dynamic_sampling, has_tokens
from dapo_async.reward import Verdict, score_group
from dapo_async.rollout import GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.types import Admission, Completion, Group, RejectReason
from dapo_async.weights import Announcement, Attestation, Manifest, check_attestation
from dapo_async.weights.disk import read_version, write_version

RIGHT, WRONG = Verdict(True, "42", "correct"), Verdict(False, "41", "wrong")


def test_one_group_passes_from_the_prompt_to_the_published_weights(parts: Parts) -> None:
    replay, learner = parts.replay, parts.learner

    # Before the first publish no group may start. Then every engine serves version 0, and both
    # credits are free.
    assert replay.admissible() == 0
    replay.serve(0)
    assert (replay.admissible(), replay.credits_held) == (2, 0)

    # data -> replay.admit -> engine -> reward: a first group. All four responses are wrong, so all
    # advantages are 0: dynamic sampling rejects the group, and its credit is free at once.
    offered = replay.offer(roll(parts, [WRONG] * 4), payload=None)
    assert (offered.outcome, offered.reason) == (OfferOutcome.REJECTED, RejectReason.ALL_WRONG)
    assert replay.credits_held == 0
    assert replay.take(learner_version=0) is None  # the learner waits

    # The next prompt gives a mixed group. Every token has its weight version and its logprob.
    group = roll(parts, [RIGHT, WRONG, RIGHT, WRONG])
    assert (group.group_id, group.accuracies) == (1, (1, 0, 1, 0))
    assert [rollout.reward for rollout in group.rollouts] == [1, -1, 1, -1]
    assert all((rollout.completion.weight_versions == 0).all() for rollout in group.rollouts)
    assert all((rollout.completion.behaviour_logprobs <= 0).all() for rollout in group.rollouts)
    assert replay.offer(group, payload=group).outcome is OfferOutcome.ACCEPTED
    assert (replay.num_buffered, replay.credits_held) == (1, 1)

    # replay.take -> learner: a batch of one group. It trains, and the weights become version 1.
    batch = replay.take(learner_version=0)
    assert batch is not None
    assert (batch.group_ids, batch.oldest_versions) == ((1,), (0,))
    assert batch.references == (group,)
    assert_trains(learner, group)
    replay.trained(batch.group_ids)
    assert replay.credits_held == 1  # no engine has the new weights yet

    # learner -> weights -> engine: version 1 is published and passes the handshake. Now the credit
    # returns, and no group is in flight. One step is left, so one more group may start.
    publish(parts)
    replay.serve(1)
    replay.release(batch.group_ids)
    assert (replay.credits_held, replay.counts.in_flight) == (0, 0)
    assert replay.admissible() == 1

    # A third group: all its tokens are of version 1, and the learner computes the same logprobs.
    group = roll(parts, [WRONG, RIGHT, WRONG, WRONG])
    assert group.weight_versions == {1}
    replay.offer(group, payload=group)
    batch = replay.take(learner_version=1)
    assert batch is not None
    assert summarise(learner.step(batch.references))["behaviour_log_ratio_max"] < 1e-5

    # The run ends before that step is recorded, so its group counts as unused. Every admitted group
    # has ended exactly once (conservation).
    assert replay.close() == Counts(
        admitted=3, trained=1, unused=1, rejected={RejectReason.ALL_WRONG: 1}
    )
    replay.check()


def roll(parts: Parts, verdicts: Sequence[Verdict]) -> Group:
    """Admits a prompt, generates its group and scores it."""
    group_id = parts.replay.admit("rollout-0")
    admission = Admission(group_id, parts.prompts[group_id], group_size=4)
    return score(parts, admission, generate(parts, admission), verdicts)


def generate(parts: Parts, admission: Admission) -> Sequence[Completion]:
    """Like the rollout worker; the engine decodes four siblings, one token per slot and step."""
    sampling = SamplingParams(
        max_tokens=parts.config.rollout.max_response_tokens,
        temperature=1.0,
        stop_token_ids=parts.learner.decoder.config.eos_token_ids,
        seed=parts.config.seed,
    )
    parts.engine.submit(
        GroupRequest(admission.group_id, admission.prompt.token_ids, admission.group_size, sampling)
    )
    finished: list[tuple[int, Sequence[Completion]]] = []
    while parts.engine.has_work:
        finished += parts.engine.step()
    ((key, completions),) = finished
    assert key == admission.group_id
    assert len(completions) == 4
    return completions


def score(
    parts: Parts,
    admission: Admission,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
) -> Group:
    """Decodes and verifies the responses; a verdict gives a reward of +1 or -1."""
    texts = [
        parts.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        for completion in completions
    ]
    remaining = iter(verdicts)
    return score_group(
        admission,
        completions,
        texts=texts,
        verify=lambda response, gold, prompt="": next(remaining),
        max_response_tokens=parts.config.rollout.max_response_tokens,
        incarnation="first",
        temperature=1.0,
    )


def assert_trains(learner: LearnerRank, group: Group) -> None:
    """The learner computes advantages and the loss over all tokens, then updates the weights."""
    metrics = summarise(learner.step([group]))
    # Rewards 1, -1, 1, -1: mean 0, unbiased standard deviation sqrt(4 / 3), advantages +-0.866.
    advantages = np.array([1, -1, 1, -1]) * 0.8660254
    lengths = np.array([rollout.num_tokens for rollout in group.rollouts])
    # At staleness 0 engine and learner agree on every token (on-policy identity): all ratios
    # are 1, and the loss is minus the token mean of the advantages.
    assert metrics["behaviour_log_ratio_max"] < 1e-5
    assert metrics["loss"] == pytest.approx(-(advantages * lengths).sum() / lengths.sum(), abs=1e-4)
    assert (metrics["groups"], metrics["rollouts"]) == (1, 4)
    assert metrics["tokens"] == metrics["loss_tokens"] == lengths.sum()
    assert (metrics["accuracy"], metrics["reward"]) == (0.5, 0)
    assert (metrics["staleness"], metrics["skipped"]) == (0, 0)
    assert learner.version == 1


def publish(parts: Parts) -> None:
    """Publishes version 1 by disk: snapshot, file, swap between two decode steps, handshake."""
    snapshot = take_snapshot(parts.learner.decoder, version=1, probe_tokens=16)
    weights = snapshot.copy.whole()
    manifest, announced_sum = Manifest.of(weights), checksum(weights)
    answer = score_tokens(parts.learner.decoder, snapshot.probe_ids)
    announcement = Announcement("first", 1, manifest, announced_sum, snapshot.probe_ids, answer)
    assert write_version(weights, parts.folder, version=1).name == "version_000001"

    before = checksum(parts.engine.weights())
    report = parts.engine.update_weights(
        read_version(parts.folder, version=1), version=1, probe_ids=announcement.probe_ids
    )
    after = checksum(parts.engine.weights())
    attested = Attestation(
        "rollout-0",
        "first",
        parts.engine.version,
        report.probe_before,
        report.probe_after,
        before,
        after,
    )
    assert check_attestation(announcement, attested, tolerance=1e-3).outcome == "passed"

    # An engine that attests version 1 with the old weights is a mismatch.
    pretender = Attestation(
        "rollout-0", "first", 1, report.probe_before, report.probe_before, before, before
    )
    assert check_attestation(announcement, pretender, tolerance=1e-3).outcome == "mismatch"


@dataclass
class Parts:
    """The objects with state; the other packages are functions."""

    config: Config
    tokenizer: Tokenizer
    prompts: PromptStream  # data/
    replay: ReplayBuffer  # replay/
    engine: TorchEngine  # rollout/
    learner: LearnerRank  # learner/
    folder: Path  # weights/: the published versions on disk


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    config = load(QUICKSTART)
    base, data = Path(config.model.path), config.data
    tokenizer = load_tokenizer(base)
    train_set = load_prompts(
        Path(data.train),
        tokenizer=tokenizer,
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    # One group per step and staleness up to 1: (1 + 1) x 1 = 2 credits; the run has two steps.
    replay = ReplayBuffer(
        groups_per_step=1,
        max_staleness=1,
        num_steps=2,
        filters=(has_tokens, dynamic_sampling),
        max_rejected_in_a_row=10,
        incarnation="first",
    )
    # Engine and learner own a copy of the same decoder each: the same code, the same weights.
    engine = TorchEngine(
        load_decoder(base),
        num_slots=4,
        max_len=data.max_prompt_tokens + config.rollout.max_response_tokens,
    )
    learner = LearnerRank(
        load_decoder(base),
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(lr=1e-3, warmup_steps=0),
    )
    return Parts(
        config,
        tokenizer,
        PromptStream(train_set.prompts, seed=config.seed),
        replay,
        engine,
        learner,
        tmp_path,
    )
