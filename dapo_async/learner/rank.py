"""One learner rank: whole groups in, one optimizer update per minibatch, sums and counts out.

Called by the learner actor once per step; between two steps the publisher takes snapshots of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from dapo_async.algorithm import (
    policy_loss,
    proximal_from,
    second_moment_mask,
    sequence_mean_weights,
    step_metrics,
)
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner.batching import (
    Microbatch,
    Row,
    filler,
    rows_of,
    split_microbatches,
    split_minibatches,
)
from dapo_async.learner.gradients import clip_gradients, sum_gradients, sum_numbers
from dapo_async.learner.mismatch import mismatch_metrics
from dapo_async.learner.optimizer import BETAS, ShardedAdamW, warmed_up
from dapo_async.learner.state import FrozenState, freeze, load_state
from dapo_async.model import Decoder, Mesh, PackedAttention
from dapo_async.types import Group, StepMetrics


class LearnerRank:
    """Owns the decoder being trained and its optimizer. `version` counts finished steps: the weights after step n are version n + 1."""

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
        """The decoder's parameters are the master weights and stay in float32, whatever it computes in.

        With a `mesh` the decoder is this rank's part of one, and every method is called on all ranks alike.
        """
        precisions = {parameter.dtype for parameter in decoder.parameters()}
        assert precisions == {torch.float32}, f"master weights are float32, these are {precisions}"
        self.decoder, self.version = decoder, version
        decoder.recompute(decoder.config.num_layers if learner.recompute else 0)
        self._algorithm, self._learner, self._seed = algorithm, learner, seed
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
        """Trains on one batch of groups: proximal logprobs, masks from batch statistics, then one update per minibatch.

        With several data-parallel ranks `groups` is this one's share: `positions` in the batch of `num_groups`. The metrics are then those of the
        share; those of the data-parallel ranks add up to the batch's.

        A non-finite loss or gradient ends the step there (`non_finite` 1 in the totals) and its minibatch changes no weight; when it was the first,
        the whole step has changed nothing (`skipped` 1).
        """
        algorithm, learner = self._algorithm, self._learner
        rows = rows_of(
            groups,
            normalize_std=algorithm.normalize_std,
            overlong_filtering=algorithm.overlong_filtering,
            positions=positions,
        )
        num_rows = None if num_groups is None else num_groups * len(groups[0].rollouts)
        minibatches = self._pack(
            split_minibatches(
                rows, learner.num_minibatches, seed=(self._seed, self.version), num_rows=num_rows
            ),
            rows,
        )
        recomputed = self._recompute([batch for minibatch in minibatches for batch in minibatch])
        kept = self._keep_masks(minibatches, recomputed)
        lr = warmed_up(learner.lr, step=self.version, warmup_steps=learner.warmup_steps)
        metrics = rollout_metrics(groups, learner_version=self.version) + self._imbalance(
            minibatches
        )
        non_finite, updates = False, 0
        for minibatch in minibatches:
            update, non_finite = self._update(
                minibatch, recomputed, kept, lr=lr, first=updates == 0
            )
            metrics = metrics + update
            if non_finite:
                break
            updates += 1
        self.version += 1
        flags = {
            "non_finite": float(non_finite),
            "skipped": float(updates == 0),
        }  # the same on all ranks, counted once
        return metrics + StepMetrics(
            maxima={"lr": lr}, totals=flags if self._mesh.dp.rank == 0 else {}
        )

    def freeze(self) -> FrozenState:
        """Copies of this rank's weights and moments in the host's memory, for `save_state`."""
        return freeze(self.decoder, self._optimizer, version=self.version)

    def load(self, folder: Path) -> None:
        """Goes on exactly where the ranks stood whose states `save_state` wrote into `folder`, however many they were."""
        self.version = load_state(self.decoder, self._optimizer, folder)

    def _pack(
        self, minibatches: Sequence[Sequence[Row]], rows: Sequence[Row]
    ) -> list[list[Microbatch]]:
        """Microbatches of each minibatch: as many as the data-parallel rank with the most has, so that whatever passes exchange finds all ranks.

        Whoever has fewer splits finer, for all wait for the fullest one of each pass; where there are not rows enough, fillers follow.
        """
        limit, device = self._learner.microbatch_tokens, self._device
        packed = [split_microbatches(minibatch, limit, device=device) for minibatch in minibatches]
        most = self._mesh.dp.max(
            torch.tensor([len(batches) for batches in packed], device=device)
        ).tolist()
        for number, count in enumerate(most):
            if len(packed[number]) < count:
                finer = split_microbatches(minibatches[number], limit, parts=count, device=device)
                packed[number] = finer if len(finer) <= count else packed[number]
            packed[number] += [
                filler(rows, device=device) for _ in range(count - len(packed[number]))
            ]
        return packed

    def _imbalance(self, minibatches: Sequence[Sequence[Microbatch]]) -> StepMetrics:
        """Tokens that the ranks would have had time for over those that they have: each pass takes as long as the fullest one of it."""
        tokens = torch.tensor(
            [len(batch.token_ids) for minibatch in minibatches for batch in minibatch],
            dtype=torch.float64,
            device=self._device,
        )
        total, fullest = (
            self._mesh.dp.sum(tokens.sum()),
            self._mesh.dp.max(tokens.clone()).sum() * self._mesh.dp.size,
        )
        return StepMetrics(maxima={"imbalance": float(fullest / total)})

    def _forward(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        attention = PackedAttention(batch.lengths, device=self._device)
        of_responses = {
            "predictors": batch.predictors,
            "targets": batch.targets,
            "temperatures": batch.temperatures,
        }
        logprobs, entropies = self.decoder.score(
            batch.token_ids, attention.positions, attention, **of_responses
        )
        return logprobs, entropies

    @record_function("proximal pass")
    @torch.no_grad()
    def _recompute(self, batches: Sequence[Microbatch]) -> dict[int, Tensor]:
        """Proximal logprobs by an extra forward pass, keyed by the microbatch's identity; empty in the modes that have no use for them."""
        if self._algorithm.proximal != "recompute" and self._algorithm.second_moment is None:
            return {}
        return {id(batch): self._forward(batch)[0] for batch in batches}

    def _keep_masks(
        self, minibatches: Sequence[Sequence[Microbatch]], recomputed: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """M2PO's mask over the whole step, before the first minibatch (law 4); empty when it is off."""
        if self._algorithm.second_moment is None:
            return {}
        batches, dp = [batch for minibatch in minibatches for batch in minibatch], self._mesh.dp

        def whole(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat(
                dp.gather(
                    torch.cat(
                        [torch.zeros(0, device=self._device), *(part.float() for part in parts)]
                    )
                )
            )

        keep = second_moment_mask(
            whole([recomputed[id(batch)] for batch in batches]),
            behaviour_logprobs=whole([batch.behaviour_logprobs for batch in batches]),
            advantages=whole([batch.advantages for batch in batches]),
            mask=whole([batch.mask for batch in batches]) > 0,
            threshold=self._algorithm.second_moment,
        )
        counts = [len(batch.targets) for batch in batches]
        before = sum(
            len(part)
            for part in dp.gather(torch.zeros(sum(counts), device=self._device))[: dp.rank]
        )
        parts = keep[before : before + sum(counts)].split(counts) if counts else ()
        return {id(batch): part for batch, part in zip(batches, parts, strict=True)}

    @record_function("minibatch")
    def _update(
        self,
        minibatch: Sequence[Microbatch],
        recomputed: dict[int, Tensor],
        kept: dict[int, Tensor],
        *,
        lr: float,
        first: bool,
    ) -> tuple[StepMetrics, bool]:
        """Accumulates the gradient of every microbatch over the minibatch's token count, then one optimizer step, or none if not finite."""
        counts = [
            float(sum(int(batch.mask.sum()) for batch in minibatch)),
            float(sum(batch.num_sequences for batch in minibatch)),
        ]
        num_tokens, num_sequences = (
            max(1.0, count) for count in sum_numbers(counts, self._mesh, self._device)
        )
        metrics = StepMetrics()
        total_loss = 0.0
        for batch in minibatch:
            logprobs, entropies = self._forward(batch)
            loss, diagnostics = self._loss(
                batch,
                logprobs,
                entropies,
                recomputed.get(id(batch)),
                kept.get(id(batch)),
                num_tokens,
                num_sequences,
            )
            loss.backward()
            total_loss += float(loss.detach())
            metrics = (
                metrics
                + step_metrics(diagnostics)
                + token_metrics(
                    batch, logprobs.detach(), entropies.detach(), learner_version=self.version
                )
            )
            metrics = metrics + self._mismatch(
                batch, recomputed.get(id(batch), logprobs.detach() if first else None)
            )
        sum_gradients(self.decoder, self._mesh)
        norm = clip_gradients(self.decoder, self._learner.grad_clip, self._mesh)
        (total_loss,) = sum_numbers([total_loss], self._mesh, self._device)
        skipped = not (math.isfinite(norm) and math.isfinite(total_loss))
        if not skipped:
            self._optimizer.step(lr=lr)
            metrics = metrics + StepMetrics(sums={"grad_norm": (norm, 1.0)})
        self._optimizer.zero_grad()
        return metrics, skipped

    def _mismatch(self, batch: Microbatch, proximal_logprobs: Tensor | None) -> StepMetrics:
        """Of the weights at the start of the step, which only their own forward pass tells of: None after the first update of a step without one."""
        if proximal_logprobs is None:
            return StepMetrics()
        algorithm = self._algorithm
        return mismatch_metrics(
            batch,
            proximal_logprobs,
            learner_version=self.version,
            cap=algorithm.correction_cap,
            floor=algorithm.correction_floor,
        )

    def _loss(
        self,
        batch: Microbatch,
        logprobs: Tensor,
        entropies: Tensor,
        recomputed: Tensor | None,
        keep: Tensor | None,
        num_tokens: float,
        num_sequences: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        algorithm = self._algorithm
        proximal = proximal_from(
            algorithm.proximal,
            current_logprobs=logprobs,
            behaviour_logprobs=batch.behaviour_logprobs,
            recomputed_logprobs=recomputed,
            learner_version=self.version,
            behaviour_versions=batch.behaviour_versions,
        )
        weights = None
        if algorithm.loss_mean == "sequence":
            weights = sequence_mean_weights(
                batch.mask,
                sequence_ids=batch.sequence_ids,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
            )
        return policy_loss(
            logprobs,
            proximal_logprobs=proximal,
            behaviour_logprobs=batch.behaviour_logprobs,
            advantages=batch.advantages,
            mask=batch.mask,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            objective=algorithm.objective,
            dual_clip=algorithm.dual_clip,
            correction=algorithm.correction,
            correction_level=algorithm.correction_level,
            correction_cap=algorithm.correction_cap,
            correction_floor=algorithm.correction_floor,
            num_tokens=num_tokens,
            sequence_ids=batch.sequence_ids,
            keep=keep,
            entropies=entropies,
            entropy_bonus=algorithm.entropy_bonus,
            token_weights=weights,
        )


@torch.no_grad()
def token_metrics(
    batch: Microbatch, logprobs: Tensor, entropies: Tensor, *, learner_version: int
) -> StepMetrics:
    """Entropy (nats), probability of the chosen tokens and staleness (versions) over the tokens in the loss."""
    mask, count = batch.mask, float(batch.mask.sum())
    staleness = (learner_version - batch.behaviour_versions)[mask]
    sums = {
        "entropy": (float(entropies[mask].sum()), count),
        "probability": (float(logprobs[mask].exp().sum()), count),
        "staleness": (float(staleness.sum()), count),
    }
    return StepMetrics(sums=sums, maxima={"staleness_max": float(staleness.max())} if count else {})


def rollout_metrics(groups: Sequence[Group], *, learner_version: int) -> StepMetrics:
    """Per-rollout means: reward, accuracy, response length (tokens), shares truncated and generated under more than one weight version."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = float(len(rollouts))
    sums = {
        "reward": sum(rollout.reward for rollout in rollouts),
        "accuracy": sum(rollout.accuracy for rollout in rollouts),
        "response_tokens": sum(rollout.num_tokens for rollout in rollouts),
        "truncated": sum(rollout.truncated for rollout in rollouts),
        "mixed_versions": sum(
            len(set(rollout.completion.weight_versions.tolist())) > 1 for rollout in rollouts
        ),
    }
    oldest = max(learner_version - group.oldest_version for group in groups)
    totals = {
        "groups": float(len(groups)),
        "rollouts": count,
        "tokens": float(sum(rollout.num_tokens for rollout in rollouts)),
    }
    return StepMetrics(
        {name: (float(total), count) for name, total in sums.items()},
        {"group_staleness_max": float(oldest)},
        totals,
    )
