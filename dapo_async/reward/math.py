"""The public name of the mathematical verifier, `dapo_async.reward.math.verify`.

Code within the project imports it from `math_verifier/`.
"""

from dapo_async.reward.math_verifier.verify import verify

__all__ = ["verify"]
