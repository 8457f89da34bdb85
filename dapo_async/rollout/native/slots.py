"""The running sequences as one table of tensors: what each slot has sampled, how it samples, when it ends.

Rows 0 … n − 1 run. A whole step is booked with a handful of tensor operations; Python touches a row only when it starts and when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dapo_async.rollout.engine import GroupRequest, SamplingParams
from dapo_async.rollout.native.sampling import draw_tokens, keyed_uniforms, truncate
from dapo_async.types import Completion, FinishReason

Rows = slice | Tensor  # neighbours, or any rows by number


@dataclass(slots=True, eq=False)
class RunningGroup:
    """A request on the engine: which siblings have started, what they share, what has come out."""

    request: GroupRequest
    prompt_ids: Tensor  # [P] int64 on the engine's device
    num_started: int = 0
    prefix: Tensor | None = (
        None  # the prompt's keys and values, kept while siblings wait; dropped when the weights change
    )
    hidden: Tensor | None = None  # [D] of the last prompt token, kept likewise
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def num_waiting(self) -> int:
        return self.request.num_siblings - self.num_started


class SlotTable:
    """All per-slot state but keys and values; the column of a token is its position in prompt + response."""

    def __init__(self, *, num_slots: int, max_len: int, device: torch.device) -> None:
        def table(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=device)

        self.device = device
        self.owners: list[tuple[RunningGroup, int]] = []  # group and sibling of each running slot
        self.token_ids = table(max_len, dtype=torch.int64)
        self.logprobs = table(max_len, dtype=torch.float32)
        self.versions = table(max_len, dtype=torch.int32)
        self.uniforms = table(
            max_len, dtype=torch.float64
        )  # the noise, drawn for the whole response when its slot starts
        self.temperatures = table(1, dtype=torch.float32)  # 1 where greedy
        # Columns: last token, length (tokens so far; the last one has no keys and values yet), length at which to truncate, stop tokens or −1.
        self._numbers = table(4, dtype=torch.int64)
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
        """Takes the next `count` rows for the group's next siblings, which have sampled nothing yet."""
        sampling, prompt_length = group.request.sampling, len(group.prompt_ids)
        rows = slice(len(self), len(self) + count)
        siblings = range(group.num_started, group.num_started + count)
        end = prompt_length + sampling.max_tokens
        self.token_ids[rows, :prompt_length] = group.prompt_ids
        uniforms = keyed_uniforms(
            sampling.seed, key=group.request.key, siblings=siblings, num_tokens=sampling.max_tokens
        )
        self.uniforms[rows, prompt_length:end] = torch.from_numpy(uniforms)
        self.temperatures[rows] = sampling.temperature or 1.0
        missing = 3 + len(sampling.stop_token_ids) - self._numbers.shape[1]
        if missing > 0:
            self._numbers = torch.nn.functional.pad(self._numbers, (0, missing), value=-1)
        padding = (-1,) * -min(missing, 0)
        self._numbers[rows] = torch.tensor(
            (-1, prompt_length, end, *sampling.stop_token_ids, *padding)
        ).to(self.device)
        self.owners += [(group, sibling) for sibling in siblings]
        self._num_special += count * _is_special(sampling)
        group.num_started += count
        return rows

    def sample(self, logits: Tensor, *, version: int) -> list[int]:
        """Draws and books one token per running row from `logits [n, V]` (written over); returns the rows that ended, ascending.

        Raises RuntimeError naming the groups whose logits are not finite: nothing without logprobs may be trained.
        """
        n = len(self)
        rows, lengths = torch.arange(n, device=self.device), self._numbers[:n, 1]
        probabilities = logits.div_(self.temperatures[:n]).softmax(-1)
        allowed = self._truncated(probabilities) if self._num_special else probabilities
        tokens = draw_tokens(allowed, self.uniforms[rows, lengths])
        logprobs = probabilities[rows, tokens].log()
        (
            self.token_ids[rows, lengths],
            self.logprobs[rows, lengths],
            self.versions[rows, lengths],
        ) = tokens, logprobs, version
        self._numbers[:n, 0] = tokens
        lengths += 1
        ended = (lengths >= self._numbers[:n, 2]) | (tokens[:, None] == self._numbers[:n, 3:]).any(
            -1
        )
        flagged: list[int] = (ended | logprobs.isnan()).nonzero().squeeze(-1).tolist()
        if flagged and logprobs[flagged].isnan().any():
            keys = sorted(
                {self.owners[row][0].request.key for row in flagged if logprobs[row].isnan()}
            )
            raise RuntimeError(
                f"logits of version {version} are not finite for the groups {keys}; look at the last update's gradients"
            )
        return flagged

    def _truncated(self, probabilities: Tensor) -> Tensor:
        """Leaves what greedy and truncated rows may draw."""
        samplings = [group.request.sampling for group, _ in self.owners]
        whole = probabilities.shape[-1]
        return truncate(
            probabilities,
            top_p=torch.tensor([sampling.top_p for sampling in samplings], device=self.device),
            top_k=torch.tensor(
                [
                    1 if sampling.temperature == 0 else sampling.top_k or whole
                    for sampling in samplings
                ],
                device=self.device,
            ),
        )

    def finish(self, rows: list[int]) -> list[RunningGroup]:
        """Hands each row's completion to its group, and returns these groups; the rows are still to be removed."""
        tables, which = (
            (self.token_ids, self.logprobs, self.versions, self.lengths),
            self._index(rows),
        )
        tokens, logprobs, versions, lengths = (tensor[which].cpu().numpy() for tensor in tables)
        groups: dict[RunningGroup, None] = {}
        for index, row in enumerate(rows):
            group, sibling = self.owners[row]
            response = slice(len(group.prompt_ids), int(lengths[index]))
            token_ids = tokens[index, response].astype(np.int32)
            stopped = int(token_ids[-1]) in group.request.sampling.stop_token_ids
            group.completions[sibling] = Completion(
                token_ids=token_ids,
                behaviour_logprobs=logprobs[index, response].copy(),
                weight_versions=versions[index, response].copy(),
                prefill_version=int(
                    versions[index, response.start]
                ),  # the first token is sampled by the weights that read the prompt
                finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            )
            groups[group] = None
        return list(groups)

    def remove(self, rows: list[int]) -> tuple[Rows, Rows, int] | None:
        """Closes the rows (ascending); the last running ones move into the holes: `(source, target, longest)`, None when none has to."""
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
            # Torch refuses to write through an index what it reads through a view of the same tensor.
            source, target = (
                torch.tensor(sources, device=self.device),
                torch.tensor(targets, device=self.device),
            )
        for tensor in (
            self.token_ids,
            self.logprobs,
            self.versions,
            self.uniforms,
            self.temperatures,
            self._numbers,
        ):
            tensor[target] = tensor[source]
        return source, target, int(self._numbers[target, 1].max())

    def _index(self, rows: list[int]) -> Rows:
        """Of ascending rows; neighbours, such as one row alone or siblings, are copied about three times as fast as a slice."""
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.device)


def _is_special(sampling: SamplingParams) -> bool:
    return sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k is not None
