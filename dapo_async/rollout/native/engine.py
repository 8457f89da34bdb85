"""The core of the native engine: continuous batching on the learner's own decoder, without threads.

In: group requests and weights. Out: finished groups. `thread.py` drives it in a run; tests call
`step` themselves. One `step`:

    admit what fits ─▶ one pass: running slots decode, new prompts are prefilled
                    ─▶ draw one token per slot ─▶ free the slots that finished

Siblings share the prefill of their prompt. Weights change only between two steps. Between two steps
the engine may also `sleep`: it frees keys, values and weights on its device until `wake`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.model import Decoder, HostCopy, PackedAttention, token_logprobs
from dapo_async.model.cost import causal_pairs
from dapo_async.model.expert_names import one_by_one
from dapo_async.model.mixture import Routing
from dapo_async.rollout.engine import WEIGHT_UPDATES, GroupRequest, UpdateReport, WeightUpdate
from dapo_async.rollout.native.kv_cache import (
    DecodeAttention,
    KVCache,
    MixedAttention,
    PrefillAttention,
)
from dapo_async.rollout.native.slots import RunningGroup, SlotTable
from dapo_async.types import Completion

PASS_TOKENS = 8192  # most prompt tokens of one pass: bounds the memory of its activations


class TorchEngine:
    """Decodes up to `num_slots` sequences of at most `max_len` tokens, prompt and response.

    This is the engine of `rollout.engine=torch`; a run uses it through `ThreadedEngine`.
    A completion does not depend on slots, neighbours or the order of refills, except for float
    rounding. The same calls between the same steps give it bit for bit (resume). Not thread-safe.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_slots: int,
        max_len: int,
        weight_update: WeightUpdate = "recompute",
        version: int = 0,
        returns_experts: bool = False,
    ) -> None:
        """Takes over the decoder: weight updates write to its parameters.

        `returns_experts`: completions have the experts of their tokens, for routing replay.
        Raises ValueError for sizes that do not fit the model.
        """
        max_positions = decoder.config.max_positions
        if num_slots < 1:
            raise ValueError(f"num_slots ({num_slots}) must be at least 1; give the engine a slot")
        if not 2 <= max_len <= max_positions:
            raise ValueError(
                f"max_len ({max_len}) must lie between 2 and the model's {max_positions} "
                "positions; change it"
            )
        if weight_update not in WEIGHT_UPDATES:
            raise ValueError(
                f"weight_update {weight_update!r} is unknown; "
                f"choose one of {', '.join(WEIGHT_UPDATES)}"
            )
        dtype, device = decoder.head_weight.dtype, decoder.head_weight.device
        self.num_slots = num_slots
        self.max_len = max_len
        self.weight_update = weight_update
        self.version = version
        self.draining = False  # True: nothing new starts; set by the thread before a `drain` update
        self.prefilled_tokens = 0  # prompt tokens read so far
        self.reread_tokens = 0  # of them, read again under new weights
        self.started_tokens = 0  # prompt tokens of all siblings that started
        self.continued_tokens = 0  # of other engines' siblings that go on here, prompts included
        self.num_drawn = 0  # tokens drawn in the last step = slots that it occupied
        self.num_heldout = 0  # of these slots, those of held-out prompts
        # Of decode steps: their number, their tokens, and the tokens that these attended to.
        self.num_decodes = self.decoded_tokens = self.decode_pairs = 0
        self.prefill_pairs = 0  # the same for prompts that were read for the first time
        self.num_ended: Counter[int] = Counter()  # siblings of the last step, by group id
        self._decoder = decoder.eval().requires_grad_(False)
        self._device = device
        decoder.fuse()
        self._new_cache = partial(
            KVCache,
            decoder.config,
            num_slots=num_slots,
            max_len=max_len,
            dtype=dtype,
            device=device,
        )
        self._awake_cache: KVCache | None = self._new_cache()
        self._weights_on_host = HostCopy()
        config, experts = decoder.config, None
        if returns_experts and config.mixture_layers:
            experts = (len(config.mixture_layers), config.experts_per_token, config.num_experts)
        self._table = SlotTable(
            num_slots=num_slots, max_len=max_len, device=device, experts=experts
        )
        self._groups: dict[int, RunningGroup] = {}
        # In order of submission; a group leaves when its last sibling starts.
        self._waiting: deque[RunningGroup] = deque()

    @property
    def num_running(self) -> int:
        """Occupied slots."""
        return len(self._table)

    @property
    def kv_tokens(self) -> int:
        """Tokens of the running sequences."""
        return self._table.total_length

    @property
    def kv_capacity(self) -> int:
        """Tokens that all slots have room for."""
        return self.num_slots * self.max_len

    @property
    def has_work(self) -> bool:
        """Whether a step would draw a token."""
        if self.asleep:
            return False
        return len(self._table) > 0 or (len(self._waiting) > 0 and not self.draining)

    @property
    def asleep(self) -> bool:
        """Whether its device memory is free for others."""
        return self._awake_cache is None

    @property
    def _cache(self) -> KVCache:
        assert self._awake_cache is not None, "the engine sleeps: `wake` comes first"
        return self._awake_cache

    @torch.inference_mode()
    def sleep(self) -> None:
        """Frees keys and values, and moves the weights to the host. Groups stay on the engine;
        sequences that run continue after `wake`."""
        assert not self.asleep, "the engine sleeps already"
        self._awake_cache = None
        self._forget_prefixes()
        parameters, buffers = self._decoder.parameters(), self._decoder.buffers()
        self._weights_on_host.release((*parameters, *buffers))

    @torch.inference_mode()
    def wake(self) -> int:
        """Takes its device memory again. Returns how many tokens of running sequences it has read
        again for that."""
        assert self.asleep, "the engine is awake"
        self._weights_on_host.restore()
        self._awake_cache = self._new_cache()
        return self._read_again(range(len(self._table)))

    def _forget_prefixes(self) -> None:
        """Prompts of waiting groups are read again: their keys and values can't be used."""
        for group in self._waiting:
            group.prefix = group.hidden = None

    def submit(self, request: GroupRequest) -> None:
        """Queues a group. Raises ValueError, changing nothing, for one that can never be served."""
        self._check(request)
        prompt_ids = torch.from_numpy(request.prompt_ids.astype(np.int64)).to(self._device)
        self._groups[request.group_id] = group = RunningGroup.of(request, prompt_ids)
        assert group.num_waiting, f"group {request.group_id} is complete"
        self._waiting.append(group)

    def _check(self, request: GroupRequest) -> None:
        name, length = f"group {request.group_id}", len(request.prompt_ids)
        max_tokens, vocab_size = request.sampling.max_tokens, self._decoder.config.vocab_size
        if length < 1 or request.num_siblings < 1:
            raise ValueError(
                f"{name} has {length} prompt tokens and {request.num_siblings} siblings; "
                "it needs at least one of each"
            )
        if length + max_tokens > self.max_len:
            raise ValueError(
                f"{name}: prompt ({length}) + max_tokens ({max_tokens}) must not exceed the "
                f"engine's max_len ({self.max_len}); "
                "drop the prompt, lower max_tokens or raise max_len"
            )
        if not 0 <= int(request.prompt_ids.min()) <= int(request.prompt_ids.max()) < vocab_size:
            raise ValueError(
                f"{name} has token ids outside the model's vocabulary of {vocab_size}; "
                "use the model's own tokenizer"
            )
        if request.group_id in self._groups:
            raise ValueError(f"{name} is already on the engine; give each group its own id")

    @torch.inference_mode()
    def abort(self, group_ids: Iterable[int]) -> list[int]:
        """Removes groups and frees their slots; returns those ids that were on the engine."""
        aborted = [each for each in dict.fromkeys(group_ids) if each in self._groups]
        for group_id in aborted:
            group = self._groups.pop(group_id)
            if group.num_waiting:
                self._waiting.remove(group)
        owners = enumerate(self._table.owners)
        rows = [row for row, (group, _) in owners if group.request.group_id in aborted]
        self._table.total_length -= int(self._table.lengths[rows].sum())
        self._vacate(rows)
        return aborted

    def received(self, group_ids: Iterable[int]) -> dict[int, tuple[Completion | None, ...]]:
        """Per sibling the tokens so far of each of the groups that are on the engine.

        Those of other engines are among them. None: no token.
        """
        return {
            each: self._table.received(self._groups[each])
            for each in group_ids
            if each in self._groups
        }

    @torch.inference_mode()
    def step(self) -> list[tuple[int, tuple[Completion, ...]]]:
        """Starts what fits and draws one token in every running slot.

        Returns `(group_id, completions)` of the groups whose last sibling ended.
        """
        self.num_ended.clear()
        began_s = time.monotonic()
        self._go_on(began_s)
        num_decoding, attended = len(self._table), self._table.total_length
        started = self._admit()
        if not len(self._table):
            return []
        hidden = self._forward(num_decoding, started)
        self.num_drawn = len(self._table)
        self.num_decodes += num_decoding > 0
        self.decoded_tokens += num_decoding
        self.decode_pairs += attended
        self.num_heldout = self._count_heldout()
        ended = self._table.sample(self._decoder.logits(hidden), version=self.version)
        self._note_times(began_s, started, ended)
        if not ended:
            return []
        self.num_ended.update(self._table.owners[row][0].request.group_id for row in ended)
        finished = []
        for group in self._table.finish(ended):
            group_id, num_siblings = group.request.group_id, group.request.num_siblings
            if len(group.completions) == num_siblings:
                del self._groups[group_id]
                completions = tuple(group.completions[sibling] for sibling in range(num_siblings))
                finished.append((group_id, completions))
        self._vacate(ended)
        return finished

    def _note_times(
        self, began_s: float, started: Sequence[tuple[RunningGroup, slice]], ended: Sequence[int]
    ) -> None:
        """Tells the groups that want to know it when their siblings started and ended."""
        now_s = time.monotonic()
        fresh = [row for _, rows in started for row in range(rows.start, rows.stop)]
        for row in fresh:
            group, sibling = self._table.owners[row]
            if (times := group.request.times) is not None:
                times.started[sibling], times.first_token[sibling] = began_s, now_s
        for row in ended:
            group, sibling = self._table.owners[row]
            if (times := group.request.times) is not None:
                times.ended[sibling] = now_s

    def _count_heldout(self) -> int:
        """Occupied slots whose group id is negative; mostly there is no such group."""
        if all(group_id >= 0 for group_id in self._groups):
            return 0
        return sum(group.request.group_id < 0 for group, _ in self._table.owners)

    def weights(self) -> Mapping[str, Tensor]:
        """The live parameters by Hugging Face name, experts one by one."""
        live = {name: parameter.detach() for name, parameter in self._decoder.named_parameters()}
        return one_by_one(live, self._decoder.config)

    @torch.inference_mode()
    def update_weights(
        self, weights: Mapping[str, Tensor], *, version: int, probe_ids: NDArray[np.int32]
    ) -> UpdateReport:
        """Copies `weights` (any dtype, any device) into the live parameters.

        Running sequences are treated as `weight_update` says. With `drain` the caller has let them
        end before. Raises ValueError, changing nothing, when names or shapes do not fit.
        """
        assert not self.asleep, "the engine sleeps: an update waits for `wake`"
        drained = self.weight_update != "drain" or not len(self._table)
        assert drained, "drain: sequences are still running"
        start_s = time.monotonic()
        live = self.weights()
        given = self._check_weights(weights, live, version)
        before = self.score(probe_ids)
        for name, parameter in live.items():
            parameter.copy_(given[name])
        self.version, self.draining = version, False
        self._forget_prefixes()  # a prompt's keys and values serve one version only
        again = range(len(self._table)) if self.weight_update == "recompute" else ()
        recomputed = self._read_again(again)
        after = self.score(probe_ids)
        return UpdateReport(version, before, after, time.monotonic() - start_s, recomputed)

    @staticmethod
    def _check_weights(
        weights: Mapping[str, Tensor], live: Mapping[str, Tensor], version: int
    ) -> dict[str, Tensor]:
        """`weights` without the copy of a tied head, which a publisher may send as a tensor."""
        given = dict(weights)
        if "lm_head.weight" not in live:
            given.pop("lm_head.weight", None)
        wrong = sorted(
            name
            for name in live.keys() | given.keys()
            if name not in live or name not in given or live[name].shape != given[name].shape
        )
        if wrong:
            raise ValueError(
                f"weights of version {version} do not fit the engine's model in {wrong[:3]}; "
                "publish all tensors of the same model"
            )
        return given

    @torch.inference_mode()
    def score(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logprobs of `token_ids[1:]`, each given the tokens before it: `[n] → [n - 1]`.

        At temperature 1, under the live weights.
        """
        ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64)).to(self._device)
        if len(ids) < 2:
            return np.zeros(0, np.float32)
        attention = PackedAttention([len(ids)], device=self._device)
        hidden = self._decoder(ids, attention.positions, attention)[:-1]
        temperatures = torch.ones(len(ids) - 1, device=self._device)
        logprobs, _ = token_logprobs(hidden, self._decoder.head_weight, ids[1:], temperatures)
        return logprobs.cpu().numpy()

    def _go_on(self, now_s: float) -> None:
        """Gives free slots to siblings that another engine has begun, and reads their tokens.

        They come first, because their deadlines are the nearest. They decode in this step.
        """
        if self.draining or not any(group.continued for group in self._waiting):
            return
        rows: list[int] = []
        for group in [*self._waiting]:
            while group.continued and len(self._table) < self.num_slots:
                sibling = group.continued[0]
                rows.append(self._table.go_on(group))
                if (times := group.request.times) is not None:
                    times.started[sibling] = times.first_token[sibling] = now_s
            if not group.num_waiting:
                self._waiting.remove(group)
        self.continued_tokens += self._read_again(rows)

    def _admit(self) -> list[tuple[RunningGroup, slice]]:
        """Starts fresh siblings in free slots, in order, while their prompts fit into one pass.

        Returns each group with the rows of the siblings that started.
        """
        started: list[tuple[RunningGroup, slice]] = []
        num_tokens = 0
        while self._waiting and not self.draining and len(self._table) < self.num_slots:
            group = self._waiting[0]  # `_go_on` has left it no slots if it has continued siblings
            num_tokens += len(group.prompt_ids) if group.prefix is None else 0
            if started and num_tokens > PASS_TOKENS:
                break
            num_free = self.num_slots - len(self._table)
            rows = self._table.start(group, min(num_free, len(group.fresh)))
            started.append((group, rows))
            self.started_tokens += len(group.prompt_ids) * (rows.stop - rows.start)
            if not group.num_waiting:
                self._waiting.popleft()
        return started

    def _forward(self, num_decoding: int, started: Sequence[tuple[RunningGroup, slice]]) -> Tensor:
        """Last hidden state of every running row, `[n, D]`.

        The first `num_decoding` rows decode; the other rows have just started.
        """
        fresh = [group for group, _ in started if group.prefix is None]
        outputs = []
        if num_decoding or fresh:  # else every group that starts has read its prompt before
            fresh.sort(key=lambda group: len(group.prompt_ids))
            outputs.append(self._pass(num_decoding, fresh))
        for group, rows in started:
            assert group.prefix is not None
            assert group.hidden is not None
            self._cache.fill(rows, group.prefix)
            if self._table.experts is not None and group.experts is not None:
                self._table.experts[rows, : len(group.experts)] = group.experts
            outputs.append(group.hidden.expand(rows.stop - rows.start, -1))
            if group.num_waiting:  # clones, so that the whole pass is not kept in memory
                group.prefix, group.hidden = group.prefix.clone(), group.hidden.clone()
            else:
                group.prefix = group.hidden = None
        return torch.cat(outputs)

    def _pass(self, num_decoding: int, fresh: Sequence[RunningGroup]) -> Tensor:
        """One pass through the decoder: one token per decoding row, and the `fresh` prompts.

        Returns the hidden states of the decoding rows; those of the prompts go to their groups.
        """
        parts: list[DecodeAttention | PrefillAttention] = []
        if num_decoding:
            lengths = self._table.lengths[:num_decoding]
            longest = int(lengths.max())
            parts.append(DecodeAttention(self._cache, positions=lengths - 1, longest=longest))
        if fresh:
            prompt_lengths = [len(group.prompt_ids) for group in fresh]
            prefill = PrefillAttention(self._cache, lengths=prompt_lengths)
            parts.append(prefill)
        attention = parts[0] if len(parts) == 1 else MixedAttention(parts)
        last_ids = self._table.last_ids[:num_decoding]
        ids = torch.cat([last_ids, *(group.prompt_ids for group in fresh)])
        routing = Routing()
        hidden: Tensor = self._decoder(ids, attention.positions, attention, routing)
        experts = self._table.experts
        if experts is not None:
            chosen = routing.chosen().to(experts.dtype)
            rows = torch.arange(num_decoding, device=self._device)
            experts[rows, attention.positions[:num_decoding]] = chosen[:num_decoding]
        if fresh:
            ends = num_decoding + np.cumsum(prompt_lengths)
            for group, prefix, end in zip(fresh, prefill.prefixes(), ends, strict=True):
                group.prefix, group.hidden = prefix, hidden[end - 1]
                length = len(group.prompt_ids)
                if experts is not None:
                    group.experts = chosen[end - length : end]
                self.reread_tokens += length if group.was_read else 0
                self.prefill_pairs += 0 if group.was_read else causal_pairs(length)
                group.was_read = True
            self.prefilled_tokens += sum(prompt_lengths)
        return hidden[:num_decoding]

    def _vacate(self, rows: list[int]) -> None:
        moved = self._table.remove(rows)
        if moved:
            source, target, longest = moved
            self._cache.move(source, target, length=longest)

    def _read_again(self, which: Sequence[int]) -> int:
        """Reads the sequences of these rows, except their last tokens, which the next step reads.

        Returns how many tokens that were.
        """
        lengths = (self._table.lengths[: len(self._table)] - 1).tolist()
        for rows in _passes({row: lengths[row] for row in which}):
            attention = PrefillAttention(self._cache, lengths=[lengths[row] for row in rows])
            ids = torch.cat([self._table.token_ids[row, : lengths[row]] for row in rows])
            self._decoder(ids, attention.positions, attention)
            for row, prefix in zip(rows, attention.prefixes(), strict=True):
                self._cache.fill(slice(row, row + 1), prefix)
        return sum(lengths[row] for row in which)


def _passes(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Splits the rows into passes of about `PASS_TOKENS` tokens, by the length of each row.

    In order of length, so that rows of equal length share a kernel call.
    """
    rows: list[int] = []
    num_tokens = 0
    for row in sorted(lengths, key=lengths.__getitem__):
        if rows and num_tokens + lengths[row] > PASS_TOKENS:
            yield rows
            rows, num_tokens = [], 0
        rows.append(row)
        num_tokens += lengths[row]
    if rows:
        yield rows
