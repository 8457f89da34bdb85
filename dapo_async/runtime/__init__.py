"""The only room that imports Ray (L4): thin actors, the cluster, the life of a run, THE loop.

address         which Ray: an own one or a running cluster
environment     what Ray reads when it is imported; where a run writes
reaper          ends an own Ray whose driver was killed
checkpointer    learner, replay room and driver at one instant, saved beside the steps
resume          where a run goes on
cluster         an own Ray or a running one; what a run would start
inputs          what a run reads, checked before anything starts
replay_actor    owns the prompt cursor, the replay buffer and the payloads
rollout_actor   one engine and its worker
evaluator_actor an engine of its own for evaluations beside training
engine_host     what worker and evaluator share
evaluations     when, where and of which version
learner_actor   one learner rank and the sender's side of a publish; whereabouts: where its step is
remote          calls with a deadline that names who waits for whom
system          all actors of one run, and what watches over them
loop            THE loop
interrupts      SIGINT and SIGTERM, once and twice
tracker         metrics of each step from every side
ending, summary how a run ended, and what it came to
train           the life of a run: start, evaluate, loop, end, summary
"""
