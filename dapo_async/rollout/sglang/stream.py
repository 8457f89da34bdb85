"""One response of an SGLang server while it is streamed.

In: the chunks of one sibling. Out: its completion, or its partial completion when the server is
lost. Used by `engine.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_async.model.config import ModelConfig
from dapo_async.rollout.engine import EngineFault, SamplingParams
from dapo_async.rollout.sglang.client import Chunk
from dapo_async.types import Completion, FinishReason, expert_dtype


class WrongVersion(EngineFault):
    """The server serves other weights than it was given; nothing that it returned may be used."""


@dataclass(slots=True)
class ResponseStream:
    """The tokens of one sibling so far."""

    request_id: str  # its name at the server
    prompt_tokens: int  # with the tokens of a partial completion that it continues
    sent_version: int  # the newest version when the request was sent
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # a lower bound per token, until the end
    completion: Completion | None = None  # after the end
    retractions: int = 0  # that were returned by `retracted`
    pauses: int = 0  # of the server, those that drop the memory of running requests
    experts: NDArray[Any] | None = None  # of all tokens but the last, [.., M, k], at the end
    first_token_s: float | None = None  # when it arrived, of time.monotonic
    _next_version: int = -1

    def add(self, chunk: Chunk, *, newest_version: int, incarnation: str) -> None:
        """Appends the tokens of a chunk.

        Tokens may have been on their way when `newest_version` came into force. So these tokens
        count as the version before, and those of the next chunk as `newest_version`. Raises
        WrongVersion where the server says that it serves weights of another run.
        """
        if read_version(chunk.weight_version)[0] != incarnation:
            raise WrongVersion(
                f"serves {chunk.weight_version} during a response; this run is {incarnation}"
            )
        version = self.sent_version if self._next_version < 0 else self._next_version
        self.versions += [version] * len(chunk.token_ids)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self._next_version = newest_version

    def retracted(self, total: int) -> int:
        """How often the request lost its memory to others since the last call.

        `total`: as the server counts, with the pauses. A chunk that was on its way during a pause
        does not have it in its count yet. A pause drops the memory of a running request only, so
        after a pause in the server's queue one retraction is left out.
        """
        new = max(0, total - self.pauses - self.retractions)
        self.retractions += new
        return new

    def partial(self) -> Completion:
        """The tokens so far, with finish reason ABORT."""
        versions = np.asarray(self.versions, dtype=np.int32)
        return self._completion(versions, self.sent_version, FinishReason.ABORT)

    def end(
        self,
        finish: Mapping[str, Any],
        spans: Sequence[Mapping[str, Any]],
        *,
        incarnation: str,
        keeps_kv: bool,
    ) -> None:
        """Sets `completion`, with the versions that the server attests in `spans`.

        Raises WrongVersion where a token has no version or one of another run, EngineFault where
        the server aborted the response.
        """
        reason, count = FinishReason(finish["type"]), len(self.token_ids)
        if reason is FinishReason.ABORT:
            why = finish.get("message") or "no reason given"
            raise EngineFault(f"gave up a response: {why}")
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
        # With `keep_kv` the prompt may have been read before an update and sampled from after it.
        prefill_version = min(first, self.sent_version) if keeps_kv else first
        self.completion = self._completion(versions, prefill_version, reason)

    def _completion(
        self, versions: NDArray[np.int32], prefill_version: int, reason: FinishReason
    ) -> Completion:
        token_ids = np.asarray(self.token_ids, dtype=np.int32)
        logprobs = np.asarray(self.logprobs, dtype=np.float32)
        of_prompt = of_response = None
        if self.experts is not None:
            of_prompt, of_response = np.split(self.experts, [self.prompt_tokens - 1])
        return Completion(
            token_ids, logprobs, versions, prefill_version, reason, of_response, of_prompt
        )

    def take_experts(self, data: bytes | None, model: ModelConfig) -> None:
        """Reads the experts of the last chunk, and keeps those of the layers that have some.

        Raises EngineFault if they are missing, or if there are too many or too few.
        """
        if data is None:
            raise EngineFault(
                "returned no experts for learner.routing_replay; start it with "
                "--enable-return-routed-experts"
            )
        shape = (
            self.prompt_tokens + len(self.token_ids) - 1,
            model.num_layers,
            model.experts_per_token,
        )
        every = np.frombuffer(data, np.int32)
        if every.size != math.prod(shape):
            raise EngineFault(f"returned {every.size} experts instead of {shape}")
        own = every.reshape(shape)[:, list(model.mixture_layers)]
        if own.size and not 0 <= int(own.min()) <= int(own.max()) < model.num_experts:
            raise EngineFault(f"returned experts beyond the model's {model.num_experts}")
        self.experts = own.astype(expert_dtype(model.num_experts))


def joined(partial: Completion | None, rest: Completion) -> Completion:
    """A partial completion and its rest, which another engine generated, as one completion.

    That engine read the tokens of the partial completion again, so all experts are its own.
    """
    if partial is None:
        return rest
    experts = prompt_experts = None
    if rest.experts is not None and rest.prompt_experts is not None:
        every = np.concatenate([rest.prompt_experts, rest.experts])
        start = len(rest.prompt_experts) - len(partial.token_ids)
        prompt_experts, experts = np.split(every, [start])
    return Completion(
        token_ids=np.concatenate([partial.token_ids, rest.token_ids]),
        behaviour_logprobs=np.concatenate([partial.behaviour_logprobs, rest.behaviour_logprobs]),
        weight_versions=np.concatenate([partial.weight_versions, rest.weight_versions]),
        prefill_version=min(partial.prefill_version, rest.prefill_version),
        finish_reason=rest.finish_reason,
        experts=experts,
        prompt_experts=prompt_experts,
    )


def sampling_body(sampling: SamplingParams) -> dict[str, Any]:
    """The parameters by SGLang's names.

    SGLang also stops at the stop tokens of config.json and generation_config.json, which
    `ModelConfig.eos_token_ids` includes. The seed is the server's own.
    """
    return {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1 if sampling.top_k is None else sampling.top_k,
        "stop_token_ids": list(sampling.stop_token_ids),
        "skip_special_tokens": False,
    }


def read_version(name: str) -> tuple[str, int]:
    """`incarnation:number` as a pair; ("", -1) for the weights that a server was started with."""
    incarnation, colon, number = name.rpartition(":")
    return (incarnation, int(number)) if colon and number.isdecimal() else ("", -1)
