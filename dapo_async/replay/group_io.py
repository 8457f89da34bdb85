"""Groups in one safetensors file, or one group as an array of bytes, read back bit for bit.

Files hold the buffered groups of a checkpoint and the recorded batches of a run. A packed group
goes from the rollout worker through the replay actor to the learner. Each field of the tokens is
one array, rollout after rollout; everything else is JSON. Nothing is pickled. Most tokens have the
weight version of the token before, so versions are kept as runs: one version and a number of tokens
each. Experts of tokens (routing replay) are bytes; of a group's prompt only those of its first
rollout are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout
from dapo_async.utils.files import atomic_file

JSON = "json"  # the tensor that holds the rest as UTF-8
# Arrays with one entry per response token.
FIELDS = {"token_ids": np.int32, "behaviour_logprobs": np.float32}
VERSIONS = "weight_versions"  # one entry per run
RUN_TOKENS = "version_tokens"  # tokens of each run
ALIGNMENT = 4  # bytes, of every other array
EXPERTS = "experts"  # bytes: per group those of its prompt, then those of each rollout
# The arrays of a packed group.
PACKED = {
    **FIELDS,
    VERSIONS: np.int32,
    RUN_TOKENS: np.int32,
    "prompt_ids": np.int32,
    EXPERTS: np.uint8,
    JSON: np.uint8,
}


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """Writes `groups` in order and flushes the file to disk."""
    with atomic_file(path) as partial:
        save_file(_to_arrays(groups), partial)


def read_groups(path: Path) -> list[Group]:
    """What `write_groups` wrote."""
    return _from_arrays(load_file(path))


def pack_group(group: Group) -> NDArray[np.uint8]:
    """The whole group as one array of bytes [B], for transport between processes.

    Layout: the number of bytes of each array in `PACKED` as int64, then the arrays in that order.
    Bytes are filled up, the JSON at the end with spaces, so that all arrays stay aligned, also in a
    row of packed groups.
    """
    arrays = _to_arrays([group])
    for name, filler in ((EXPERTS, 0), (JSON, ord(" "))):
        padding = np.full(-len(arrays[name]) % ALIGNMENT, filler, np.uint8)
        arrays[name] = np.concatenate([arrays[name], padding])
    sizes = np.array([arrays[name].nbytes for name in PACKED], np.int64)
    return np.concatenate([sizes.view(np.uint8), *(arrays[name].view(np.uint8) for name in PACKED)])


def unpack_group(data: NDArray[np.uint8]) -> Group:
    """What `pack_group` packed; token ids and log-probabilities are views of `data`."""
    start = len(PACKED) * np.dtype(np.int64).itemsize
    sizes = np.frombuffer(data[:start].tobytes(), np.int64)
    arrays: dict[str, NDArray[Any]] = {}
    for (name, dtype), size in zip(PACKED.items(), sizes.tolist(), strict=True):
        arrays[name] = data[start : start + size].view(dtype)
        start += size
    (group,) = _from_arrays(arrays)
    return group


def take_rollouts(data: NDArray[np.uint8], siblings: Sequence[int]) -> NDArray[np.uint8]:
    """A packed group with these of its rollouts only, in their order."""
    group = unpack_group(data)
    if len(siblings) == len(group.rollouts):
        return data
    rollouts = tuple(group.rollouts[sibling] for sibling in siblings)
    return pack_group(replace(group, rollouts=rollouts))


def _to_arrays(groups: Sequence[Group]) -> dict[str, NDArray[Any]]:
    completions = [rollout.completion for group in groups for rollout in group.rollouts]
    arrays: dict[str, NDArray[Any]] = {
        name: np.concatenate(
            [np.zeros(0, dtype), *(getattr(completion, name) for completion in completions)]
        ).astype(dtype, copy=False)
        for name, dtype in FIELDS.items()
    }
    versions = [np.zeros(0, np.int32), *(each.weight_versions for each in completions)]
    arrays[VERSIONS], arrays[RUN_TOKENS] = _runs_of(np.concatenate(versions))
    arrays["prompt_ids"] = np.concatenate(
        [np.zeros(0, np.int32), *(group.prompt.token_ids for group in groups)]
    ).astype(np.int32, copy=False)
    experts = [each.view(np.uint8).reshape(-1) for group in groups for each in _experts_of(group)]
    arrays[EXPERTS] = np.concatenate([np.zeros(0, np.uint8), *experts])
    text = json.dumps([_to_json(group) for group in groups]).encode()
    return {**arrays, JSON: np.frombuffer(text, np.uint8)}


def _runs_of(values: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The value of each run of equal values, and its length."""
    begins = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=len(values))
    return values[starts].astype(np.int32, copy=False), lengths.astype(np.int32)


