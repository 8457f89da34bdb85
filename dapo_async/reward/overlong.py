"""DAPO's soft overlong punishment: the length of a response comes in, the punishment that is added
to its reward leaves. `score.py` calls it.
"""

from __future__ import annotations


def soft_overlong_punishment(num_tokens: int, *, max_tokens: int, cache_tokens: int) -> float:
    """0 up to `max_tokens − cache_tokens`, then linear down to −1 at `max_tokens`, −1 beyond.

        R_length(y) = 0                                     |y| ≤ L_max − L_cache
                      ((L_max − L_cache) − |y|) / L_cache   L_max − L_cache < |y| ≤ L_max
                      −1                                    |y| > L_max

    All lengths are response tokens. Source: DAPO (2503.14476), equation 13, where L_max is 20,480
    and L_cache 4,096. Raises ValueError unless 0 < cache_tokens ≤ max_tokens.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(
            f"overlong cache ({cache_tokens}) must be between 1 and max_tokens ({max_tokens}); "
            "change reward.overlong_cache_tokens"
        )
    free_tokens = max_tokens - cache_tokens
    return max(-1.0, min(0.0, (free_tokens - num_tokens) / cache_tokens))
