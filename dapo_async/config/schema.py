"""Every knob of the system: one typed tree of frozen dataclasses, one line of explanation each.

`load.py` builds a `Config` from a YAML file and overrides; `validate.py` has the rules between knobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal

SHARED = 0.5  # of one GPU, for the learner and for the engine that share it


def knob(default: Any, line: str, *, path: str = "") -> Any:
    """A field with its line; a `path` (model, data or data list) resolves against the file's folder, in an override against the current folder."""
    return field(default=default, metadata={"line": line, "path": path})


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelConfig:
    path: str = knob(
        "",
        "base model: Hugging Face folder (config.json, *.safetensors, tokenizer.json), or OWNER/NAME[@REVISION] on the hub",
        path="model",
    )
    dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "dtype of the engines and of the learner's activations; master weights are always float32",
    )
    device: Literal["cpu", "cuda", "shared_cuda"] = knob(
        "cpu",
        "where learner and engines compute: cuda: one GPU per learner rank, rollout.tensor_parallel "
        "GPUs per engine | shared_cuda: one rank and one engine share one GPU",
    )

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def probe_tolerance(self) -> float:
        """Largest difference of a probe logprob, in nats, between learner and engine.

        bfloat16 rounds to eight bits, and a probe of random tokens has large logits.
        """
        return 1e-3 if self.dtype == "float32" else 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    train: str = knob(
        "",
        "training problems: [PRESET=]PATH (JSONL, Parquet or folder) | hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT] | hub:PRESET",
        path="data",
    )
    heldout: str = knob(
        "", "held-out problems for evaluation, in the grammar of data.train", path="data"
    )
    prompt_key: str | None = knob(
        None,
        "column of the problem's text, dots within nested ones (prompt.0.content); null: the preset's, or prompt",
    )
    answer_key: str | None = knob(
        None,
        "column of the gold answer, likewise (reward_model.ground_truth); null: the preset's, or answer",
    )
    template: str | None = knob(
        None,
        "prompt template: dapo | boxed | chat | chat+dapo | chat+boxed | text with {problem}; null: the training preset's",
    )
    system: str | None = knob(None, "system text of a chat template; null: none of ours")
    language: Literal["en", "zh"] | None = knob(
        None,
        "keep the training problems of this language only (zh: with Chinese characters); null: all",
    )
    contamination: Literal["drop", "warn", "off"] = knob(
        "warn",
        "training problems that are evaluation problems too are left out | counted | not looked for",
    )
    check_against: str = knob(
        "",
        "evaluation sets of that check beside data.heldout, in the grammar of data.train, with commas between",
        path="data list",
    )
    max_prompt_tokens: int = knob(2048, "longer prompts are left out and counted")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    verifier: str = knob(
        "marker",
        "marker: text after the last #### | exact: the whole text | math: Answer: line or \\boxed{} | "
        "an own module:function; SOURCE=VERIFIER after a comma is for the rows of that source: "
        "marker, gsm8k=math",
    )
    overlong_cache_tokens: int | None = knob(
        None,
        "DAPO's soft overlong punishment over the last so many of max_response_tokens; null: off",
    )
    shuffle: bool = knob(
        False, "control experiment: permute the verdicts within each group; nothing may be learned"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    objective: str = knob(
        "dapo", "policy objective: dapo | gspo | cispo, or another of algorithm/objectives.py"
    )
    clip_low: float = knob(0.2, "lower clip range: ratios below 1 - clip_low are clipped")
    clip_high: float = knob(
        0.28, "upper clip range (Clip-Higher): ratios above 1 + clip_high are clipped"
    )
    dual_clip: float | None = knob(
        None, "for A < 0 the loss per token is capped at -dual_clip * A; null: off"
    )
    proximal: Literal["recompute", "current", "interpolate", "behaviour"] = knob(
        "recompute",
        "source of pi_prox: extra forward | stop-gradient of pi_theta | A-3PO | pi_beh (coupled PPO)",
    )
    correction: Literal["truncate", "mask", "none"] = knob(
        "truncate", "what happens to behaviour weights pi_prox / pi_beh outside the band"
    )
    correction_level: Literal["token", "sequence", "sequence_mean"] | None = knob(
        None, "level of the ratio; null: token, or sequence for gspo"
    )
    correction_cap: float = knob(2.0, "upper edge of the band, on the ratio itself")
    correction_floor: float | None = knob(None, "lower edge of the band; null: off")
    second_moment: float | None = knob(
        None,
        "M2PO: mask the tokens with the largest squared log ratio until the mean is at most this; null: off",
    )
    loss_mean: Literal["token", "sequence"] = knob(
        "token",
        "mean over all tokens (DAPO) | over each response's tokens, then over responses (GRPO)",
    )
    entropy_bonus: float = knob(
        0.0, "the loss falls by so much per nat of mean entropy; 0: off, as DAPO has it"
    )
    normalize_std: bool = knob(
        True, "divide advantages by the group's standard deviation; false: Dr.GRPO"
    )
    overlong_filtering: bool = knob(False, "mask truncated rollouts out of the loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    engine: Literal["torch", "sglang"] = knob(
        "torch", "what generates: the learner's own decoder | an SGLang server per worker"
    )
    num_workers: int = knob(1, "RolloutWorker actors, one engine each")
    num_cpus: float = knob(1.0, "CPUs that Ray reserves per worker, and threads of its engine")
    tensor_parallel: int = knob(1, "GPUs that share one SGLang engine's copy of the model")
    servers: str = knob(
        "",
        "URLs of running SGLang servers, one per worker, with commas between them; empty: each worker starts its own",
    )
    max_restarts: int = knob(
        3,
        "so many times a lost SGLang engine is started anew, per worker; the next loss ends the run",
    )
    server_flags: str = knob(
        "",
        "further flags of the SGLang servers, such as --mem-fraction-static 0.8; they win over the ones set here",
    )
    num_slots: int = knob(64, "sequences that one engine generates at a time")
    max_response_tokens: int = knob(256, "a response is truncated there")
    temperature: float = knob(
        1.0,
        "sampling temperature; training requires > 0 and the full distribution (no top-p, no top-k)",
    )
    weight_update: Literal["recompute", "keep_kv", "drain"] = knob(
        "recompute",
        "running sequences at a weight update: KV computed anew | KV of the old weights kept | finished first",
    )

    @property
    def server_urls(self) -> tuple[str, ...]:
        return tuple(url.strip().rstrip("/") for url in self.servers.split(",") if url.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    groups_per_step: int = knob(16, "groups that one learner step consumes")
    group_size: int = knob(16, "rollouts per group (G)")
    max_staleness: int = knob(
        2, "law 1: a token trained by version v was generated by a version >= v - max_staleness"
    )
    dynamic_sampling: bool = knob(
        True, "reject groups whose accuracies are all equal: they carry no gradient"
    )
    filter: str | None = knob(
        None,
        "own module:function that keeps a group (true) or rejects it (false), after the other filters; null: off",
    )
    lockstep: bool = knob(
        False,
        "admit in waves, each when the one before has ended: a run repeats bit for bit; needs staleness 0 and one worker",
    )
    max_rejected_in_a_row: int = knob(
        512, "this many rejected groups in a row end the run (solved if all were all_correct)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    data_parallel: int = knob(1, "ranks that train on different groups of a batch")
    tensor_parallel: int = knob(
        1, "ranks that share one copy of the model; data_parallel x tensor_parallel ranks in all"
    )
    num_cpus: float = knob(1.0, "CPUs that Ray reserves per learner rank, and its threads")
    lr: float = knob(1e-6, "AdamW learning rate after warm-up")
    warmup_steps: int = knob(10, "steps of linear warm-up")
    weight_decay: float = knob(0.1, "AdamW weight decay on matrices")
    grad_clip: float = knob(1.0, "global gradient norm is clipped to this")
    num_minibatches: int = knob(1, "optimizer updates per step")
    microbatch_tokens: int = knob(
        16_384,
        "most tokens per forward and backward pass; a longer sequence gets a pass of its own",
    )
    recompute: bool = knob(
        False,
        "activation checkpointing: each layer keeps its input only and is computed again backwards",
    )
    offload_optimizer: bool = knob(
        False,
        "AdamW's moments stay in the host's memory and visit the GPU bucket by bucket; on a CPU nothing changes",
    )
    profile: bool = knob(
        False, "write a torch profiler trace of steps 3, 4 and 5 of each rank to profile/"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    transport: Literal["broadcast", "disk"] = knob(
        "broadcast",
        "how weights reach the engines: collective broadcast (gloo or NCCL) or safetensors on disk",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    num_prompts: int = knob(512, "held-out prompts of each evaluation; 0: nothing is evaluated")
    every_steps: int = knob(
        0, "evaluate each so many steps, beside training; 0: only before and after it"
    )
    engine: Literal["snapshot", "dedicated"] = knob(
        "snapshot",
        "where: an own process on idle CPU time | one with reserved rollout.num_cpus and, with "
        "cuda, one GPU",
    )

    @property
    def during_training(self) -> bool:
        return self.every_steps > 0 and self.num_prompts > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    num_steps: int = knob(100, "learner steps")
    max_wall_s: float | None = knob(
        None,
        "end in time, with a checkpoint, before so many seconds have passed since the process began; null: off",
    )
    checkpoint_every_steps: int = knob(
        20, "save a checkpoint each so many steps, beside the steps; one more at every end"
    )
    keep_checkpoints: int = knob(3, "the newest so many are kept, and the best by evaluation")
    record: bool = knob(
        False,
        "write every batch to recorded/, for dapo-async rerun, and all of its groups to rollouts/",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    mlflow: str | None = knob(
        "local",
        "MLflow store: local = SQLite mlflow.db beside the run directory | a tracking URI | null: off",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinesConfig:
    start_s: float = knob(120.0, "the start: Ray, actors, SGLang servers, models loaded")
    work_s: float = knob(
        1800.0, "one piece of work: a batch, a learner step, an evaluation or a checkpoint"
    )
    answer_s: float = knob(
        120.0, "one publish with its handshake, and the silence of a busy SGLang server"
    )
    stop_s: float = knob(
        10.0,
        "the orderly end of the actors before they are killed, and what MLflow still has to take",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    address: str = knob(
        "auto",
        "local: start an own Ray | HOST:PORT: join that cluster | auto: that of RAY_ADDRESS or this machine, else an own one",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    seed: int = knob(0, "seeds data order, sampling noise and the handshake")
    run_dir: str = knob(
        "",
        "where the run writes; empty: runs/NAME-TIME; relative: in the folder DAPO_ASYNC_RUNS or else in the current one",
    )
    model: BaseModelConfig = field(default_factory=BaseModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deadlines: DeadlinesConfig = field(default_factory=DeadlinesConfig)
    ray: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def gpus_per_rank(self) -> float:
        """What Ray reserves for one learner rank."""
        return {"cpu": 0.0, "cuda": 1.0, "shared_cuda": SHARED}[self.model.device]

    @property
    def gpus_per_worker(self) -> float:
        """What Ray reserves for one rollout worker; servers that run already have their own."""
        if self.rollout.server_urls:
            return 0.0
        shares = {"cpu": 0.0, "cuda": float(self.rollout.tensor_parallel), "shared_cuda": SHARED}
        return shares[self.model.device]

    @property
    def gpus_of_evaluator(self) -> float:
        """What Ray reserves for a dedicated evaluator."""
        return float(self.model.device == "cuda" and self.evaluation.engine == "dedicated")


def knobs(tree: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """Every knob as `(dotted name, default, line, kind of path)`, in file order."""
    for item in fields(tree):
        group = item.default_factory
        if group is not MISSING and is_dataclass(group):
            yield from knobs(group, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item.default, item.metadata["line"], item.metadata["path"]
