"""The torch engine's core: continuous batching on the learner's own decoder, without threads (L2).

In: group requests, weights. Out: finished groups. `engine_thread.py` drives it; tests step it by hand. One `step`:

    admit what fits ─▶ one pass: running slots decode, new prompts are prefilled ─▶ draw one token per slot ─▶ finished slots free

Siblings share the prefill of their prompt; weights change between two steps only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.model import Decoder, PackedAttention, token_logprobs
from dapo_async.rollout.engine import WEIGHT_UPDATES, GroupRequest, UpdateReport, WeightUpdate
from dapo_async.rollout.native.kv_cache import (
    DecodeAttention,
    KVCache,
    MixedAttention,
    PrefillAttention,
)
from dapo_async.rollout.native.slots import RunningGroup, SlotTable
from dapo_async.types import Completion

PASS_TOKENS = 8192  # prompt tokens read in one pass: bounds its activations


class TorchEngine:
    """Decodes up to `num_slots` sequences of at most `max_len` tokens, prompt and response.

    Completions do not depend on slots, neighbours or the order of refills but for float rounding; the same calls between the same steps give
    them bit for bit (law 7). Not thread-safe.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_slots: int,
        max_len: int,
        weight_update: WeightUpdate = "recompute",
        version: int = 0,
    ) -> None:
        """The decoder becomes the engine's own: swaps write to its parameters. Raises ValueError for sizes that do not fit the model."""
        if num_slots < 1:
            raise ValueError(
                f"num_slots ({num_slots}) must be at least 1; give the engine a slot to decode in"
            )
        if not 2 <= max_len <= decoder.config.max_positions:
            raise ValueError(
                f"max_len ({max_len}) must lie between 2 and the model's {decoder.config.max_positions} positions; change it"
            )
        if weight_update not in WEIGHT_UPDATES:
            raise ValueError(
                f"weight_update {weight_update!r} is unknown; choose one of {', '.join(WEIGHT_UPDATES)}"
            )
        weight = decoder.head_weight
        self.num_slots, self.max_len, self.weight_update, self.version = (
            num_slots,
            max_len,
            weight_update,
            version,
        )
        self.draining = False  # nothing new starts: set by whoever waits for the running sequences before a swap
        self.prefilled_tokens = 0  # prompt tokens read so far
        self.num_drawn = 0  # tokens of the last step: the slots that it occupied
        self._decoder, self._device = decoder.eval().requires_grad_(False), weight.device
        decoder.fuse()
        self._cache = KVCache(
            decoder.config,
            num_slots=num_slots,
            max_len=max_len,
            dtype=weight.dtype,
            device=weight.device,
        )
        self._table = SlotTable(num_slots=num_slots, max_len=max_len, device=weight.device)
        self._groups: dict[int, RunningGroup] = {}
        self._waiting: deque[RunningGroup] = (
            deque()
        )  # in order of submission; a group leaves when its last sibling starts

    @property
    def num_running(self) -> int:
        """Occupied slots."""
        return len(self._table)

    @property
    def has_work(self) -> bool:
        """Whether a step would draw a token."""
        return len(self._table) > 0 or (len(self._waiting) > 0 and not self.draining)

    def submit(self, request: GroupRequest) -> None:
        """Queues a group. Raises ValueError, changing nothing, for one that can never be served."""
        assert not request.heads, (
            "heads come from lost engines, and this one is lost with its actor"
        )
        length, vocab_size = len(request.prompt_ids), self._decoder.config.vocab_size
        if length < 1 or request.num_siblings < 1:
            raise ValueError(
                f"group {request.key} has {length} prompt tokens and {request.num_siblings} siblings; it needs at least one of each"
            )
        if length + request.sampling.max_tokens > self.max_len:
            raise ValueError(
                f"group {request.key}: prompt ({length}) + max_tokens ({request.sampling.max_tokens}) must not exceed the engine's max_len "
                f"({self.max_len}); drop the prompt, lower max_tokens or raise max_len"
            )
        if not 0 <= int(request.prompt_ids.min()) <= int(request.prompt_ids.max()) < vocab_size:
            raise ValueError(
                f"group {request.key} has token ids outside the model's vocabulary of {vocab_size}; use the model's own tokenizer"
            )
        if request.key in self._groups:
            raise ValueError(
                f"group {request.key} is already on the engine; give each group its own key"
            )
        prompt_ids = torch.from_numpy(request.prompt_ids.astype(np.int64)).to(self._device)
        self._groups[request.key] = group = RunningGroup(request, prompt_ids)
        self._waiting.append(group)

    @torch.inference_mode()
    def abort(self, keys: Iterable[int]) -> list[int]:
        """Takes groups off, freeing their slots; returns the keys that were there."""
        aborted = [key for key in dict.fromkeys(keys) if key in self._groups]
        for key in aborted:
            group = self._groups.pop(key)
            if group.num_waiting:
                self._waiting.remove(group)
        self._vacate(
            [
                row
                for row, (group, _) in enumerate(self._table.owners)
                if group.request.key in aborted
            ]
        )
        return aborted

    @torch.inference_mode()
    def step(self) -> list[tuple[int, tuple[Completion, ...]]]:
        """Starts what fits, draws one token in every running slot, and returns the groups whose last sibling ended: `(key, completions)`."""
        num_decoding = len(self._table)
        started = self._admit()
        if not len(self._table):
            return []
        hidden = self._forward(num_decoding, started)
        self.num_drawn = len(self._table)
        ended = self._table.sample(self._decoder.logits(hidden), version=self.version)
        if not ended:
            return []
        finished = []
        for group in self._table.finish(ended):
            if len(group.completions) == group.request.num_siblings:
                del self._groups[group.request.key]
                finished.append(
                    (
                        group.request.key,
                        tuple(
                            group.completions[sibling]
                            for sibling in range(group.request.num_siblings)
                        ),
                    )
                )
        self._vacate(ended)
        return finished

    def weights(self) -> Mapping[str, Tensor]:
        """The live parameters by Hugging Face name."""
        return {name: parameter.detach() for name, parameter in self._decoder.named_parameters()}

    @torch.inference_mode()
    def update_weights(
        self, weights: Mapping[str, Tensor], *, version: int, probe_ids: NDArray[np.int32]
    ) -> UpdateReport:
        """Copies `weights` (any dtype, any device) into the live parameters and treats running sequences as `weight_update` says.

        Raises ValueError, changing nothing, when names or shapes do not fit. With `drain` the caller has let the running sequences end.
        """
        assert self.weight_update != "drain" or not len(self._table), (
            "drain: sequences are still running"
        )
        start_s, live = time.monotonic(), self.weights()
        given = {
            name: tensor
            for name, tensor in weights.items()
            if name != "lm_head.weight" or name in live
        }  # a tied head may be spelt out
        wrong = sorted(
            name
            for name in live.keys() | given.keys()
            if name not in live or name not in given or live[name].shape != given[name].shape
        )
        if wrong:
            raise ValueError(
                f"weights of version {version} do not fit the engine's model in {wrong[:3]}; publish all tensors of the same model"
            )
        before = self.score(probe_ids)
        for name, parameter in live.items():
            parameter.copy_(given[name])
        self.version, self.draining = version, False
        for group in self._waiting:
            group.prefix = group.hidden = (
                None  # prompt keys and values are never shared across a version
            )
        recomputed = self._recompute() if self.weight_update == "recompute" else 0
        after = self.score(probe_ids)
        return UpdateReport(version, before, after, time.monotonic() - start_s, recomputed)

    @torch.inference_mode()
    def score(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logprobs of `token_ids[1:]`, each given the tokens before it, at temperature 1 under the live weights; `[len(token_ids) - 1]`."""
        ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64)).to(self._device)
        if len(ids) < 2:
            return np.zeros(0, np.float32)
        attention = PackedAttention([len(ids)], device=self._device)
        hidden = self._decoder(ids, attention.positions, attention)[:-1]
        logprobs, _ = token_logprobs(
            hidden,
            self._decoder.head_weight,
            ids[1:],
            torch.ones(len(ids) - 1, device=self._device),
        )
        return logprobs.cpu().numpy()

    def _admit(self) -> list[tuple[RunningGroup, slice]]:
        """Starts waiting siblings in free slots, in order, as long as their prompts fit into one pass."""
        started: list[tuple[RunningGroup, slice]] = []
        num_tokens = 0
        while self._waiting and not self.draining and len(self._table) < self.num_slots:
            group = self._waiting[0]
            num_tokens += len(group.prompt_ids) if group.prefix is None else 0
            if started and num_tokens > PASS_TOKENS:
                break
            started.append(
                (
                    group,
                    self._table.start(
                        group, min(self.num_slots - len(self._table), group.num_waiting)
                    ),
                )
            )
            if not group.num_waiting:
                self._waiting.popleft()
        return started

    def _forward(self, num_decoding: int, started: Sequence[tuple[RunningGroup, slice]]) -> Tensor:
        """Last hidden state of every running row, `[n, D]`: the first `num_decoding` decode, the others are what has just started."""
        fresh = sorted(
            (group for group, _ in started if group.prefix is None),
            key=lambda group: len(group.prompt_ids),
        )
        parts: list[DecodeAttention | PrefillAttention] = []
        if num_decoding:
            reached = self._table.lengths[:num_decoding]
            parts.append(
                DecodeAttention(self._cache, positions=reached - 1, longest=int(reached.max()))
            )
        if fresh:
            prefill = PrefillAttention(
                self._cache, lengths=[len(group.prompt_ids) for group in fresh]
            )
            parts.append(prefill)
        outputs = []
        if parts:  # else all that starts shares a prompt that was read before
            attention = parts[0] if len(parts) == 1 else MixedAttention(parts)
            ids = torch.cat(
                [self._table.last_ids[:num_decoding], *(group.prompt_ids for group in fresh)]
            )
            hidden = self._decoder(ids, attention.positions, attention)
            outputs.append(hidden[:num_decoding])
        if fresh:
            ends = np.cumsum([num_decoding, *(len(group.prompt_ids) for group in fresh)])[1:]
            for group, prefix, end in zip(fresh, prefill.prefixes(), ends, strict=True):
                group.prefix, group.hidden = prefix, hidden[end - 1]
            self.prefilled_tokens += int(ends[-1]) - num_decoding
        for group, rows in started:
            assert group.prefix is not None
            assert group.hidden is not None
            self._cache.fill(rows, group.prefix)
            outputs.append(group.hidden.expand(rows.stop - rows.start, -1))
            # Clones, so that siblings who wait don't keep the whole pass in memory.
            group.prefix, group.hidden = (
                (group.prefix.clone(), group.hidden.clone()) if group.num_waiting else (None, None)
            )
        return torch.cat(outputs)

    def _vacate(self, rows: list[int]) -> None:
        moved = self._table.remove(rows)
        if moved:
            source, target, longest = moved
            self._cache.move(source, target, length=longest)

    def _recompute(self) -> int:
        """Reads every running sequence again, all but its last token, which the next step reads; returns how many tokens that were."""
        lengths = (self._table.lengths[: len(self._table)] - 1).tolist()
        for rows in _passes(lengths):
            attention = PrefillAttention(self._cache, lengths=[lengths[row] for row in rows])
            ids = torch.cat([self._table.token_ids[row, : lengths[row]] for row in rows])
            self._decoder(ids, attention.positions, attention)
            for row, prefix in zip(rows, attention.prefixes(), strict=True):
                self._cache.fill(slice(row, row + 1), prefix)
        return sum(lengths)


def _passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Splits the rows into passes of about `PASS_TOKENS` tokens; by length, so that equally long ones share a kernel call."""
    rows: list[int] = []
    num_tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and num_tokens + lengths[row] > PASS_TOKENS:
            yield rows
            rows, num_tokens = [], 0
        rows.append(row)
        num_tokens += lengths[row]
    if rows:
        yield rows
