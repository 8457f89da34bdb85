"""One learner rank: one optimizer update per minibatch.

In: a share of a minibatch's groups. Out: sums and counts. The learner actor calls `minibatch` for
each minibatch of a step, as soon as its groups are finished, and `end_step` after the last one.
Between two steps the publisher takes snapshots of the decoder.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from dapo_async.algorithm import (
    LossInputs,
    microbatch_loss,
    proximal_from,
    second_moment_mask,
    sequence_mean_weights,
)
from dapo_async.algorithm.guards import Guard, MinibatchFacts, broken_by_minibatch, flags
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner.batch_plan import RankShare, halved, pair_cost, share_minibatch
from dapo_async.learner.batching import (
    Microbatch,
    TrainingSequence,
    pack_share,
    training_sequences,
)
from dapo_async.learner.device_memory import WeightsBroken, is_out_of_memory
from dapo_async.learner.gradients import clip_gradients, sum_gradients
from dapo_async.learner.kept_weights import KeptWeights
from dapo_async.learner.metrics import PassSums, rollout_metrics, token_sums
from dapo_async.learner.mismatch import mismatch_sums
from dapo_async.learner.optimizer import BETAS, ShardedAdamW, warmed_up
from dapo_async.learner.options import loss_options, needs_reference, needs_start_logprobs
from dapo_async.learner.state import RankState, capture_state, check_state, load_state
from dapo_async.model import (
    Decoder,
    HostCopy,
    Mesh,
    PackedAttention,
    begin_pass,
    checksum_of_parts,
    keep_gathered,
    reshard,
    shard_of,
)
from dapo_async.model.cost import train_flops
from dapo_async.model.kernels import use_kernels
from dapo_async.model.mixture import Routing
from dapo_async.model.varlen import varlen_kernel
from dapo_async.types import Group, GroupFacts, MemoryShort, StepMetrics


@dataclass(frozen=True, slots=True)
class MinibatchStart:
    """What a minibatch computes before its update, keyed by `id(microbatch)`.

    `recomputed` lacks the microbatches whose proximal logprobs need no extra pass; `keep` is empty
    if M2PO is off, and `reference` without a KL term.
    """

    recomputed: Mapping[int, Tensor]  # proximal logprobs [N] by an extra forward pass
    keep: Mapping[int, Tensor]  # M2PO's mask [N]
    reference: Mapping[int, Tensor]  # logprobs [N] of the reference policy


@dataclass(frozen=True, slots=True)
class MinibatchCounts:
    """Of one minibatch over all data-parallel ranks."""

    num_tokens: float  # tokens in the loss, at least 1
    num_sequences: float  # sequences that have a token in the loss, at least 1
    num_rollouts: float = 0.0
    num_truncated: float = 0.0  # rollouts that were cut


class LearnerRank:
    """Owns the decoder that is trained and its optimizer.

    `version` counts finished steps: the weights after step n are version n + 1.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        algorithm: AlgorithmConfig,
        learner: LearnerConfig,
        version: int = 0,
        mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
        guards: str = "warn",
    ) -> None:
        """The decoder's parameters are the master weights: float32 for any dtype of activations.

        `guards`: `train.guards`; with skip and stop a minibatch that breaks a rule of
        `algorithm.guards` changes no weight.
        With a `mesh` the decoder is this rank's part of one, and all ranks call every method.
        `memory_choice` chooses what is `auto` in `learner`; here it stands for no recomputation and
        ZeRO stage 3. With a KL term the decoder's weights are now those of the reference policy.
        Raises ValueError for options that the loss does not support.
        """
        precisions = {parameter.dtype for parameter in decoder.parameters()}
        assert precisions == {torch.float32}, f"master weights are float32, these are {precisions}"
        self.decoder, self.version = decoder, version
        decoder.recompute("none" if learner.recompute == "auto" else learner.recompute)
        use_kernels(decoder, learner.kernels)
        self._zero_stage = 3 if learner.zero_stage == "auto" else learner.zero_stage
        keep_gathered(decoder, zero_stage=self._zero_stage)
        self._algorithm, self._learner = algorithm, learner
        self._loss_options = loss_options(algorithm)
        self._optimizer = ShardedAdamW(
            decoder,
            lr=learner.lr,
            weight_decay=learner.weight_decay,
            betas=BETAS,
            offload=learner.offload_optimizer,
        )
        self._device, self._mesh = decoder.rope_cos.device, mesh
        self.attention_kernel: str | None = None  # of CUDA in half precision, and why no other one
        if self._device.type == "cuda" and decoder.activations is not torch.float32:
            self.attention_kernel = varlen_kernel().note
        self.num_updates = 0  # of the step that is open
        self._guards = guards
        self._on_host = HostCopy()  # while the rank sleeps
        self._held = False  # the newest minibatch has changed no weight
        self._broken: WeightsBroken | None = None  # the weights belong to no version
        self.num_halvings = 0  # of every pass, because the device lacked memory
        device = torch.device("cpu") if learner.offload_optimizer else self._device
        self._start_weights = KeptWeights(decoder, device=device)  # of the step, if they are needed
        self._reference: KeptWeights | None = None
        self._reference_sum: str | None = None
        if needs_reference(algorithm):
            self._reference = KeptWeights(decoder, device=device)
            self._reference.copy()
            self._reference_sum = checksum_of_parts(decoder, mesh, torch.float32)

    def step(
        self, groups: Sequence[Group], *, groups_per_minibatch: int | None = None
    ) -> StepMetrics:
        """A whole step on `groups`, in minibatches of so many groups each, in their order.

        None: as many minibatches as the config says, of about equal numbers of groups.
        """
        count = self._learner.num_minibatches
        if groups_per_minibatch is not None:
            count = -(-len(groups) // groups_per_minibatch)
        bounds = [len(groups) * number // count for number in range(count + 1)]
        metrics = StepMetrics()
        for first, last in pairwise(bounds):
            metrics = metrics + self.minibatch(groups[first:last], more=last < len(groups))
            if self._held:
                break
        self.end_step()
        return metrics

    def minibatch(
        self,
        groups: Sequence[Group],
        *,
        share: RankShare | None = None,
        more: bool = False,
        num_halvings: int = 0,
    ) -> StepMetrics:
        """Trains on one minibatch of the step and returns its sums and counts.

        `share`: this rank's share of the minibatch; `groups` then have the rollouts that it names.
        None: all ranks get the whole groups, and plan alike who trains what. The metrics are those
        of the share, and add up to the minibatch's. `more`: other minibatches of the step may
        follow. `num_halvings`: how often each pass is cut into halves, the same on all ranks.

        The totals have a `guard.NAME` of 1 for each rule of `algorithm.guards` that the minibatch
        breaks. A loss or gradient that is not finite changes no weight, with `guards` skip and stop
        neither does any other broken rule (`held` 1); the step ends with it. If it was the first
        minibatch, the step has changed nothing (`skipped` 1).

        If the device lacks memory, a single rank halves its passes, and those of all later
        minibatches, and tries again once. Raises RuntimeError, which names the microbatch, when
        that does not help. One of several ranks raises MemoryShort: the others are in the midst of
        the pass, so all of them have to start again, with one more halving.
        """
        learner, first = self._learner, self.num_updates == 0
        if first and more and needs_start_logprobs(self._algorithm):
            self._start_weights.copy()
        if share is None:
            share = self.share_of(groups)
            groups = [each.part_of(groups[each.position]) for each in share.groups]
        lr = warmed_up(learner.lr, step=self.version, warmup_steps=learner.warmup_steps)
        for _ in range(self.num_halvings + num_halvings):
            share = halved(share)
        try:
            update, broken = self._trained(groups, share, lr=lr, first=first)
        except WeightsBroken as error:
            self._broken = error
            raise
        self._held = Guard.NON_FINITE in broken or (bool(broken) and self._guards != "warn")
        self.num_updates += not self._held
        counts = {
            **flags(broken),
            "held": float(self._held),
            "skipped": float(self.num_updates == 0),
        }
        metrics = StepMetrics(
            maxima={
                "lr": lr,
                "imbalance": share.imbalance,
                "halvings": self.num_halvings + num_halvings,
            },
            # The flags are equal on all ranks and counted once.
            totals={
                **(counts if self._mesh.dp.rank == 0 else {}),
                "train_flops": self._flops(groups),
            },
        )
        return rollout_metrics(groups, share, learner_version=self.version) + update + metrics

    def _trained(
        self, groups: Sequence[Group], share: RankShare, *, lr: float, first: bool
    ) -> tuple[StepMetrics, tuple[Guard, ...]]:
        """The passes of a minibatch and its update; once more in halves if memory is short."""
        try:
            return self._passes(groups, share, lr=lr, first=first)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if all(len(rows) <= 1 for rows in share.passes):
                raise self._too_large(groups, share, error) from error
            if self._mesh.every.size > 1:
                raise MemoryShort(str(self._too_large(groups, share, error))) from error
        self._release_memory()
        self.num_halvings += 1
        finer = halved(share)
        try:
            return self._passes(groups, finer, lr=lr, first=first)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(groups, finer, error) from error

    def _passes(
        self, groups: Sequence[Group], share: RankShare, *, lr: float, first: bool
    ) -> tuple[StepMetrics, tuple[Guard, ...]]:
        sequences = self._sequences(groups, share)
        batches = pack_share(sequences, share, device=self._device, cp=self._mesh.cp)
        start = self._start(batches, first=first)
        cut = sum(rollout.truncated for group in groups for rollout in group.rollouts)
        count = sum(len(group.rollouts) for group in groups)
        counts = self._counts(batches, num_rollouts=count, num_truncated=cut)
        return self._update(batches, start, counts, lr=lr, first=first)

    def _release_memory(self) -> None:
        """Drops the gradients of the passes so far, and what the allocator keeps."""
        gc.collect()  # the failed passes, as far as they are in cycles
        self._optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_large(
        self, groups: Sequence[Group], share: RankShare, error: BaseException
    ) -> RuntimeError:
        tokens = [
            len(group.prompt.token_ids) + rollout.num_tokens
            for group in groups
            for rollout in group.rollouts
        ]
        return RuntimeError(
            f"the learner's device lacks memory for a microbatch: {len(tokens)} rollouts of at "
            f"most {max(tokens, default=0)} tokens in {len(share.passes)} passes "
            f"({str(error)[:200]}); lower learner.microbatch_tokens "
            f"({self._learner.fixed_microbatch_tokens}), set learner.recompute=all, or raise "
            "learner.context_parallel"
        )

    def _flops(self, groups: Sequence[Group]) -> float:
        """Model FLOPs of one forward and backward pass of this rank; see `model/cost.py`."""
        lengths = [
            (len(group.prompt.token_ids), [each.num_tokens for each in group.rollouts])
            for group in groups
        ]
        return float(train_flops(self.decoder.config, lengths))

    def end_step(self) -> None:
        """The minibatches so far were the step."""
        self.version += 1
        self.num_updates = 0

    def capture_state(self) -> RankState:
        """Copies of this rank's weights and moments in host memory, for `save_state`.

        Not in the midst of a step: the weights between two minibatches have no version. Raises
        WeightsBroken after a minibatch that did.
        """
        if self._broken is not None:
            raise self._broken
        assert not self.num_updates, f"step {self.version} is open after {self.num_updates} updates"
        return capture_state(
            self.decoder,
            self._optimizer,
            version=self.version,
            reference=self._reference_sum,
            values_of=self._on_host.view,
        )

    @property
    def asleep(self) -> bool:
        """Whether its device memory is free for others."""
        return self._on_host.num_bytes > 0

    def sleep(self) -> None:
        """Between two steps: frees its device memory. Its state moves to the host, where
        `capture_state` still finds it. Every rank of the mesh sleeps and wakes alone."""
        assert not self.num_updates, f"step {self.version} is open after {self.num_updates} updates"
        if self.asleep:
            return
        reshard(self.decoder)  # a pass without a backward pass has gathered weights
        kept = [self._start_weights, *([self._reference] if self._reference is not None else [])]
        self._on_host.release(
            (
                *map(shard_of, self.decoder.parameters()),
                *self.decoder.buffers(),
                *self._optimizer.tensors(),
                *(shard for each in kept for shard in each.shards),
            )
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # also what its passes have left

    def wake(self) -> None:
        """Takes its device memory again."""
        self._on_host.restore()

    def load(
        self, folder: Path, *, check: Callable[[Iterable[Path]], None] = lambda _: None
    ) -> None:
        """Continues from a state that `save_state` wrote, on any number of ranks.

        `check`: see `load_state`. Raises ValueError if a file is missing or damaged, or if the
        state was trained with another reference policy.
        """
        reference = check_state(folder).get("reference")
        if self._reference_sum is not None and reference != self._reference_sum:
            raise ValueError(
                f"the reference policy of the KL term has changed: the base model (model.path) has "
                f"the weights {self._reference_sum}, the checkpoint was trained with {reference}; "
                "give the base model of the run"
            )
        self.version = load_state(self.decoder, self._optimizer, folder, check=check)

    def share_of(self, groups: Sequence[Group]) -> RankShare:
        """This rank's share of a minibatch of whole groups."""
        shares = share_minibatch(
            [GroupFacts.of(group) for group in groups],
            num_ranks=self._mesh.dp.size,
            max_tokens=self._learner.fixed_microbatch_tokens,
            pair_cost=pair_cost(self.decoder.config),
        )
        return shares[self._mesh.dp.rank]

    def _sequences(self, groups: Sequence[Group], share: RankShare) -> list[TrainingSequence]:
        return training_sequences(
            groups,
            share.groups,
            normalize_std=self._algorithm.normalize_std,
            overlong_filtering=self._algorithm.overlong_filtering,
        )

    def _replayed(self, batch: Microbatch) -> Routing:
        """The routing of a pass: by the engine's experts, if they are to be replayed."""
        return Routing(batch.experts if self._learner.routing_replay else None)

    def _forward(self, batch: Microbatch, routing: Routing | None = None) -> tuple[Tensor, Tensor]:
        """`routing`: None for `_replayed`."""
        attention = PackedAttention(batch.lengths, shared=batch.shared, device=self._device)
        logprobs, entropies = self.decoder.score(
            batch.token_ids,
            attention.positions,
            attention,
            predictors=batch.predictors,
            targets=batch.targets,
            temperatures=batch.temperatures,
            own=batch.own,
            routing=routing or self._replayed(batch),
        )
        return logprobs, entropies

    def _start(self, batches: Sequence[Microbatch], *, first: bool) -> MinibatchStart:
        recomputed = self._recompute(batches, first=first)
        keep = self._keep_masks(batches, recomputed)
        return MinibatchStart(recomputed, keep, self._reference_logprobs(batches))

    @record_function("proximal pass")
    @torch.no_grad()
    def _recompute(self, batches: Sequence[Microbatch], *, first: bool) -> dict[int, Tensor]:
        """Proximal logprobs by an extra forward pass with the weights at the start of the step.

        The first minibatch takes them from the pass that it makes anyway: no update has come
        before it. M2PO's mask needs them before the first loss.
        """
        with_mask = self._algorithm.correction == "m2po"
        if not with_mask and (first or self._algorithm.proximal != "recompute"):
            return {}
        with nullcontext() if first else self._start_weights.in_use():
            return {id(batch): self._forward(batch)[0] for batch in batches}

    @record_function("reference pass")
    @torch.no_grad()
    def _reference_logprobs(self, batches: Sequence[Microbatch]) -> dict[int, Tensor]:
        """By a forward pass with the reference policy's weights; empty without a KL term.

        Its routers choose the experts themselves: the engine's were those of another policy.
        """
        if self._reference is None:
            return {}
        reshard(self.decoder)  # M2PO's pass before the first update leaves gathered weights
        with self._reference.in_use():
            return {id(batch): self._forward(batch, Routing())[0] for batch in batches}

    def _keep_masks(
        self, batches: Sequence[Microbatch], recomputed: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """M2PO's mask over the tokens of the minibatch on all ranks; empty if it is off."""
        if self._algorithm.correction != "m2po":
            return {}
        dp, nothing = self._mesh.dp, torch.zeros(0, device=self._device)

        def whole(parts: Sequence[Tensor]) -> Tensor:
            own = torch.cat([nothing, *(part.float() for part in parts)])
            return torch.cat(dp.gather(own))

        keep = second_moment_mask(
            whole([recomputed[id(batch)] for batch in batches]),
            behaviour_logprobs=whole([batch.behaviour_logprobs for batch in batches]),
            advantages=whole([batch.advantages for batch in batches]),
            mask=whole([batch.mask for batch in batches]) > 0,
        )
        counts = [len(batch.targets) for batch in batches]
        of_ranks = dp.gather(torch.zeros(sum(counts), device=self._device))
        before = sum(len(part) for part in of_ranks[: dp.rank])
        parts = keep[before : before + sum(counts)].split(counts) if counts else ()
        return {id(batch): part for batch, part in zip(batches, parts, strict=True)}

    @record_function("minibatch")
    def _update(
        self,
        minibatch: Sequence[Microbatch],
        start: MinibatchStart,
        counts: MinibatchCounts,
        *,
        lr: float,
        first: bool,
    ) -> tuple[StepMetrics, tuple[Guard, ...]]:
        """One optimizer step, or none if a guard forbids it; and the guards that were broken.

        Adds up the gradients of the microbatches, each divided by the minibatch's token count.
        """
        passes = PassSums(self.decoder.config)
        for number, batch in enumerate(minibatch, start=1):
            last = number == len(minibatch)
            begin_pass(self.decoder, zero_stage=self._zero_stage, last=last)
            routing = self._replayed(batch)
            logprobs, entropies = self._forward(batch, routing)
            # The learner's logprobs at the start of the step, if known: before the first update
            # they are those of this pass.
            proximal = start.recomputed.get(id(batch), logprobs.detach() if first else None)
            keep, reference = start.keep.get(id(batch)), start.reference.get(id(batch))
            loss, diagnostics = self._loss(
                batch, logprobs, entropies, proximal, keep, counts, reference
            )
            loss.backward()
            tokens = token_sums(
                batch, logprobs.detach(), entropies.detach(), learner_version=self.version
            )
            passes.add(
                loss.detach(), diagnostics | tokens, self._mismatch(batch, proximal), routing
            )
        sum_gradients(self.decoder, self._mesh)
        norm_before = clip_gradients(self.decoder, self._learner.grad_clip, self._mesh)
        metrics, whole = passes.read(norm_before, self._mesh)
        facts = MinibatchFacts(
            loss=whole.loss,
            grad_norm=whole.grad_norm,
            num_tokens=whole.num_tokens,
            kl_sum=whole.kl_sum,
            ratio_sum=whole.ratio_sum,
            chi2_sum=whole.chi2_sum,
            num_rollouts=counts.num_rollouts,
            num_truncated=counts.num_truncated,
        )
        broken = broken_by_minibatch(facts)
        if Guard.NON_FINITE not in broken:
            if not broken or self._guards == "warn":
                self._optimizer.step(lr=lr)
            metrics = metrics + StepMetrics(sums={"grad_norm": (whole.grad_norm, 1.0)})
        self._optimizer.zero_grad()
        return metrics, broken

    def _counts(
        self, minibatch: Sequence[Microbatch], *, num_rollouts: int, num_truncated: int
    ) -> MinibatchCounts:
        own: list[float] = [
            sum(batch.num_loss_tokens for batch in minibatch),
            sum(batch.num_sequences for batch in minibatch),
            num_rollouts,
            num_truncated,
        ]
        dp = self._mesh.dp
        if dp.size > 1:
            own = dp.sum(torch.tensor(own, dtype=torch.float64, device=self._device)).tolist()
        num_tokens, num_sequences, rollouts, truncated = own
        return MinibatchCounts(max(1.0, num_tokens), max(1.0, num_sequences), rollouts, truncated)

    def _mismatch(self, batch: Microbatch, proximal_logprobs: Tensor | None) -> dict[str, Tensor]:
        if proximal_logprobs is None:
            return {}
        floor, cap = self._algorithm.correction_band
        return mismatch_sums(
            batch, proximal_logprobs, learner_version=self.version, cap=cap, floor=floor
        )

    def _loss(
        self,
        batch: Microbatch,
        logprobs: Tensor,
        entropies: Tensor,
        start_logprobs: Tensor | None,
        keep: Tensor | None,
        counts: MinibatchCounts,
        reference_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The microbatch's share of the minibatch's loss, and its diagnostics.

        `start_logprobs [N]` are those of the weights at the start of the step,
        `reference_logprobs [N]` those of the reference policy.
        """
        proximal = proximal_from(
            self._algorithm.proximal,
            current_logprobs=logprobs,
            behaviour_logprobs=batch.behaviour_logprobs,
            recomputed_logprobs=start_logprobs,
            learner_version=self.version,
            behaviour_versions=batch.behaviour_versions,
        )
        weights = None
        if self._algorithm.loss_mean == "sequence":
            weights = sequence_mean_weights(
                batch.mask,
                sequence_ids=batch.sequence_ids,
                num_tokens=counts.num_tokens,
                num_sequences=counts.num_sequences,
                num_ids=len(batch.lengths),
            )
        inputs = LossInputs(
            current_logprobs=logprobs,
            proximal_logprobs=proximal,
            behaviour_logprobs=batch.behaviour_logprobs,
            advantages=batch.advantages,
            mask=batch.mask,
            sequence_ids=batch.sequence_ids,
            num_ids=len(batch.lengths),
            keep=keep,
            entropies=entropies,
            reference_logprobs=reference_logprobs,
            token_weights=weights,
        )
        return microbatch_loss(inputs, self._loss_options, num_tokens=counts.num_tokens)
