"""The running sequences as one table of tensors: what each slot has sampled, how it samples, when it ends.

Rows 0 … n − 1 run. A whole step is booked with a handful of tensor operations; Python touches a row only when it starts and when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dapo_async.rollout.engine import GroupRequest
from dapo_async.rollout.sampling import draw_tokens, keyed_uniforms, truncate
from dapo_async.types import Completion, FinishReason


@dataclass(slots=True, eq=False)
class RunningGroup:
    """A request on the engine: which siblings have started, what they share, what has come out."""

    request: GroupRequest
    prompt_ids: Tensor  # [P] int64 on the engine's device
    num_started: int = 0
    prefix: Tensor | None = None  # the prompt's keys and values, kept while siblings wait; dropped when the weights change
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
        self.uniforms = table(max_len, dtype=torch.float64)  # the noise, drawn for the whole response when its slot starts
        self.last_ids = table(dtype=torch.int64)
        self.lengths = table(dtype=torch.int64)  # tokens so far; the last one has no keys and values yet
        self.limits = table(dtype=torch.int64)  # length at which the response is truncated
        self.stop_ids = table(1, dtype=torch.int64)  # [S, stops], filled up with −1
        self.temperatures = table(dtype=torch.float32)  # 1 where greedy
        self.greedy = table(dtype=torch.bool)
        self.top_p = table(dtype=torch.float32)
        self.top_k = table(dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        tokens = (self.token_ids, self.logprobs, self.versions, self.uniforms)
        return (*tokens, self.last_ids, self.lengths, self.limits, self.stop_ids, self.temperatures, self.greedy, self.top_p, self.top_k)

    def start(self, group: RunningGroup, count: int) -> slice:
        """Takes the next `count` rows for the group's next siblings, which have sampled nothing yet."""
        sampling, prompt_length = group.request.sampling, len(group.prompt_ids)
        rows = slice(len(self), len(self) + count)
        siblings = range(group.num_started, group.num_started + count)
        end = prompt_length + sampling.max_tokens
        self.token_ids[rows, :prompt_length] = group.prompt_ids
        self.uniforms[rows, prompt_length:end] = keyed_uniforms(
            sampling.seed, key=group.request.key, siblings=torch.tensor(siblings, device=self.device), num_tokens=sampling.max_tokens
        )
        self.lengths[rows], self.limits[rows] = prompt_length, end
        missing = len(sampling.stop_token_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = torch.nn.functional.pad(self.stop_ids, (0, missing), value=-1)
        self.stop_ids[rows] = -1
        self.stop_ids[rows, : len(sampling.stop_token_ids)] = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self.device)
        self.temperatures[rows], self.greedy[rows] = sampling.temperature or 1.0, sampling.temperature == 0
        self.top_p[rows], self.top_k[rows] = sampling.top_p, sampling.top_k or torch.iinfo(torch.int64).max
        self.owners += [(group, sibling) for sibling in siblings]
        group.num_started += count
        return rows

    def sample(self, logits: Tensor, *, version: int) -> list[int]:
        """Draws and books one token per running row from `logits [n, V]` (written over); returns the rows that ended, ascending.

        Raises RuntimeError naming the group whose logits are not finite: nothing without logprobs may be trained.
        """
        n = len(self)
        rows, lengths = torch.arange(n, device=self.device), self.lengths[:n]
        all_logprobs = logits.div_(self.temperatures[:n, None]).log_softmax(-1)
        probabilities = all_logprobs.exp()
        samplings = {id(group): group.request.sampling for group, _ in self.owners}.values()
        if any(sampling.top_p < 1 or sampling.top_k for sampling in samplings):
            probabilities = truncate(probabilities, top_p=self.top_p[:n], top_k=self.top_k[:n])
        tokens = draw_tokens(probabilities, self.uniforms[rows, lengths]).clamp_(max=logits.shape[-1] - 1)  # NaN leads past the end
        if any(sampling.temperature == 0 for sampling in samplings):
            tokens = torch.where(self.greedy[:n], all_logprobs.argmax(-1), tokens)
        logprobs = all_logprobs.gather(-1, tokens[:, None]).squeeze(-1)
        self.token_ids[rows, lengths], self.logprobs[rows, lengths], self.versions[rows, lengths] = tokens, logprobs, version
        self.last_ids[:n] = tokens
        lengths += 1
        ended = (lengths >= self.limits[:n]) | (tokens[:, None] == self.stop_ids[:n]).any(-1)
        broken = ~logprobs.isfinite()
        flags = torch.stack((ended, broken)).cpu().numpy()
        if flags[1].any():
            keys = sorted({self.owners[row][0].request.key for row in np.flatnonzero(flags[1])})
            raise RuntimeError(f"logits of version {version} are not finite for the groups {keys}; look at the last update's gradients")
        return np.flatnonzero(flags[0]).tolist()

    def finish(self, row: int) -> RunningGroup:
        """Hands the row's completion to its group; the row is still to be removed."""
        group, sibling = self.owners[row]
        start, end = len(group.prompt_ids), int(self.lengths[row])
        token_ids, logprobs, versions = (tensor[row, start:end].cpu().numpy() for tensor in (self.token_ids, self.logprobs, self.versions))
        stopped = int(token_ids[-1]) in group.request.sampling.stop_token_ids
        group.completions[sibling] = Completion(
            token_ids=token_ids.astype(np.int32),
            behaviour_logprobs=logprobs.copy(),
            weight_versions=versions.copy(),
            prefill_version=int(versions[0]),  # the first token is sampled by the weights that read the prompt
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        )
        return group

    def remove(self, rows: list[int]) -> tuple[Tensor, Tensor, int] | None:
        """Closes the rows (ascending), the last running ones moving into the holes: `(source, target, longest)`, None when nothing moves."""
        n = len(self) - len(rows)
        removed = set(rows)
        targets = [row for row in rows if row < n]
        sources = [row for row in range(n, len(self)) if row not in removed]
        for target, source in zip(targets, sources, strict=True):
            self.owners[target] = self.owners[source]
        del self.owners[n:]
        if not targets:
            return None
        from_rows, to_rows = torch.tensor(sources, device=self.device), torch.tensor(targets, device=self.device)
        for tensor in self._tables:
            tensor[to_rows] = tensor[from_rows]
        return from_rows, to_rows, int(self.lengths[to_rows].max())
