"""A mixture of experts in the place of a layer's MLP, or this rank's experts of it (Qwen3-MoE).

The router scores all experts for each token; the token goes to the `experts_per_token` best ones,
and their outputs are added with the router's weights:

    p = softmax(x · gateᵀ)              float32, over all experts
    y = Σ_{e in top-k of p} w_e · down_e(silu(gate_e(x)) · up_e(x))        w = p, or p / Σ_top-k p

There is no auxiliary loss, no capacity and no dropped token. The experts of a layer lie in two
parameters, one below the other, because products of many small matrices are slow one by one:

    mlp.experts.gate_up_proj [E · 2I, D]    per expert: gate_proj [I, D], then up_proj [I, D]
    mlp.experts.down_proj    [E · D, I]

Folders and engines have each expert by itself; `expert_names.py` translates.

**Expert parallelism.** The experts are divided over the `tp` axis. All its ranks hold the same
tokens between `gather_tokens` and `scatter_tokens`, as in the dense MLP. Each rank computes what
its own experts add to every token, and the sum over the ranks, which `scatter_tokens` makes anyway,
is the layer's output. So a token needs no exchange of its own (no all-to-all), and the matrices
stay whole: cut along their inner size of 768 they would be too narrow for a GPU. The price is that
a rank waits for the one whose experts have the most tokens. Every rank runs the router on all
tokens, on equal bits, so that all choose alike; its gradient covers the rank's own experts, and
`sum_gradients` adds it up as that of a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad, silu

from dapo_async.model.config import ModelConfig
from dapo_async.model.linear import Linear, product
from dapo_async.model.mesh import Axis
from dapo_async.model.tensor_parallel import gather_tokens, local, scatter_tokens


class Routing:
    """The experts of the tokens of one forward pass: those that the routers chose, or were given.

    Layers are numbered among the M layers that have experts.
    """

    def __init__(self, given: Tensor | None = None) -> None:
        """`given [T, M, k]` integers: the experts that each token has to use. −1 in the first place
        of a token: its routers choose."""
        self._given = given
        self._chosen: dict[int, Tensor] = {}  # what was used, [T, k] int16, by layer
        self._own: dict[int, Tensor] = {}  # what the router would have used, with `given`

    def take_slice(self, cp: Axis) -> None:
        """Keeps what is given for this rank's slice of the tokens; see `context_parallel.py`."""
        if self._given is None:
            return
        size = -(-len(self._given) // cp.size)
        mine = self._given[cp.rank * size : (cp.rank + 1) * size]
        self._given = pad(mine, (0, 0, 0, 0, 0, size - len(mine)), value=-1)

    def experts(self, number: int, own: Tensor) -> Tensor:
        """The experts to use in the layer `number`, where its router chooses `own [T, k]`."""
        used = own
        if self._given is not None:
            given = self._given[:, number].to(own.dtype)
            used = torch.where(given[:, :1] < 0, own, given)
            self._own[number] = own.detach().to(torch.int16)
        # A pass that is computed again for the gradient notes the same once more.
        self._chosen[number] = used.detach().to(torch.int16)
        return used

    def chosen(self) -> Tensor:
        """The experts that were used, `[T, M, k]` int16, after the pass."""
        return torch.stack([self._chosen[number] for number in range(len(self._chosen))], dim=1)

    def load(self, num_experts: int) -> Tensor:
        """How many pairs of token and expert each expert had, `[M, E]` int64."""
        chosen = self.chosen().long().transpose(0, 1).flatten(1)
        counts = chosen.new_zeros(len(chosen), num_experts)
        return counts.scatter_add_(1, chosen, torch.ones_like(chosen))

    def replaced(self) -> Tensor:
        """How many pairs of token and expert the routers would have had otherwise; 0 without
        `given`."""
        if not self._own:
            return next(iter(self._chosen.values())).new_zeros((), dtype=torch.int64)
        own = torch.stack([self._own[number] for number in range(len(self._own))], dim=1)
        kept = (self.chosen()[..., :, None] == own[..., None, :]).any(-1)
        return (~kept).sum()


class Experts(nn.Module):
    """The weights of all experts of a layer, or of this rank's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_size, self.inner_size = config.hidden_size, config.expert_size
        rows = config.num_experts * 2 * self.inner_size
        self.gate_up_proj = nn.Parameter(torch.empty(rows, self.hidden_size))
        rows = config.num_experts * self.hidden_size
        self.down_proj = nn.Parameter(torch.empty(rows, self.inner_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `Linear.reset_parameters`."""
        for weight in self.parameters():
            if not weight.is_meta:
                nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[1]), weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """What each pair adds: `x [P, D]` sorted by expert, `weights [P, 1]`, `[P, D]`.

        `ends [E]` int32: where the pairs of each of this rank's experts end.
        """
        gate_up = local(self.gate_up_proj).to(x.dtype).view(-1, 2 * self.inner_size, x.shape[1])
        down = local(self.down_proj).to(x.dtype).view(-1, x.shape[1], self.inner_size)
        gate, up = grouped_product(x, gate_up, ends).chunk(2, dim=-1)
        # Weighted before the last product, where a pair has fewer numbers.
        return grouped_product(silu(gate) * up * weights, down, ends)


