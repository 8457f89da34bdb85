"""The only package that imports Ray: it starts the actors of a run and drives the main loop.

In the order of a run:

local_model   replaces a model of the Hugging Face hub by its local folder
preflight     checks what the run reads, before anything starts
resume        finds the checkpoint of `train --resume`
run           one run from start to end; `status` and `summary` say how it ended
signals       the first and the second SIGINT or SIGTERM
cluster/      which Ray, its start and its end; which actors a run starts
launch        starts the actors
actors/       the Ray actors: replay, learner ranks, rollout workers, evaluator
handles/      typed calls to the actors, each with a deadline
system        the actors as the loop uses them, and background work; notices when one of them fails
supervisor    replaces what dies or hangs; `standstill` finds what lives and gets nowhere
services      the parts of a run: system, metrics, evaluations, checkpoints
loop          the main loop
step_metrics  one row of metrics per step
evaluations   evaluations before, during and after training
checkpointer  checkpoints, written while the steps run
watch         measures the checkpoints of a run from another process, without Ray
shutdown      the end of a run
"""
