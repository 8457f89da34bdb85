"""Learner layouts of several ranks."""

from __future__ import annotations

RANKS = ("model.num_cpus=0.5", "train.checkpoint_every_steps=2")
