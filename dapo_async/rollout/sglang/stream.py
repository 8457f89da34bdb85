"""One response of an SGLang server as it comes: chunks in, a whole or a partial completion out (L2). Used by `sglang_engine.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dapo_async.rollout.engine import EngineFault, SamplingParams
from dapo_async.rollout.sglang.client import Chunk
from dapo_async.types import Completion, FinishReason


class WrongVersion(EngineFault):
    """The server's weights are not those that it was given: nothing that it told is of any use."""


@dataclass(slots=True)
class Response:
    """What has come of one sibling. `request_id` names it at the server."""

    request_id: str
    prompt_tokens: int
    sent_version: int  # the newest version when it was sent
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(
        default_factory=list
    )  # as far as they are known before the end: none is newer than the true one
    whole: Completion | None = None  # from its end on
    _next_version: int = -1

    def add(self, chunk: Chunk, *, newest_version: int, incarnation: str) -> None:
        """Its tokens may have been under way when `newest_version` was in force: they count as of the one before, those of the next chunk as of it.

        Raises WrongVersion where the server says that it serves weights of another run.
        """
        if read_version(chunk.weight_version)[0] != incarnation:
            raise WrongVersion(
                f"serves {chunk.weight_version} in the midst of a response; this run is {incarnation}"
            )
        self.versions += [
            self.sent_version if self._next_version < 0 else self._next_version
        ] * len(chunk.token_ids)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self._next_version = newest_version

    def partial(self) -> Completion:
        """What there is of it before its end."""
        return self._completion(
            np.asarray(self.versions, dtype=np.int32), self.sent_version, FinishReason.ABORT
        )

    def end(
        self,
        finish: Mapping[str, Any],
        spans: Sequence[Mapping[str, Any]],
        *,
        incarnation: str,
        keeps_kv: bool,
    ) -> None:
        """Makes `whole` of it, with the versions that the server attests. Raises WrongVersion where it attests none or another run's."""
        reason, count = FinishReason(finish["type"]), len(self.token_ids)
        if reason is FinishReason.ABORT:
            raise EngineFault(f"gave up a response: {finish.get('message') or 'no reason given'}")
        versions, covered = np.empty(count, dtype=np.int32), 0
        for span in spans:
            owner, version = read_version(span["version"])
            if owner != incarnation or span["start"] != covered:
                raise WrongVersion(f"attests {spans} for {count} tokens; this run is {incarnation}")
            versions[span["start"] : span["end"]] = version
            covered = span["end"]
        if covered != count:
            raise WrongVersion(f"attests versions for {covered} of {count} tokens")
        first = int(versions[0]) if count else self.sent_version
        self.whole = self._completion(
            versions, min(first, self.sent_version) if keeps_kv else first, reason
        )

    def _completion(
        self, versions: np.ndarray, prefill_version: int, reason: FinishReason
    ) -> Completion:
        logprobs = np.asarray(self.logprobs, dtype=np.float32)
        return Completion(
            np.asarray(self.token_ids, dtype=np.int32), logprobs, versions, prefill_version, reason
        )


def joined(partial: Completion | None, tail: Completion) -> Completion:
    """One response whose end another engine generated, on KV of its own."""
    if partial is None:
        return tail
    return Completion(
        token_ids=np.concatenate([partial.token_ids, tail.token_ids]),
        behaviour_logprobs=np.concatenate([partial.behaviour_logprobs, tail.behaviour_logprobs]),
        weight_versions=np.concatenate([partial.weight_versions, tail.weight_versions]),
        prefill_version=min(partial.prefill_version, tail.prefill_version),
        finish_reason=tail.finish_reason,
    )


def sampling_body(sampling: SamplingParams) -> dict[str, Any]:
    """As SGLang names it. Its own stop tokens, those of the model's config, hold beside these; the seed is the server's."""
    return {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1 if sampling.top_k is None else sampling.top_k,
        "stop_token_ids": list(sampling.stop_token_ids),
        "skip_special_tokens": False,
    }


def read_version(name: str) -> tuple[str, int]:
    """`incarnation:number` as a pair; of the weights that a server was started with, no incarnation and -1."""
    incarnation, colon, number = name.rpartition(":")
    return (incarnation, int(number)) if colon and number.isdecimal() else ("", -1)
