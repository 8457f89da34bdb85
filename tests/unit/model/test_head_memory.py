"""The head never holds the logits of all tokens: the largest tensor of its passes is a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dapo_async.model import token_logprobs
from dapo_async.model.logprob import CHUNK_NUMBERS

WORDS, TOKENS, WIDTH = 40_000, 1024, 4


class Largest(TorchDispatchMode):
    """Counts the numbers in the largest tensor made inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
        self.numbers = max([self.numbers, *(tensor.numel() for tensor in tensors)])
        return made


def naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(hidden @ weight.T / temperature[:, None], dim=-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def largest_of(head: Callable[..., tuple[Tensor, Tensor]]) -> int:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
        for rows in (TOKENS, WORDS)
    )
    targets = torch.randint(WORDS, (TOKENS,), generator=generator)
    make: Callable[[], Largest] = Largest  # torch's constructor has no types
    largest = make()
    with largest:
        logprobs, entropies = head(hidden, weight, targets, torch.ones(TOKENS))
        (logprobs.sum() + entropies.sum()).backward()
    return largest.numbers


def test_head_makes_no_tensor_larger_than_a_chunk() -> None:
    assert largest_of(token_logprobs) <= CHUNK_NUMBERS < WORDS * TOKENS == largest_of(naive)
