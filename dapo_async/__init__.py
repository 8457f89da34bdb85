"""dapo_async: an asynchronous off-policy actor–learner trainer for reasoning language models.

    data ──prompt──▶ replay.admit ──credit──▶ rollout worker ──▶ engine
                                                   │ generate: tokens, behaviour logprobs, weight version per token
                                                   ▼
                                              reward.score
                                                   ▼
                        replay.offer ◀── group of G rollouts ──▶ filters: accept | reject(reason)
                             │
                             ▼
                        replay.take ──▶ batching (advantages, packed) ──▶ learner.step ──▶ snapshot
                                                                                              │
         engines ◀── weights, while generating ─────── publish(version + 1) ◀─────────────────┘
         replay  ◀── credits of the trained groups, when every engine serves those weights

The rooms, lowest first; imports go down only:

    L0  config      every knob, one line each          L2  data      problems → prompts, a resumable stream
        types       the currency between rooms             rollout   engine protocol, torch engine, worker
        clock       each actor's time, state by state      learner   packed batches, AdamW, the step
        checkpoints whole folders or none
        custom      own functions, by name
    L1  algorithm   advantages, loss, corrections      L3  weights   versioned publishing, the handshake
        reward      verifiers, overlong, scoring           evaluate  accuracy through an engine; avg@k, pass@k
        model       decoder, Hugging Face in and out       tracking  run directory, timeline, report
        replay      credits, filters, buffer               rerun     the learner alone on recorded batches
        group_files whole groups in one file           L4  runtime   Ray: actors, THE loop, the life of a run
                                                       L5  cli       train, replay, config
"""
