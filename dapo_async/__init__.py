"""dapo_async: asynchronous off-policy DAPO training of reasoning language models.

    data ──prompt──▶ replay.admit ──credit──▶ rollout worker ──▶ engine
                                                   │ tokens, logprobs, version per token
                                                   ▼
                                              reward.score
                                                   ▼
                        replay.offer ◀── group of G rollouts ──▶ filters: accept | reject
                             │
                             ▼
                        replay.take ──▶ batching ──▶ learner.step ──▶ snapshot
                                                                        │
         engines ◀── weights, while generating ── publish(version + 1) ◀┘
         replay  ◀── credits of the trained groups, once every engine serves those weights

Packages by level. A package imports only packages of lower levels:

    0  config     a YAML file and overrides → a checked Config
       types      the records that packages exchange
       utils      state clocks, atomic files, user functions by name
    1  algorithm  advantages, loss, corrections (pure torch)
       reward     verifiers, overlong punishment, scoring of a group
       model      the decoder, its parallelism, Hugging Face folders
       replay     credits, deadlines, filters, buffer (pure state machines)
    2  data       problems → a resumable stream of prompts
       rollout    native and SGLang engine, worker
       learner    packed batches, AdamW, the step, its state
       planner    a cluster and a workload → simulated runs, before they are paid for
    3  weights    publishing and the handshake
       evaluate   accuracy, avg@k, pass@k, maj@k through an engine
       tracking   run directory, timeline, pictures, report, MLflow
    4  runtime    Ray: actors, handles, the loop, start and end of a run
    5  cli        the command line

Start reading at `runtime/loop.py`. docs/architecture.md has the guarantees and the glossary.
"""