class Mixture(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: ModelConfig, layer: int, tp: Axis) -> None:
        super().__init__()
        self.tp, self.num_experts = tp, config.num_experts
        self.number = config.mixture_layers.index(layer)
        self.top_k, self.normalised = config.experts_per_token, config.norm_topk
        self.share = tp.share(config.num_experts)
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor, routing: Routing, num_tokens: int) -> Tensor:
        """In and out: this rank's tokens `[⌈T / tp⌉, D]`; `num_tokens` is T."""
        x = gather_tokens(x, self.tp, num_tokens)
        experts, weights = self.route(x, routing)
        order, ends = self._sorted(experts)
        pairs = _Pairs(order, num_tokens=len(x), top_k=self.top_k)
        own = weights.reshape(-1).index_select(0, order)[:, None]
        y = self.experts(pairs.take(x), own, ends)
        return scatter_tokens(pairs.add_up(y), self.tp)

    def route(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Experts and their weights of each token, `[T, k]`; the weights in the dtype of `x`."""
        logits: Tensor = self.gate(x)
        probabilities = logits.softmax(-1, dtype=torch.float32)
        own = probabilities.detach().topk(self.top_k, dim=-1).indices
        experts = routing.experts(self.number, own)
        weights = probabilities.gather(1, experts)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.to(x.dtype)

    def _sorted(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of this rank's experts in the order of the experts; where each one's end.

        A pair is numbered token · k + place. Several ranks read two numbers back from the device:
        which pairs are this rank's.
        """
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        counts = flat.new_zeros(self.num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        ends = counts.cumsum(0)
        if self.tp.size == 1:
            return order, ends.to(torch.int32)
        own = ends[self.share]
        first, last = torch.stack((own[0] - counts[self.share.start], own[-1])).tolist()
        return order[first:last], (own - first).to(torch.int32)


class _Pairs:
    """Moves tokens to their pairs and back. Both ways add in a fixed order, so that a pass over
    equal weights chooses equal experts in the layers above."""

    def __init__(self, order: Tensor, *, num_tokens: int, top_k: int) -> None:
        self._top_k = top_k
        self._rows = order // top_k  # the token of each pair
        # Where each pair of each token is; the pairs of other ranks are behind the end.
        self._places = order.new_full((num_tokens * top_k,), len(order))
        self._places[order] = torch.arange(len(order), device=order.device)

    def take(self, x: Tensor) -> Tensor:
        """`x [T, D]` -> the token of each pair, `[P, D]`."""
        apply: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _Take.apply
        return apply(x, self._rows, self._places, self._top_k)

    def add_up(self, y: Tensor) -> Tensor:
        """`y [P, D]` of each pair -> the sum over the pairs of each token, `[T, D]`."""
        apply: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _AddUp.apply
        return apply(y, self._rows, self._places, self._top_k)


def _added_up(y: Tensor, places: Tensor, top_k: int) -> Tensor:
    if len(y) < len(places):  # several ranks
        y = torch.cat((y, y.new_zeros(1, y.shape[1])))
    return y.index_select(0, places).view(-1, top_k, y.shape[1]).sum(1)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.top_k = top_k
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _added_up(gradient, places, ctx.top_k), None, None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, places: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(rows)
        return _added_up(y, places, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        return gradient.index_select(0, rows), None, None, None


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`x [P, K] @ weights[e] [N, K]ᵀ` for the rows of each expert e, `[P, N]`.

    Rows `ends[e − 1] … ends[e]` are those of expert e. On CUDA in bfloat16 by torch's kernel for
    groups, which has not run on a GPU here; elsewhere one product per expert that has rows.
    """
    if x.is_cuda and x.dtype is torch.bfloat16 and len(x):
        return grouped_mm(x, weights.transpose(1, 2), offs=ends)
    return one_by_one(x, weights, ends)


def one_by_one(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` by one product per expert."""
    stops: list[int] = ends.tolist()
    sizes = [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
    # Unbound once: the backward pass of an index would fill a gradient of all experts each time.
    parts = [
        product(rows, weight)
        for rows, weight in zip(x.split(sizes), weights.unbind(), strict=True)
        if len(rows)
    ]
    return torch.cat(parts) if parts else product(x, weights[0])
