"""dapo_async: an asynchronous off-policy actor–learner trainer for reasoning language models."""
