"""One response of an SGLang server while it is streamed: the version of each token, before and
after the end of the response is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from dapo_async.rollout import EngineFault
from dapo_async.rollout.sglang.client import Chunk
from dapo_async.rollout.sglang.stream import ResponseStream, WrongVersion, joined, read_version
from dapo_async.types import Completion, FinishReason

SPANS = ({"version": "run:4", "start": 0, "end": 2}, {"version": "run:6", "start": 2, "end": 3})


def chunk(*token_ids: int, weight_version: str = "run:4") -> Chunk:
    return Chunk(list(token_ids), [-0.5] * len(token_ids), None, (), weight_version)


def test_tokens_that_may_have_been_on_their_way_at_an_update_count_as_older() -> None:
    response = ResponseStream("r", prompt_tokens=3, sent_version=4)
    response.add(chunk(1), newest_version=4, incarnation="run")
    # This chunk came after the update to 5; its tokens may have been sampled before the update.
    response.add(chunk(2, 3), newest_version=5, incarnation="run")
    response.add(chunk(4), newest_version=5, incarnation="run")
    partial = response.partial()
    assert partial.token_ids.tolist() == [1, 2, 3, 4]
    assert partial.weight_versions.tolist() == [4, 4, 4, 5]
    assert (partial.prefill_version, partial.finish_reason) == (4, FinishReason.ABORT)
    assert partial.oldest_version == 4


@pytest.mark.parametrize(("keeps_kv", "prefill"), [(False, 4), (True, 3)])
def test_completion_has_the_versions_that_the_server_attests(keeps_kv: bool, prefill: int) -> None:
    response = ResponseStream("r", prompt_tokens=3, sent_version=3)
    response.add(chunk(1, 2, 3), newest_version=6, incarnation="run")
    response.end({"type": "stop"}, SPANS, incarnation="run", keeps_kv=keeps_kv)
    completion = response.completion
    assert completion is not None
    assert completion.weight_versions.tolist() == [4, 4, 6]
    assert (completion.prefill_version, completion.finish_reason) == (prefill, FinishReason.STOP)


ABORTED = {"type": "abort", "message": "out of memory"}


@pytest.mark.parametrize(
    ("finish", "spans", "incarnation", "line"),
    [
        ({"type": "length"}, SPANS[:1], "run", "attests versions for 2 of 3 tokens"),
        ({"type": "length"}, SPANS[1:], "run", "attests"),
        ({"type": "length"}, SPANS, "another", "this run is another"),
        (ABORTED, SPANS, "run", "gave up a response: out of memory"),
    ],
)
def test_end_that_this_run_does_not_attest_is_a_fault(
    finish: Mapping[str, str], spans: Sequence[Mapping[str, Any]], incarnation: str, line: str
) -> None:
    response = ResponseStream("r", prompt_tokens=3, sent_version=3)
    response.add(chunk(1, 2, 3), newest_version=6, incarnation="run")
    with pytest.raises(EngineFault, match=line):
        response.end(finish, spans, incarnation=incarnation, keeps_kv=False)
    assert response.completion is None


def test_tokens_under_weights_of_another_run_are_refused() -> None:
    response = ResponseStream("r", prompt_tokens=3, sent_version=3)
    response.add(chunk(1), newest_version=4, incarnation="run")
    line = "serves another:4 during a response; this run is run"
    with pytest.raises(WrongVersion, match=line):
        response.add(chunk(2, weight_version="another:4"), newest_version=4, incarnation="run")
    assert response.partial().token_ids.tolist() == [1]


def part(tokens: list[int], version: int, reason: FinishReason) -> Completion:
    count = len(tokens)
    logprobs, versions = np.full(count, -1.0, np.float32), np.full(count, version, np.int32)
    return Completion(np.array(tokens, np.int32), logprobs, versions, version, reason)


def test_a_partial_completion_and_its_rest_are_one_completion() -> None:
    rest = part([5], 4, FinishReason.STOP)
    whole = joined(part([1, 2], 3, FinishReason.ABORT), rest)
    assert (whole.token_ids.tolist(), whole.weight_versions.tolist()) == ([1, 2, 5], [3, 3, 4])
    assert (whole.prefill_version, whole.finish_reason) == (3, FinishReason.STOP)
    assert len(whole.behaviour_logprobs) == 3
    assert joined(None, rest) is rest


@pytest.mark.parametrize(
    ("name", "version"),
    [("a1:7", ("a1", 7)), ("default", ("", -1)), ("a:b", ("", -1)), ("a:b:2", ("a:b", 2))],
)
def test_version_is_read_from_its_name(name: str, version: tuple[str, int]) -> None:
    assert read_version(name) == version