def _experts_of(group: Group) -> Iterator[NDArray[Any]]:
    for number, rollout in enumerate(group.rollouts):
        completion = rollout.completion
        if number == 0 and completion.prompt_experts is not None:
            yield np.ascontiguousarray(completion.prompt_experts)
        if completion.experts is not None:
            yield np.ascontiguousarray(completion.experts)


class _Experts:
    """Reads the experts of one group after the other."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data, self._start = data, 0

    def next(self, form: Mapping[str, Any] | None) -> NDArray[Any] | None:
        if form is None:
            return None
        dtype, shape = np.dtype(form["dtype"]), tuple(form["shape"])
        stop = self._start + math.prod(shape) * dtype.itemsize
        array: NDArray[Any] = self._data[self._start : stop].view(dtype).reshape(shape)
        self._start = stop
        return array


def _form(experts: NDArray[Any] | None) -> dict[str, Any] | None:
    if experts is None:
        return None
    return {"dtype": experts.dtype.name, "shape": experts.shape}


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[Group]:
    prompt_start = start = 0
    experts = _Experts(arrays[EXPERTS])
    of_tokens = {name: arrays[name] for name in FIELDS}
    of_tokens[VERSIONS] = np.repeat(arrays[VERSIONS], arrays[RUN_TOKENS])
    groups = []
    for entry in json.loads(arrays[JSON].tobytes()):
        prompt_end = prompt_start + entry["prompt"].pop("num_tokens")
        prompt = Prompt(token_ids=arrays["prompt_ids"][prompt_start:prompt_end], **entry["prompt"])
        prompt_start = prompt_end
        rollouts = []
        prompt_experts = experts.next(entry.get("prompt_experts"))
        for values in entry["rollouts"]:
            end = start + values.pop("num_tokens")
            completion = Completion(
                **{name: values[start:end] for name, values in of_tokens.items()},
                prefill_version=values.pop("prefill_version"),
                finish_reason=FinishReason(values.pop("finish_reason")),
                experts=experts.next(values.pop("experts", None)),
                prompt_experts=prompt_experts,
            )
            start = end
            rollouts.append(Rollout(completion=completion, **values))
        groups.append(
            Group(
                entry["group_id"],
                prompt,
                tuple(rollouts),
                entry["incarnation"],
                entry["temperature"],
            )
        )
    return groups


def _to_json(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "group_id": group.group_id,
        "incarnation": group.incarnation,
        "temperature": group.temperature,
        "prompt_experts": _form(group.rollouts[0].completion.prompt_experts)
        if group.rollouts
        else None,
        "prompt": {
            "row": prompt.row,
            "text": prompt.text,
            "answer": prompt.answer,
            "source": prompt.source,
            "num_tokens": len(prompt.token_ids),
        },
        "rollouts": [
            {
                "text": rollout.text,
                "accuracy": rollout.accuracy,
                "reward": rollout.reward,
                "extracted": rollout.extracted,
                "reason": rollout.reason,
                "num_tokens": rollout.num_tokens,
                "prefill_version": rollout.completion.prefill_version,
                "finish_reason": rollout.completion.finish_reason.value,
                "experts": _form(rollout.completion.experts),
            }
            for rollout in group.rollouts
        ],
    }
