"""Every knob: a tree of frozen dataclasses with a default, bounds and one line of explanation each.

`load.py` builds a `Config` from a YAML file and overrides, `validate.py` has the rules between
knobs, and `explain.py` prints the knobs and writes docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, get_type_hints

SINKS = ("mlflow", "tensorboard", "wandb")
SHARED = 0.5  # of a shared GPU: the share of a learner rank, and that of an engine
REJECTED_BATCHES = 32  # without one accepted group: after them a run ends
DAYS_30 = 30 * 86_400
AUTO_MICROBATCH = 16_384  # tokens, with learner.microbatch_tokens=auto
AUTO_SLOTS = 64  # of an engine with a fixed number of slots, with rollout.num_slots=auto
MAX_RESTARTS = 3  # of one worker's engine; the next fault ends the run
STOP_S = 10.0  # how long each part of a run's end may take: actors, MLflow, Ray
PROCESS = "each one is a process"
LONG = "no model has more positions"


class Limit(NamedTuple):
    """One end of what a number may be, and the reason where it is not obvious."""

    value: float
    why: str = ""


class Bounds(NamedTuple):
    """What a number may be; None: no limit at that end."""

    least: Limit | None
    above: Limit | None  # the value itself is not allowed
    most: Limit | None


class Knob(NamedTuple):
    """One knob as it is listed. `path`: "", or what kind of path it is; `type`: its annotation."""

    name: str  # dotted
    default: Any
    line: str
    path: str
    bounds: Bounds
    type: Any


def knob(
    default: Any,
    line: str,
    *,
    path: str = "",
    least: float | tuple[float, str] | None = None,
    above: float | tuple[float, str] | None = None,
    most: tuple[float, str] | None = None,
) -> Any:
    """A field with its line and bounds, each of which may come with its reason.

    `path` is "", "model", "data" or "mode, data". A path in a file is relative to the file's
    folder, in an override to the current folder.
    """
    bounds = Bounds(_limit(least), _limit(above), _limit(most))
    return field(default=default, metadata={"line": line, "path": path, "bounds": bounds})


def _limit(given: float | tuple[float, str] | None) -> Limit | None:
    if given is None:
        return None
    return Limit(*given) if isinstance(given, tuple) else Limit(given)


def deadline(default: float, line: str) -> Any:
    """A knob for a wait in seconds: every wait ends."""
    return knob(default, line, above=0, most=(DAYS_30, "a longer wait is no deadline"))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelConfig:
    path: str = knob(
        "",
        "base model: a Hugging Face folder (config.json, *.safetensors, tokenizer.json), or "
        "OWNER/NAME[@REVISION] on the hub",
        path="model",
    )
    max_positions: int | None = knob(
        None,
        "positions of the model in place of max_position_embeddings in its config.json, for longer "
        "or shorter sequences; null: those of config.json",
        least=2,
        most=(10_000_000, LONG),
    )
    dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "dtype of the engines and of the learner's activations; master weights are always float32",
    )
    device: Literal["cpu", "cuda"] = knob(
        "cpu",
        "where learner and engines compute; cuda: one GPU per learner rank and "
        "rollout.tensor_parallel GPUs per engine",
    )
    placement: Literal["separate", "shared"] = knob(
        "separate",
        "who has the devices; separate: learner and engines have their own; shared: each rank and "
        "one engine take turns on one device, and who waits has its memory in the host's",
    )
    num_cpus: float = knob(
        1.0,
        "CPUs that Ray reserves for each learner rank, rollout worker and dedicated evaluator; "
        "each of them computes with as many threads",
        least=0,
        most=(10_000, "no machine has more CPUs"),
    )

    @property
    def is_shared(self) -> bool:
        """Whether learner and engines take turns on the same devices."""
        return self.placement == "shared"

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        return self.device

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
        "training problems: [PRESET=]PATH (JSONL, Parquet, a folder or a pattern), "
        "hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT] or hub:PRESET",
        path="data",
    )
    heldout: str = knob(
        "", "held-out problems for evaluation, written like data.train", path="data"
    )
    prompt_key: str | None = knob(
        None,
        "column of the problem, a text or a chat, with dots for nested columns "
        "(prompt.-1.content); null: the column of the preset, or prompt, messages, conversations",
    )
    answer_key: str | None = knob(
        None,
        "column of the gold answer; null: the column of the preset, or answer, "
        "reward_model.ground_truth",
    )
    template: str | None = knob(
        None,
        "prompt template: dapo, boxed, chat, chat+dapo, chat+boxed, or a text with {problem}; "
        "null: the template of the training preset, or only the problem, and within chat for chats "
        "of several turns",
    )
    system: str | None = knob(None, "system text for a chat template; null: no system text")
    contamination: str = knob(
        "warn",
        "what happens to training problems that are also evaluation problems: left out (drop), "
        "counted and trained (warn), or not looked for (off); MODE,SOURCE,... names evaluation "
        "sets besides data.heldout, written like data.train",
        path="mode, data",
    )
    max_prompt_tokens: int = knob(
        2048, "prompts with more tokens are left out and counted", least=1, most=(10_000_000, LONG)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    verifier: str = knob(
        "marker",
        "what judges responses; marker: the answer is the text after the last ####; exact: it is "
        "the whole text; math: it is in an Answer: line or \\boxed{}; or your own "
        "module:function. Add SOURCE=VERIFIER for the rows of one source, as in marker,gsm8k=math",
    )
    overlong_cache_tokens: int | None = knob(
        None,
        "soft overlong punishment of DAPO: it grows over this many tokens at the end of "
        "rollout.max_response_tokens; null: off",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    objective: str = knob(
        "dapo", "policy objective: dapo, gspo, cispo, or another of algorithm/objectives.py"
    )
    clip_low: float = knob(0.2, "lower clip range: ratios below 1 - clip_low are clipped")
    clip_high: float = knob(
        0.28, "upper clip range (Clip-Higher): ratios above 1 + clip_high are clipped"
    )
    dual_clip: float | None = knob(
        None, "maximum loss of a token with A < 0: -dual_clip * A; null: off"
    )
    proximal: Literal["recompute", "current", "interpolate", "behaviour"] = knob(
        "recompute",
        "source of pi_prox: the weights at the start of the step (recompute), pi_theta without "
        "gradient (current), A-3PO (interpolate), or pi_beh as in coupled PPO (behaviour)",
    )
    correction: Literal["truncate", "mask", "m2po", "none"] = knob(
        "truncate",
        "behaviour weights pi_prox / pi_beh outside correction_band: set them to its edge "
        "(truncate), or do not train these tokens (mask); "
        "none: all weights are 1; m2po: all are 1, and the tokens with the largest squared log "
        "ratio are removed until its mean is at most 0.04",
    )
    correction_level: Literal["token", "sequence", "sequence_mean"] | None = knob(
        None,
        "one behaviour weight per token, per sequence (product of the tokens), or per "
        "sequence_mean (geometric mean); null: token, or sequence for gspo",
    )
    correction_band: tuple[float | None, float | None] = knob(
        (None, 2.0), "lower and upper edge of the band, on the ratio itself; null: no edge"
    )
    sequence_band: tuple[float | None, float | None] | None = knob(
        None,
        "besides the correction: do not train sequences whose geometric mean of the ratios "
        "pi_prox / pi_beh is outside [FLOOR, CAP]; null: off",
    )
    loss_mean: Literal["token", "sequence"] = knob(
        "token",
        "mean over all tokens (DAPO), or over the tokens of each response and then over responses "
        "(GRPO)",
    )
    entropy_bonus: float = knob(
        0.0,
        "weight of the entropy bonus: the loss is lower by this times the mean entropy; 0: off, as "
        "in DAPO",
    )
    kl_coef: float = knob(
        0.0,
        "weight of the KL term to the reference policy, the frozen base model (model.path); "
        "0: off, as in DAPO",
        least=0,
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob(
        "k3",
        "estimate of the KL divergence per token, d being log pi_theta - log pi_ref: d (k1), "
        "d * d / 2 (k2), or exp(-d) - 1 + d (k3, as in GRPO)",
    )
    normalize_std: bool = knob(
        True,
        "divide advantages by the standard deviation of the group; false: do not, as in Dr.GRPO",
    )
    overlong_filtering: bool = knob(False, "do not train on truncated rollouts")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    engine: Literal["torch", "sglang"] = knob(
        "torch",
        "what generates: the native engine, which uses the learner's decoder (torch; on CUDA it is "
        "a reference, not fast), or one SGLang server per worker (sglang)",
    )
    num_workers: int = knob(
        1, "number of rollout workers; each has one engine", least=1, most=(10_000, PROCESS)
    )
    tensor_parallel: int = knob(
        1,
        "GPUs that share one SGLang engine's copy of the model",
        least=1,
        most=(1024, "no model has that many attention heads"),
    )
    servers: str = knob(
        "",
        "URLs of running SGLang servers, one per worker, separated by commas; empty: each worker "
        "starts its own",
    )
    server_flags: str = knob(
        "",
        "further flags of the SGLang servers, such as --mem-fraction-static 0.8; they replace "
        "equal flags of the run",
    )
    num_slots: int | Literal["auto"] = knob(
        "auto",
        "number of sequences that one engine generates at the same time; auto: an SGLang engine "
        "finds it while it runs, from its KV memory, queue and speed, and the native engine has 64",
        least=1,
        most=(100_000, "the KV cache of each slot takes memory"),
    )
    max_response_tokens: int = knob(
        256,
        "maximum length of a response; a longer one is truncated",
        least=1,
        most=(10_000_000, LONG),
    )
    temperature: float = knob(
        1.0,
        "sampling temperature; training samples the full distribution (no top-p, no top-k)",
        above=(0, "greedy rollouts have no behaviour logprobs"),
        most=(1000, "the distribution is flat by then"),
    )
    weight_update: Literal["recompute", "keep_kv", "drain"] = knob(
        "recompute",
        "running responses when weights change: compute their keys and values (KV) again "
        "(recompute), keep the KV of the old weights (keep_kv), or finish them first (drain)",
    )

    node_resource: str = knob(
        "",
        "custom resource of the nodes that may take engines on a joined cluster, as in ray start "
        "--resources='{\"rollout\": 1}'; empty: any node",
    )

    @property
    def fixed_slots(self) -> int:
        """The slots of an engine whose number does not change; `auto` stands for 64."""
        return AUTO_SLOTS if self.num_slots == "auto" else self.num_slots

    @property
    def adapts_slots(self) -> bool:
        """Whether each engine finds the number of its slots while it runs."""
        return self.num_slots == "auto" and self.engine == "sglang"

    @property
    def server_urls(self) -> tuple[str, ...]:
        return tuple(url.strip().rstrip("/") for url in self.servers.split(",") if url.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    groups_per_step: int = knob(
        16,
        "groups that one learner step consumes",
        least=1,
        most=(1_000_000, "a batch has to fit into memory"),
    )
    group_size: int = knob(
        16,
        "rollouts per group (G)",
        least=(2, "an advantage compares siblings"),
        most=(100_000, "a group has to fit into the slots of one engine"),
    )
    max_staleness: int = knob(
        2,
        "staleness bound: weights of version v are trained only on tokens of version "
        "v - max_staleness or newer",
        least=0,
        most=(1000, "the credits, (max_staleness + 1) x groups_per_step, have to fit into memory"),
    )
    dynamic_sampling: bool = knob(
        True,
        "reject groups whose rollouts all have the same accuracy, because they give no gradient; "
        "after 32 x groups_per_step rejected groups in a row the run ends",
    )
    filter: str | None = knob(
        None,
        "your own filter, module:function: true keeps a group, false rejects it; it runs after the "
        "other filters; null: off",
    )
    admission: Literal["paced", "eager", "lockstep"] = knob(
        "paced",
        "when groups start: so that a batch is complete about when the learner asks for it "
        "(paced), as soon as a credit is free (eager), or all groups of a step together, so that a "
        "run can be repeated bit for bit (lockstep; it needs max_staleness 0, one worker and the "
        "torch engine)",
    )

    @property
    def max_rejected_in_a_row(self) -> int:
        """The run ends after this many rejected groups in a row: the groups of 32 batches."""
        return REJECTED_BATCHES * self.groups_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    data_parallel: int = knob(
        1,
        "number of copies of the model; each trains on other groups of a batch",
        least=1,
        most=(10_000, PROCESS),
    )
    tensor_parallel: int = knob(
        1,
        "ranks that share one copy of the model; there are data_parallel x context_parallel x "
        "tensor_parallel ranks",
        least=1,
        most=(1024, "no model has that many attention heads"),
    )
    context_parallel: int = knob(
        1,
        "ranks that share the tokens of each microbatch (Ulysses), for responses whose activations "
        "do not fit one rank; in attention each has all tokens and a part of the heads",
        least=1,
        most=(1024, "no model has that many attention heads"),
    )
    lr: float = knob(1e-6, "AdamW learning rate after warm-up", least=0)
    warmup_steps: int = knob(10, "steps of linear warm-up", least=0)
    weight_decay: float = knob(0.1, "AdamW weight decay, only for matrices", least=0)
    grad_clip: float = knob(
        1.0, "maximum of the global gradient norm; a larger gradient is scaled down", above=0
    )
    num_minibatches: int = knob(
        1,
        "optimizer updates per step; each trains whole groups as soon as these are finished",
        least=1,
    )
    microbatch_tokens: int | Literal["auto"] = knob(
        "auto",
        "maximum tokens per forward and backward pass, of all context-parallel ranks together; a "
        "longer sequence has its own pass; auto: "
        "16,384, or on a GPU what fits its memory",
        least=1,
    )
    recompute: Literal["auto", "none", "mlp", "all"] = knob(
        "auto",
        "activation checkpointing, less memory but slower: the backward pass computes nothing "
        "again, the MLP of each layer, or all of each layer; auto: the first that fits the memory",
    )
    zero_stage: int | Literal["auto"] = knob(
        "auto",
        "ZeRO stage of several ranks within a minibatch; 3: gather the weights and sum the "
        "gradients in every pass; 2: keep the weights gathered; 1: also sum the gradients only "
        "once; auto: the lowest that fits the memory",
        least=1,
        most=(3, "there are no other stages"),
    )
    reduce_dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "dtype in which the gradients of the layers are summed over the ranks; with "
        "zero_stage=1 it is always float32",
    )
    offload_optimizer: bool = knob(
        False,
        "keep AdamW's moments, the weights at the start of a step and the reference policy in host "
        "memory, and copy them to the GPU in parts; no effect on a CPU",
    )
    kernels: Literal["torch", "head", "all"] = knob(
        "torch",
        "kernels of the learner on a GPU: torch's own; two Triton kernels for the softmax of the "
        "head (head); these, and torch.compile for norms, rotary embeddings and SwiGLU (all); no "
        "effect on a CPU",
    )
    node_resource: str = knob(
        "",
        "custom resource of the nodes that may take learner ranks on a joined cluster, as in ray "
        "start --resources='{\"learner\": 1}'; empty: any node",
    )
    routing_replay: bool = knob(
        False,
        "model with experts: the engines return the experts of every token, and the learner uses "
        "them; its routers then only give the weights",
    )
    profile: bool = knob(
        False, "write a torch profiler trace of steps 3, 4 and 5 of each rank to profile/"
    )

    @property
    def ranks_per_batch(self) -> int:
        """Ranks that work together on each microbatch."""
        return self.context_parallel * self.tensor_parallel

    @property
    def num_ranks(self) -> int:
        return self.data_parallel * self.ranks_per_batch

    @property
    def fixed_microbatch_tokens(self) -> int:
        """`auto` stands for 16,384 where no memory is looked at."""
        return AUTO_MICROBATCH if self.microbatch_tokens == "auto" else self.microbatch_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    transport: Literal["broadcast", "disk"] = knob(
        "broadcast",
        "how weights are sent to the engines: by collective broadcast (gloo or NCCL), or as "
        "safetensors files on disk",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    num_prompts: int = knob(512, "held-out prompts of each evaluation; 0: no evaluation", least=0)
    every_steps: int = knob(
        0,
        "steps between evaluations during training, a multiple of train.checkpoint_every_steps; 0: "
        "evaluate only before and after training",
        least=0,
    )
    k: int = knob(
        1,
        "responses per held-out prompt; the accuracy is avg@k. DAPO reports avg@32",
        least=1,
        most=(10_000, "an evaluation keeps all its responses in memory"),
    )
    temperature: float = knob(
        0.0,
        "sampling temperature of every evaluation; 0: greedy. DAPO: 1",
        least=0,
        most=(100, "a higher one draws tokens at random"),
    )
    top_p: float = knob(
        1.0,
        "only the likeliest tokens that hold this share of the probability are drawn; 1: all. "
        "DAPO: 0.7",
        above=0,
        most=(1, "it is a share"),
    )
    engine: Literal["snapshot", "dedicated"] = knob(
        "snapshot",
        "where evaluations during training run: in a native engine that uses idle CPU time "
        "(snapshot), or in an engine of the kind of rollout.engine with its own model.num_cpus "
        "CPUs and, with model.device=cuda, its own rollout.tensor_parallel GPUs (dedicated)",
    )

    @property
    def how(self) -> str:
        """The sampling in words: `greedy`, or `avg@32 at temperature 1, top-p 0.7`."""
        if self.temperature == 0:
            return "greedy"
        truncated = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        return f"avg@{self.k} at temperature {self.temperature:g}{truncated}"

    @property
    def during_training(self) -> bool:
        return self.every_steps > 0 and self.num_prompts > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    num_steps: int = knob(100, "learner steps", least=1)
    max_wall_s: float | None = knob(
        None,
        "the run ends with a checkpoint before its process has run for this many seconds; null: no "
        "limit",
    )
    resume: Literal["never", "auto"] = knob(
        "never",
        "what a start with a run_dir that has been used does. never: it is refused; auto: the run "
        "continues from its newest checkpoint, starts again if there is none, and ends with exit "
        "code 0 if all its steps are trained. For commands that a queue or a cluster repeats",
    )
    checkpoint_every_steps: int = knob(
        20, "steps between checkpoints; one more is written at the end of a run", least=1
    )
    keep_checkpoints: int = knob(
        3,
        "number of newest checkpoints that are kept; the best one by evaluation is kept too",
        least=1,
    )
    checkpoint_mirror: str = knob(
        "",
        "URL of a folder for copies of the checkpoints, such as s3://bucket/runs; a run writes to "
        "URL/NAME, where NAME is the name of its run directory; empty: no copies",
    )
    guards: Literal["warn", "skip", "stop"] = knob(
        "warn",
        "what happens when a batch would do harm (exploding ratio, hardly any effective sample, "
        "all responses cut) or nothing is learned any more (entropy collapse, equal rewards, wrong "
        "weights on an engine): a warning; a warning and no update by that batch; or the end of "
        "the run. A loss that is not finite never makes an update",
    )
    record: bool = knob(
        False,
        "write every batch to recorded/ (for dapo-async rerun) and all its groups to rollouts/",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    sinks: str = knob(
        "mlflow",
        "where metrics go beside the run directory: mlflow, tensorboard, wandb, separated by "
        "commas; none: nowhere else. tensorboard and wandb are extras of the package",
    )
    mlflow: str = knob(
        "local",
        "where MLflow data go: local (SQLite file mlflow.db beside the run directory), or a "
        "tracking URI",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The sinks as a tuple; empty for `none`."""
        given = tuple(name.strip() for name in self.sinks.split(","))
        return () if given == ("none",) else given


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinesConfig:
    start_s: float = deadline(
        120.0, "the start of Ray, actors and SGLang servers, with loading of models"
    )
    work_s: float = deadline(
        1800.0, "one piece of work: a batch, a learner step, an evaluation or a checkpoint"
    )
    answer_s: float = deadline(
        120.0,
        "one publish with its handshake; also the time in which a busy SGLang server must return a "
        "token",
    )
    ping_s: float = deadline(
        30.0, "the answer to a ping; an actor that is silent for longer counts as dead"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    address: str = knob(
        "auto",
        "local: start a new Ray; HOST:PORT: join that cluster; auto: join the cluster of "
        "RAY_ADDRESS or of this machine; if there is none, start a new Ray",
    )
    allow_unauthenticated: bool = knob(
        False,
        "join also a cluster without authentication, with a warning; otherwise it is refused, "
        "because anybody who can reach its ports can run any code there",
    )
    wait_for_nodes_s: float = knob(
        0.0,
        "how long a run waits for nodes that a joined cluster does not have yet, because its "
        "autoscaler or a batch queue adds them; 0: a cluster that is too small is refused at once",
        least=0,
        most=(DAYS_30, "a longer wait is no deadline"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    interface: str = knob(
        "",
        "network interface that learner ranks, engines and weights use on every node, such as "
        "eth1; empty: the one with the node's address in Ray, or loopback for a Ray of the run's "
        "own",
    )
    ports: str = knob(
        "",
        "ports FIRST-LAST that a run may listen on: rendezvous of learner ranks and weights, "
        "SGLang servers; a Ray of the run's own has the first two thirds of them for itself; "
        "empty: any free ports",
    )

    @property
    def port_range(self) -> range:
        """`ports` as a range; range(1), port 0, stands for any free port."""
        first, _, last = (self.ports or "0-0").partition("-")
        return range(int(first), int(last) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    seed: int = knob(0, "seed of data order, sampling noise and handshake probes", least=0)
    run_dir: str = knob(
        "",
        "folder for all files of the run; empty: NAME-TIME in the folder DAPO_ASYNC_RUNS (an "
        "environment variable), or in runs/ if it is not set; a relative path is in "
        "DAPO_ASYNC_RUNS, or in the current folder",
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
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def with_model(self, path: str) -> Config:
        """The same config with another folder of the base model."""
        return replace(self, model=replace(self.model, path=path))

    @property
    def gpus_per_rank(self) -> float:
        """What Ray reserves for one learner rank."""
        if self.model.device == "cpu":
            return 0.0
        return SHARED if self.model.is_shared else 1.0

    @property
    def gpus_per_worker(self) -> float:
        """What Ray reserves for one rollout worker; running servers have their own GPUs."""
        if self.rollout.server_urls or self.model.device == "cpu":
            return 0.0
        return SHARED if self.model.is_shared else float(self.rollout.tensor_parallel)

    @property
    def gpus_of_evaluator(self) -> float:
        """What Ray reserves for a dedicated evaluator: the GPUs of one rollout engine."""
        dedicated = self.model.device == "cuda" and self.evaluation.engine == "dedicated"
        return float(self.rollout.tensor_parallel) if dedicated else 0.0


def knobs(tree: type[Any] = Config, prefix: str = "") -> Iterator[Knob]:
    """Every knob, in file order."""
    types = get_type_hints(tree)
    for item in fields(tree):
        section = item.default_factory
        if section is not MISSING and is_dataclass(section):
            yield from knobs(section, f"{prefix}{item.name}.")
        else:
            about = item.metadata
            yield Knob(
                prefix + item.name,
                item.default,
                about["line"],
                about["path"],
                about["bounds"],
                types[item.name],
            )


def values_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every knob of a config as (dotted name, value), in file order."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from values_of(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value
