"""Plans a cluster before it is used: how to split its GPUs between engines and learner.

In: a model, GPUs and a workload. Out: step time, throughput, staleness and idle shares of each
split. Called by the commands `simulate` and `plan` and by the benchmarks.

scenario     what a simulated run has
simulator    plays it in virtual time on the real replay state machines
engine       one engine: decode steps, prefill, KV cache, retraction
lengths      response lengths, drawn from (seed, group)
outcome      what a simulated run came to
closed_forms the same figures on paper, and why a simulation differs
cost_model   rates from a model's config.json and the name of a GPU
hardware     GPUs by name, and those of a file
planned_model a model's sizes, dense or a mixture of experts
rates        both sides on other numbers of GPUs
settings     reads a scenario file
from_run     a scenario from the last steps of a run
inputs       a scenario from a file or from a run
recipe       a config for `train` with the split of a plan
sweep        finds the split of a cluster
screens      what the commands print and write
"""

from dapo_async.planner.engine import EngineSpeed
from dapo_async.planner.lengths import Lengths, mixture
from dapo_async.planner.outcome import Outcome, StepRow
from dapo_async.planner.scenario import LearnerSpeed, Outage, Scenario
from dapo_async.planner.simulator import SimulatedRun, simulate

__all__ = [
    "EngineSpeed",
    "LearnerSpeed",
    "Lengths",
    "Outage",
    "Outcome",
    "Scenario",
    "SimulatedRun",
    "StepRow",
    "mixture",
    "simulate",
]
