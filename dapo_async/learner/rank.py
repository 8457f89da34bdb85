"""One learner rank: one optimizer update per minibatch.

In: whole groups. Out: sums and counts of the step. The learner actor calls `step` once per step;
between two steps the publisher takes snapshots of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    step_metrics,
)
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner.batching import (
    Microbatch,
    TrainingSequence,
    filler,
    split_microbatches,
    split_minibatches,
    training_sequences,
)
from dapo_async.learner.gradients import clip_gradients, sum_gradients, sum_numbers
from dapo_async.learner.metrics import rollout_metrics, token_metrics
from dapo_async.learner.mismatch import mismatch_metrics
from dapo_async.learner.optimizer import BETAS, ShardedAdamW, warmed_up
from dapo_async.learner.options import loss_options
from dapo_async.learner.state import RankState, capture_state, load_state
from dapo_async.model import Decoder, Mesh, PackedAttention
from dapo_async.types import Group, StepMetrics


@dataclass(frozen=True, slots=True)
class StepStart:
    """What a step computes before its first update, keyed by `id(microbatch)`.

    `recomputed` lacks the microbatches whose proximal logprobs need no extra pass; `keep` is empty
    if M2PO is off.
    """

    recomputed: Mapping[int, Tensor]  # proximal logprobs [N] by an extra forward pass
    keep: Mapping[int, Tensor]  # M2PO's mask [N]


@dataclass(frozen=True, slots=True)
class MinibatchCounts:
    """Of one minibatch over all data-parallel ranks, at least 1 each."""

    num_tokens: float  # tokens in the loss
    num_sequences: float  # sequences that have a token in the loss


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
        seed: int,
        version: int = 0,
        mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
    ) -> None:
        """The decoder's parameters are the master weights: float32 for any dtype of activations.

        With a `mesh` the decoder is this rank's part of one, and all ranks call every method.
        Raises ValueError for options that the loss does not support.
        """
        precisions = {parameter.dtype for parameter in decoder.parameters()}
        assert precisions == {torch.float32}, f"master weights are float32, these are {precisions}"
        self.decoder, self.version = decoder, version
        decoder.recompute(decoder.config.num_layers if learner.recompute else 0)
        self._algorithm, self._learner, self._seed = algorithm, learner, seed
        self._loss_options = loss_options(algorithm)
        self._optimizer = ShardedAdamW(
            decoder,
            lr=learner.lr,
            weight_decay=learner.weight_decay,
            betas=BETAS,
            offload=learner.offload_optimizer,
        )
        self._device, self._mesh = decoder.rope_cos.device, mesh

    def step(
        self,
        groups: Sequence[Group],
        *,
        positions: Sequence[int] | None = None,
        num_groups: int | None = None,
    ) -> StepMetrics:
        """Trains on one batch of groups and returns the sums and counts of the step.

        With several data-parallel ranks, `groups` is this rank's share: the groups at `positions`
        in a batch of `num_groups`. The metrics are those of the share, and add up to the batch's.

        A loss or gradient that is not finite ends the step (`non_finite` 1 in the totals), and its
        minibatch changes no weight. If it was the first minibatch, the step has changed nothing
        (`skipped` 1).
        """
        learner = self._learner
        minibatches = self._minibatches(groups, positions, num_groups)
        start = self._start(minibatches)
        lr = warmed_up(learner.lr, step=self.version, warmup_steps=learner.warmup_steps)
        metrics = rollout_metrics(groups, learner_version=self.version)
        metrics = metrics + self._imbalance(minibatches)
        non_finite, updates = False, 0
        for minibatch in minibatches:
            update, non_finite = self._update(minibatch, start, lr=lr, first=updates == 0)
            metrics = metrics + update
            if non_finite:
                break
            updates += 1
        self.version += 1
        flags = {"non_finite": float(non_finite), "skipped": float(updates == 0)}
        # The flags are equal on all ranks and counted once.
        totals = flags if self._mesh.dp.rank == 0 else {}
        return metrics + StepMetrics(maxima={"lr": lr}, totals=totals)

    def capture_state(self) -> RankState:
        """Copies of this rank's weights and moments in host memory, for `save_state`."""
        return capture_state(self.decoder, self._optimizer, version=self.version)

    def load(self, folder: Path) -> None:
        """Continues from a state that `save_state` wrote, on any number of ranks."""
        self.version = load_state(self.decoder, self._optimizer, folder)

    def _minibatches(
        self, groups: Sequence[Group], positions: Sequence[int] | None, num_groups: int | None
    ) -> list[list[Microbatch]]:
        """This rank's microbatches of each minibatch."""
        sequences = training_sequences(
            groups,
            normalize_std=self._algorithm.normalize_std,
            overlong_filtering=self._algorithm.overlong_filtering,
            positions=positions,
        )
        minibatches = split_minibatches(
            sequences,
            self._learner.num_minibatches,
            seed=(self._seed, self.version),
            batch_size=None if num_groups is None else num_groups * len(groups[0].rollouts),
        )
        return self._pack(minibatches, sequences)

    def _pack(
        self,
        minibatches: Sequence[Sequence[TrainingSequence]],
        sequences: Sequence[TrainingSequence],
    ) -> list[list[Microbatch]]:
        """Packs each minibatch into equal numbers of microbatches on all data-parallel ranks.

        Ranks exchange parameters in every pass, so all must run the same number of passes. A rank
        with fewer microbatches splits its sequences finer, because all ranks wait for the largest
        microbatch of a pass. Fillers make up what is still missing.
        """
        limit, device = self._learner.microbatch_tokens, self._device
        packed = [split_microbatches(each, limit, device=device) for each in minibatches]
        counts = torch.tensor([len(batches) for batches in packed], device=device)
        for number, count in enumerate(self._mesh.dp.max(counts).tolist()):
            if len(packed[number]) < count:
                finer = split_microbatches(minibatches[number], limit, parts=count, device=device)
                packed[number] = finer if len(finer) <= count else packed[number]
            missing = count - len(packed[number])
            packed[number] += [filler(sequences, device=device) for _ in range(missing)]
        return packed

    def _imbalance(self, minibatches: Sequence[Sequence[Microbatch]]) -> StepMetrics:
        """The ratio of possible to actual tokens, 1 if all ranks have equal work.

        Each pass takes as long as its largest microbatch on any rank.
        """
        dp = self._mesh.dp
        sizes = [len(batch.token_ids) for minibatch in minibatches for batch in minibatch]
        tokens = torch.tensor(sizes, dtype=torch.float64, device=self._device)
        total, fullest = dp.sum(tokens.sum()), dp.max(tokens.clone()).sum() * dp.size
        return StepMetrics(maxima={"imbalance": float(fullest / total)})

    def _forward(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        attention = PackedAttention(batch.lengths, shared=batch.shared, device=self._device)
        logprobs, entropies = self.decoder.score(
            batch.token_ids,
            attention.positions,
            attention,
            predictors=batch.predictors,
            targets=batch.targets,
            temperatures=batch.temperatures,
        )
        return logprobs, entropies

    def _start(self, minibatches: Sequence[Sequence[Microbatch]]) -> StepStart:
        batches = [batch for minibatch in minibatches for batch in minibatch]
        recomputed = self._recompute(minibatches)
        return StepStart(recomputed, self._keep_masks(batches, recomputed))

    @record_function("proximal pass")
    @torch.no_grad()
    def _recompute(self, minibatches: Sequence[Sequence[Microbatch]]) -> dict[int, Tensor]:
        """Proximal logprobs by an extra forward pass, of the microbatches that need one.

        The first minibatch takes them from the pass that it makes anyway: no update has come
        before it. M2PO's mask needs those of all microbatches before the first loss.
        """
        if self._algorithm.correction == "m2po":
            first = 0
        elif self._algorithm.proximal == "recompute":
            first = 1
        else:
            return {}
        batches = [batch for minibatch in minibatches[first:] for batch in minibatch]
        return {id(batch): self._forward(batch)[0] for batch in batches}

    def _keep_masks(
        self, batches: Sequence[Microbatch], recomputed: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """M2PO's mask over the tokens of all ranks and minibatches; empty if it is off."""
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
        self, minibatch: Sequence[Microbatch], start: StepStart, *, lr: float, first: bool
    ) -> tuple[StepMetrics, bool]:
        """One optimizer step, or none if loss or gradient is not finite; and whether that is so.

        Adds up the gradients of the microbatches, each divided by the minibatch's token count.
        """
        counts = self._counts(minibatch)
        metrics = StepMetrics()
        total_loss = 0.0
        for batch in minibatch:
            logprobs, entropies = self._forward(batch)
            # The learner's logprobs at the start of the step, if known: before the first update
            # they are those of this pass.
            proximal = start.recomputed.get(id(batch), logprobs.detach() if first else None)
            keep = start.keep.get(id(batch))
            loss, diagnostics = self._loss(batch, logprobs, entropies, proximal, keep, counts)
            loss.backward()
            total_loss += float(loss.detach())
            metrics = metrics + step_metrics(diagnostics)
            metrics = metrics + token_metrics(
                batch, logprobs.detach(), entropies.detach(), learner_version=self.version
            )
            metrics = metrics + self._mismatch(batch, proximal)
        sum_gradients(self.decoder, self._mesh)
        norm = clip_gradients(self.decoder, self._learner.grad_clip, self._mesh)
        (total_loss,) = sum_numbers([total_loss], self._mesh, self._device)
        non_finite = not (math.isfinite(norm) and math.isfinite(total_loss))
        if not non_finite:
            self._optimizer.step(lr=lr)
            metrics = metrics + StepMetrics(sums={"grad_norm": (norm, 1.0)})
        self._optimizer.zero_grad()
        return metrics, non_finite

    def _counts(self, minibatch: Sequence[Microbatch]) -> MinibatchCounts:
        own = [
            float(sum(int(batch.mask.sum()) for batch in minibatch)),
            float(sum(batch.num_sequences for batch in minibatch)),
        ]
        num_tokens, num_sequences = sum_numbers(own, self._mesh, self._device)
        return MinibatchCounts(max(1.0, num_tokens), max(1.0, num_sequences))

    def _mismatch(self, batch: Microbatch, proximal_logprobs: Tensor | None) -> StepMetrics:
        if proximal_logprobs is None:
            return StepMetrics()
        floor, cap = self._algorithm.correction_band
        return mismatch_metrics(
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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The microbatch's share of the minibatch's loss, and its diagnostics.

        `start_logprobs [N]` are those of the weights at the start of the step.
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
            )
        inputs = LossInputs(
            current_logprobs=logprobs,
            proximal_logprobs=proximal,
            behaviour_logprobs=batch.behaviour_logprobs,
            advantages=batch.advantages,
            mask=batch.mask,
            sequence_ids=batch.sequence_ids,
            keep=keep,
            entropies=entropies,
            token_weights=weights,
        )
        return microbatch_loss(inputs, self._loss_options, num_tokens=counts.num_tokens)
