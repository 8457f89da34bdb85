"""Completions for tests."""

import numpy as np

from dapo_async.types import Completion, FinishReason


def completion(num_tokens: int, finish_reason: FinishReason = FinishReason.STOP) -> Completion:
    """A completion of `num_tokens` zeros."""
    return Completion(
        token_ids=np.zeros(num_tokens, np.int32),
        behaviour_logprobs=np.zeros(num_tokens, np.float32),
        weight_versions=np.zeros(num_tokens, np.int32),
        prefill_version=0,
        finish_reason=finish_reason,
    )
