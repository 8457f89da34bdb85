"""Weight updates between two decode steps: versions and logprobs of the tokens."""

import numpy as np
import pytest
import torch
from native_engine_world import (
    FAMILIES,
    chosen,
    group,
    packed_logprobs,
    run,
    tiny_decoder,
    tiny_engine,
)

from dapo_async.model import take_snapshot
from dapo_async.rollout import UpdateReport
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.types import Completion

PROBE = np.arange(1, 9, dtype=np.int32)
REQUESTS = (
    group(0, [5, 6, 7], siblings=3, max_tokens=10),
    group(1, [8], max_tokens=4),
    group(2, range(20), siblings=4, max_tokens=8),
)


def swap(engine: TorchEngine, seed: int, version: int, family: str = "qwen2") -> UpdateReport:
    snapshot = take_snapshot(tiny_decoder(family, seed=seed), version=version, probe_tokens=1)
    return engine.update_weights(snapshot.copy.whole(), version=version, probe_ids=PROBE)


def stepped(engine: TorchEngine, steps: int) -> dict[int, tuple[Completion, ...]]:
    finished: dict[int, tuple[Completion, ...]] = {}
    for _ in range(steps):
        finished.update(engine.step())
    return finished


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_gives_every_token_the_exact_logprob_of_its_version(
    family: str,
) -> None:
    engine = tiny_engine(family, num_slots=5)
    for request in REQUESTS:
        engine.submit(request)
    finished = stepped(engine, 3)
    lengths = sorted(len(owner.prompt_ids) + 3 - 1 for owner, _ in engine._table.owners)
    report = swap(engine, seed=2, version=1, family=family)
    assert report.recomputed_tokens == sum(lengths)
    finished |= stepped(engine, 2)
    swap(engine, seed=3, version=2, family=family)
    finished |= run(engine)
    decoders = [tiny_decoder(family, seed=seed) for seed in (1, 2, 3)]
    for request in REQUESTS:
        for completion in finished[request.group_id]:
            logprobs = torch.stack(
                [
                    packed_logprobs(decoder, request.prompt_ids, completion.token_ids)
                    for decoder in decoders
                ]
            )
            versions = torch.from_numpy(completion.weight_versions).long()
            expected = chosen(logprobs[versions, torch.arange(len(versions))], completion)
            np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=1e-5, rtol=0)
            assert completion.prefill_version == versions[0]
    assert finished[0][0].weight_versions.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]


def test_siblings_that_start_after_a_swap_read_their_prompt_again() -> None:
    engine = tiny_engine(num_slots=2)
    engine.submit(group(0, range(10), siblings=4, max_tokens=3))
    engine.step()
    assert engine.prefilled_tokens == 10
    swap(engine, seed=2, version=1)
    finished = run(engine)
    assert engine.prefilled_tokens == 20
    assert [completion.prefill_version for completion in finished[0]] == [0, 0, 1, 1]
    expected = packed_logprobs(tiny_decoder(seed=2), range(10), finished[0][3].token_ids)
    np.testing.assert_allclose(
        finished[0][3].behaviour_logprobs, chosen(expected, finished[0][3]), atol=1e-5, rtol=0
    )


def test_keep_kv_samples_from_the_new_weights_on_the_old_keys_and_values() -> None:
    engine = tiny_engine(weight_update="keep_kv")
    engine.submit(group(0, [5, 6, 7], max_tokens=8))
    stepped(engine, 4)
    old = tiny_decoder(seed=1).state_dict()
    nudged = {
        name: tensor + 0.005 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        for name, tensor in old.items()
    }
    report = engine.update_weights(nudged, version=1, probe_ids=PROBE)
    completion = run(engine)[0][0]
    assert report.recomputed_tokens == 0
    assert completion.weight_versions.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    decoder = tiny_decoder(seed=1)
    decoder.load_state_dict(nudged)
    errors = np.abs(
        completion.behaviour_logprobs
        - chosen(packed_logprobs(decoder, [5, 6, 7], completion.token_ids), completion)
    )[4:]
    assert 1e-4 < errors.max() < 0.5


def test_draining_starts_nothing_until_the_running_sequences_have_ended() -> None:
    engine = tiny_engine(num_slots=3, weight_update="drain")
    engine.submit(group(0, [5, 6, 7], siblings=2, max_tokens=3))
    engine.submit(group(1, [4, 4], siblings=3, max_tokens=3))  # one of them starts, two wait
    engine.step()
    engine.draining = True
    finished = run(engine)
    assert sorted(finished) == [0]
    assert engine.num_running == 0
    swap(engine, seed=2, version=1)
    finished |= run(engine)
    assert [completion.weight_versions.tolist() for completion in finished[1]] == [
        [0, 0, 0],
        [1, 1, 1],
        [1, 1, 1],
    ]


def test_the_probes_are_the_logprobs_of_the_weights_before_and_after() -> None:
    engine = tiny_engine()
    report = swap(engine, seed=2, version=7)
    for seed, probe in ((1, report.probe_before), (2, report.probe_after)):
        logprobs = packed_logprobs(tiny_decoder(seed=seed), PROBE[:1], PROBE[1:])
        np.testing.assert_allclose(
            probe,
            logprobs.gather(-1, torch.from_numpy(PROBE[1:]).long()[:, None]).squeeze(-1).numpy(),
            atol=1e-5,
            rtol=0,
        )
    assert engine.version == 7


def test_weights_of_another_dtype_are_copied_and_wrong_ones_change_nothing() -> None:
    engine = tiny_engine()
    halves = {name: tensor.bfloat16() for name, tensor in tiny_decoder(seed=2).state_dict().items()}
    engine.update_weights(halves, version=1, probe_ids=PROBE)
    for name, tensor in engine.weights().items():
        assert torch.equal(tensor, halves[name].float())
    halves.pop("model.norm.weight")
    with pytest.raises(
        ValueError, match=r"version 2 do not fit the engine's model in \['model.norm.weight'\]"
    ):
        engine.update_weights(halves, version=2, probe_ids=PROBE)
    assert engine.version == 1
