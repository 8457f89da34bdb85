"""The verifier of mathematical answers under its public name; the work is in `math_verifier/`."""

from dapo_async.reward.math_verifier.verify import verify

__all__ = ["verify"]
