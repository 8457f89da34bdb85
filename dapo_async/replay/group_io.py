"""Groups in one safetensors file, or one group as an array of bytes, read back bit for bit.

Files hold the buffered groups of a checkpoint and the recorded batches of a run. A packed group
goes from the rollout worker through the replay actor to the learner. Each field of the tokens is
one array, rollout after rollout; everything else is JSON. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
FIELDS = {
    "token_ids": np.int32,
    "behaviour_logprobs": np.float32,
    "weight_versions": np.int32,
}
ALIGNMENT = 4  # bytes, of every other array
PACKED = {**FIELDS, "prompt_ids": np.int32, JSON: np.uint8}  # the arrays of a packed group


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
    The JSON comes last, filled up with spaces, so that all arrays stay aligned, also in a row of
    packed groups.
    """
    arrays = _to_arrays([group])
    padding = np.full(-len(arrays[JSON]) % ALIGNMENT, ord(" "), np.uint8)
    arrays[JSON] = np.concatenate([arrays[JSON], padding])
    sizes = np.array([arrays[name].nbytes for name in PACKED], np.int64)
    return np.concatenate([sizes.view(np.uint8), *(arrays[name].view(np.uint8) for name in PACKED)])


def unpack_group(data: NDArray[np.uint8]) -> Group:
    """What `pack_group` packed; the token arrays are views of `data`."""
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
    arrays["prompt_ids"] = np.concatenate(
        [np.zeros(0, np.int32), *(group.prompt.token_ids for group in groups)]
    ).astype(np.int32, copy=False)
    text = json.dumps([_to_json(group) for group in groups]).encode()
    return {**arrays, JSON: np.frombuffer(text, np.uint8)}


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[Group]:
    prompt_start = start = 0
    groups = []
    for entry in json.loads(arrays[JSON].tobytes()):
        prompt_end = prompt_start + entry["prompt"].pop("num_tokens")
        prompt = Prompt(token_ids=arrays["prompt_ids"][prompt_start:prompt_end], **entry["prompt"])
        prompt_start = prompt_end
        rollouts = []
        for values in entry["rollouts"]:
            end = start + values.pop("num_tokens")
            completion = Completion(
                **{name: arrays[name][start:end] for name in FIELDS},
                prefill_version=values.pop("prefill_version"),
                finish_reason=FinishReason(values.pop("finish_reason")),
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
            }
            for rollout in group.rollouts
        ],
    }
