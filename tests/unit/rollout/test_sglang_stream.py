"""One response of an SGLang server as it comes: which version each token counts as before the end is known, and after it."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_async.rollout import EngineFault
from dapo_async.rollout.sglang.client import Chunk
from dapo_async.rollout.sglang.stream import Response, WrongVersion, joined, read_version
from dapo_async.types import Completion, FinishReason


def chunk(*token_ids: int, weight_version: str = "run:4") -> Chunk:
    return Chunk(list(token_ids), [-0.5] * len(token_ids), None, (), weight_version)


def test_tokens_that_may_have_been_under_way_at_an_update_count_as_older() -> None:
    response = Response("r", prompt_tokens=3, sent_version=4)
    response.add(chunk(1), newest_version=4, incarnation="run")
    response.add(
        chunk(2, 3), newest_version=5, incarnation="run"
    )  # came after the update to 5, may have been sampled before it
    response.add(chunk(4), newest_version=5, incarnation="run")
    partial = response.partial()
    assert partial.weight_versions.tolist() == [4, 4, 4, 5]
    assert (partial.token_ids.tolist(), partial.prefill_version, partial.finish_reason) == (
        [1, 2, 3, 4],
        4,
        FinishReason.ABORT,
    )
    assert partial.oldest_version == 4


SPANS = ({"version": "run:4", "start": 0, "end": 2}, {"version": "run:6", "start": 2, "end": 3})


@pytest.mark.parametrize(("keeps_kv", "prefill"), [(False, 4), (True, 3)])
def test_end_has_the_versions_that_the_server_attests(keeps_kv: bool, prefill: int) -> None:
    response = Response("r", prompt_tokens=3, sent_version=3)
    response.add(chunk(1, 2, 3), newest_version=6, incarnation="run")
    response.end({"type": "stop"}, SPANS, incarnation="run", keeps_kv=keeps_kv)
    whole = response.whole
    assert whole is not None
    assert whole.weight_versions.tolist() == [4, 4, 6]
    assert (whole.prefill_version, whole.finish_reason) == (prefill, FinishReason.STOP)


@pytest.mark.parametrize(
    ("finish", "spans", "incarnation", "line"),
    [
        ({"type": "length"}, SPANS[:1], "run", "attests versions for 2 of 3 tokens"),
        ({"type": "length"}, SPANS[1:], "run", "attests"),
        ({"type": "length"}, SPANS, "another", "this run is another"),
        (
            {"type": "abort", "message": "out of memory"},
            SPANS,
            "run",
            "gave up a response: out of memory",
        ),
    ],
)
def test_end_that_is_not_attested_by_this_run_is_a_fault(finish, spans, incarnation, line) -> None:
    response = Response("r", prompt_tokens=3, sent_version=3)
    response.add(chunk(1, 2, 3), newest_version=6, incarnation="run")
    with pytest.raises(EngineFault, match=line):
        response.end(finish, spans, incarnation=incarnation, keeps_kv=False)
    assert response.whole is None


def test_tokens_under_weights_of_nobody_s_giving_are_not_taken() -> None:
    response = Response("r", prompt_tokens=3, sent_version=3)
    response.add(chunk(1), newest_version=4, incarnation="run")
    with pytest.raises(
        WrongVersion, match="serves another:4 in the midst of a response; this run is run"
    ):
        response.add(chunk(2, weight_version="another:4"), newest_version=4, incarnation="run")
    assert response.partial().token_ids.tolist() == [1]


def test_head_and_tail_are_one_response() -> None:
    def part(tokens: list[int], version: int, reason: FinishReason) -> Completion:
        count = len(tokens)
        return Completion(
            np.array(tokens, np.int32),
            np.full(count, -1.0, np.float32),
            np.full(count, version, np.int32),
            version,
            reason,
        )

    whole = joined(part([1, 2], 3, FinishReason.ABORT), part([5], 4, FinishReason.STOP))
    assert (whole.token_ids.tolist(), whole.weight_versions.tolist()) == ([1, 2, 5], [3, 3, 4])
    assert (whole.prefill_version, whole.finish_reason, len(whole.behaviour_logprobs)) == (
        3,
        FinishReason.STOP,
        3,
    )
    assert joined(None, whole) is whole


@pytest.mark.parametrize(
    ("name", "version"),
    [("a1:7", ("a1", 7)), ("default", ("", -1)), ("a:b", ("", -1)), ("a:b:2", ("a:b", 2))],
)
def test_version_is_read_from_its_name(name: str, version: tuple[str, int]) -> None:
    assert read_version(name) == version
