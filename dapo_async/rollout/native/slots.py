"""The running sequences as one table of tensors: tokens, sampling parameters and end of each slot.

Rows 0 … n − 1 run. A step writes all rows with a few tensor operations; Python handles a single row
only when it starts and when it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dapo_async.rollout.engine import GroupRequest, SamplingParams
from dapo_async.rollout.native.sampling import draw_tokens, keyed_uniforms, truncate
from dapo_async.types import Completion, FinishReason

Rows = slice | Tensor  # a run of rows, or any rows by number


@dataclass(slots=True, eq=False)
class RunningGroup:
    """A request on the engine: waiting siblings, their shared prompt, finished completions."""

    request: GroupRequest
    prompt_ids: Tensor  # [P] int64 on the engine's device
    fresh: deque[int]  # siblings that wait for a slot
    continued: deque[int]  # the same, with tokens of another engine
    was_read: bool = False  # its prompt, by some version
    # Kept while siblings wait, dropped when the weights change:
    prefix: Tensor | None = None  # keys and values of the prompt, [layers, 2, KV, P, D]
    hidden: Tensor | None = None  # hidden state of the last prompt token, [D]
    experts: Tensor | None = None  # of the prompt tokens, [P, M, k], where they are returned
    completions: dict[int, Completion] = field(default_factory=dict)

    @classmethod
    def of(cls, request: GroupRequest, prompt_ids: Tensor) -> Self:
        """Siblings that another engine has ended are complete from the start."""
        known = dict(enumerate(request.partial_completions))
        partial = {sibling: each for sibling, each in known.items() if each is not None}
        complete = {sibling: each for sibling, each in partial.items() if each.is_complete}
        siblings = range(request.num_siblings)
        return cls(
            request,
            prompt_ids,
            deque(sibling for sibling in siblings if sibling not in partial),
            deque(sibling for sibling in partial if sibling not in complete),
            completions=complete,
        )

    @property
    def num_waiting(self) -> int:
        return len(self.fresh) + len(self.continued)


class SlotTable:
    """All state of the slots except keys and values; a token's column is its position."""

    def __init__(
        self,
        *,
        num_slots: int,
        max_len: int,
        device: torch.device,
        experts: tuple[int, int, int] | None = None,
    ) -> None:
        """`experts`, where completions have them: layers with experts M, experts per token k, and
        experts per layer."""

        def table(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=device)

        self.device = device
        self.owners: list[tuple[RunningGroup, int]] = []  # group and sibling of each running slot
        self.token_ids = table(max_len, dtype=torch.int64)
        self.logprobs = table(max_len, dtype=torch.float32)
        self.versions = table(max_len, dtype=torch.int32)
        # The noise of a whole response, drawn when its slot starts.
        self.uniforms = table(max_len, dtype=torch.float64)
        self.temperatures = table(1, dtype=torch.float32)  # 1 where greedy
        # Of each token in the pass that read it first; see `Completion.experts`.
        self.experts: Tensor | None = None
        if experts is not None:
            layers, top_k, count = experts
            dtype = torch.uint8 if count <= 256 else torch.uint16
            self.experts = table(max_len, layers, top_k, dtype=dtype)
        # Columns: last token; length (the last token has no keys and values yet); length at which
        # the response is cut; stop tokens, padded with −1.
        self._numbers = table(4, dtype=torch.int64)
        self._starts = torch.arange(0, num_slots * max_len, max_len, device=device)
        self.total_length = 0  # of all running rows, known without a look at the device
        self._num_special = 0  # running rows that are greedy or truncated: evaluation only

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def last_ids(self) -> Tensor:
        """`[S]`."""
        return self._numbers[:, 0]

    @property
    def lengths(self) -> Tensor:
        """`[S]`."""
        return self._numbers[:, 1]

    def start(self, group: RunningGroup, count: int) -> slice:
        """Takes the next `count` rows for the group's next fresh siblings."""
        return self._start(group, [group.fresh.popleft() for _ in range(count)])

    def go_on(self, group: RunningGroup) -> int:
        """Takes the next row for the group's next sibling with tokens of another engine.

        The row looks as if it had drawn them; the caller reads them.
        """
        sibling = group.continued.popleft()
        (row,) = range(len(self) + 1)[self._start(group, [sibling])]
        partial = group.request.partial_completions[sibling]
        assert partial is not None, f"sibling {sibling} has no tokens"
        start, count = len(group.prompt_ids), len(partial.token_ids)
        for table, values in (
            (self.token_ids, partial.token_ids.astype(np.int64)),
            (self.logprobs, partial.behaviour_logprobs),
            (self.versions, partial.weight_versions),
        ):
            table[row, start : start + count] = torch.from_numpy(values).to(self.device)
        if self.experts is not None:
            assert partial.experts is not None, f"sibling {sibling} has no experts"
            assert partial.prompt_experts is not None, f"sibling {sibling} has no experts"
            chosen = np.concatenate([partial.prompt_experts, partial.experts])
            self.experts[row, : len(chosen)] = torch.from_numpy(chosen).to(self.device)
        self._numbers[row, 0] = int(partial.token_ids[-1])
        self._numbers[row, 1] += count
        self.total_length += count
        return row

    def _start(self, group: RunningGroup, siblings: Sequence[int]) -> slice:
        sampling, prompt_length = group.request.sampling, len(group.prompt_ids)
        count = len(siblings)
        rows = slice(len(self), len(self) + count)
        end = prompt_length + sampling.max_tokens
        self.token_ids[rows, :prompt_length] = group.prompt_ids
        uniforms = keyed_uniforms(
            sampling.seed,
            group_id=group.request.group_id,
            siblings=siblings,
            num_tokens=sampling.max_tokens,
        )
        self.uniforms[rows, prompt_length:end] = torch.from_numpy(uniforms)
        self.temperatures[rows] = sampling.temperature or 1.0
        missing = 3 + len(sampling.stop_token_ids) - self._numbers.shape[1]
        if missing > 0:
            self._numbers = torch.nn.functional.pad(self._numbers, (0, missing), value=-1)
        padding = (-1,) * -min(missing, 0)
        numbers = torch.tensor((-1, prompt_length, end, *sampling.stop_token_ids, *padding))
        self._numbers[rows] = numbers.to(self.device)
        self.owners += [(group, sibling) for sibling in siblings]
        self._num_special += count * _is_special(sampling)
        self.total_length += count * prompt_length
        return rows

    def sample(self, logits: Tensor, *, version: int) -> list[int]:
        """Draws one token per running row from `logits [n, V]`, which it overwrites.

        Returns the rows that ended, ascending. Raises RuntimeError naming the groups whose logits
        are not finite.
        """
        n = len(self)
        lengths = self._numbers[:n, 1]
        entries = self._starts[:n] + lengths  # of the new tokens in the flattened tables
        probabilities = logits.div_(self.temperatures[:n]).softmax(-1)
        allowed = self._truncated(probabilities) if self._num_special else probabilities
        tokens = draw_tokens(allowed, self.uniforms.view(-1).index_select(0, entries))
        logprobs = probabilities.gather(1, tokens[:, None]).squeeze(1).log_()
        self.token_ids.view(-1).index_copy_(0, entries, tokens)
        self.logprobs.view(-1).index_copy_(0, entries, logprobs)
        self.versions.view(-1).index_fill_(0, entries, version)
        self._numbers[:n, 0] = tokens
        lengths += 1  # a view: this updates the table
        self.total_length += n
        cut = lengths >= self._numbers[:n, 2]
        stopped = (tokens[:, None] == self._numbers[:n, 3:]).any(-1)
        # One transfer from the device finds both the rows that ended and those without a logprob.
        flagged: list[int] = (cut | stopped | logprobs.isnan()).nonzero().squeeze(-1).tolist()
        if flagged and logprobs[flagged].isnan().any():
            wrong = [self.owners[row][0] for row in flagged if logprobs[row].isnan()]
            group_ids = sorted({group.request.group_id for group in wrong})
            raise RuntimeError(
                f"logits of version {version} are not finite for the groups {group_ids}; "
                "look at the last update's gradients"
            )
        return flagged

    def _truncated(self, probabilities: Tensor) -> Tensor:
        """Leaves the tokens that each row may draw; greedy rows may draw one."""
        samplings = [group.request.sampling for group, _ in self.owners]
        vocab_size = probabilities.shape[-1]
        ranks = [1 if each.temperature == 0 else each.top_k or vocab_size for each in samplings]
        top_k = torch.tensor(ranks, device=self.device)
        top_p = torch.tensor([each.top_p for each in samplings], device=self.device)
        return truncate(probabilities, top_p=top_p, top_k=top_k)

    def finish(self, rows: list[int]) -> list[RunningGroup]:
        """Gives each row's completion to its group and returns these groups.

        The caller removes the rows afterwards.
        """
        groups: dict[RunningGroup, None] = {}
        for group, sibling, completion in self._completions(rows):
            self.total_length -= len(group.prompt_ids) + len(completion.token_ids)
            stopped = int(completion.token_ids[-1]) in group.request.sampling.stop_token_ids
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            group.completions[sibling] = replace(completion, finish_reason=reason)
            groups[group] = None
        return list(groups)

    def received(self, group: RunningGroup) -> tuple[Completion | None, ...]:
        """Per sibling the tokens so far; one that is not complete has finish reason ABORT."""
        waiting = {
            sibling: group.request.partial_completions[sibling] for sibling in group.continued
        }
        rows = [row for row, (owner, _) in enumerate(self.owners) if owner is group]
        running = {sibling: each for _, sibling, each in self._completions(rows)} if rows else {}
        known = {**waiting, **running, **group.completions}
        found = (known.get(sibling) for sibling in range(group.request.num_siblings))
        return tuple(each if each is not None and len(each.token_ids) else None for each in found)

    def _completions(self, rows: list[int]) -> Iterator[tuple[RunningGroup, int, Completion]]:
        """The owner of each row (ascending), and what the row has, with finish reason ABORT."""
        tables = (self.token_ids, self.logprobs, self.versions, self.lengths)
        which = self._index(rows)
        tokens, logprobs, versions, lengths = (tensor[which].cpu().numpy() for tensor in tables)
        experts = None if self.experts is None else self.experts[which].cpu().numpy()
        for index, row in enumerate(rows):
            group, sibling = self.owners[row]
            response = slice(len(group.prompt_ids), int(lengths[index]))
            read = response.start - 1  # the last prompt token gives the logits of the first one
            of_response = of_prompt = None
            if experts is not None:
                of_response = experts[index, read : response.stop - 1].copy()
                of_prompt = experts[index, :read].copy()
            yield (
                group,
                sibling,
                Completion(
                    token_ids=tokens[index, response].astype(np.int32),
                    behaviour_logprobs=logprobs[index, response].copy(),
                    weight_versions=versions[index, response].copy(),
                    # The first token is sampled under the weights that read the prompt.
                    prefill_version=int(versions[index, response.start]),
                    finish_reason=FinishReason.ABORT,
                    experts=of_response,
                    prompt_experts=of_prompt,
                ),
            )

    def remove(self, rows: list[int]) -> tuple[Rows, Rows, int] | None:
        """Removes the rows (ascending); the last running rows fill the gaps.

        Returns `(source, target, longest)` of that move, None where no row moves.
        """
        n, removed = len(self) - len(rows), set(rows)
        self._num_special -= sum(_is_special(self.owners[row][0].request.sampling) for row in rows)
        targets = [row for row in rows if row < n]
        sources = [row for row in range(n, len(self)) if row not in removed]
        for source_row, target_row in zip(sources, targets, strict=True):
            self.owners[target_row] = self.owners[source_row]
        del self.owners[n:]
        if not targets:
            return None
        source, target = self._index(sources), self._index(targets)
        if isinstance(source, slice) != isinstance(target, slice):
            # Torch refuses to write by index what it reads from a view of the same tensor.
            source = torch.tensor(sources, device=self.device)
            target = torch.tensor(targets, device=self.device)
        results = [self.token_ids, self.logprobs, self.versions]
        if self.experts is not None:
            results.append(self.experts)
        for tensor in (*results, self.uniforms, self.temperatures, self._numbers):
            tensor[target] = tensor[source]
        return source, target, int(self._numbers[target, 1].max())

    def _index(self, rows: list[int]) -> Rows:
        """The index of ascending rows: a slice where they are a run, copied 3 times as fast."""
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.device)


def _is_special(sampling: SamplingParams) -> bool:
    return sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k is not None
