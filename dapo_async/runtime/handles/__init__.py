"""Typed handles, through which the driver and the rollout workers call Ray actors.

handle         `Handle` of an actor class, and `remote`, which makes one of its methods
actors         the driver's four handle classes: each method with its deadline
learner_group  all learner ranks as one learner
"""
