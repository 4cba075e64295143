"""Everything that can be configured, as frozen dataclasses: at most three levels, at most 150 keys.

The defaults are the vetted setting for one GPU. The string under a field explains it; `docs/configuration.md` is made
from these strings. Keys of an algorithm are in the `Config` of its own file (hybridflow/algorithms).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator

from hybridflow import registry
from hybridflow.config.ranges import (
    BELOW_ONE,
    COUNT,
    FLOAT32,
    NOT_NEGATIVE,
    OPEN_SHARE,
    POSITIVE,
    SHARE,
    TEMPERATURE,
    TEMPERATURE_OR_GREEDY,
    TOP_P,
)

FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or a name that may be one: a leading `~` becomes the home folder when it is read."""
Switch = bool | Literal["auto"]
"""What costs time and saves GPU memory. auto leaves it to the plan (hybridflow/planner); on a CPU it is off."""


Tokens = Annotated[int, COUNT] | Literal["auto"]
"""A number, or auto: the plan takes what is fastest and fits (hybridflow/planner/search.py); on a CPU a fixed number."""
MODEST_TOKENS, MODEST_FROZEN_TOKENS, LOGITS_CHUNK_TOKENS, ENGINE_SHARE = 16384, 32768, 4096, 0.5
"""What auto is where nothing is planned: of models with an optimizer, of frozen ones, of logits, of the GPU for an engine."""


RENAMED = {
    "rollout.memory_fraction": "rollout.gpu_memory_utilization",
    "rollout.max_requests": "rollout.max_num_seqs",
}
"""Keys of the release before, and what they are called now. An old one is taken as the new one, with a warning."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run as a whole."""

    folder: FilePath = "outputs/run"
    """Where checkpoints, metrics, samples and the resolved configuration go."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Every random number of the run is a function of this."""
    total_steps: Annotated[int, COUNT] | None = None
    """Steps to train for; null means `total_epochs` passes over the data."""
    total_epochs: Annotated[int, COUNT] = 1
    """Passes over the training data, where `total_steps` is null."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What ranks compute on; auto takes CUDA where it is available."""
    ray_address: str | None = None
    """Cluster to join; null starts one on this machine, or joins the one that `ray job submit` runs in."""
    max_skipped_updates: Annotated[int, COUNT] | None = 5
    """So many updates of a model in a row that were skipped, since gradients were not finite, end the run; null: none do."""
    timeout_s: Annotated[float, POSITIVE] = 1800.0
    """A call on a group that takes longer ends the run with the names of the ranks that are stuck, and what they do."""

    @property
    def peer_timeout_s(self) -> float:
        """For waits of ranks on each other. Longer than those of the controller: a rank that notices one blames whoever waits.
        It only counts where the controller has gone without its ranks."""
        return 2 * self.timeout_s + 600.0


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How far generation may run ahead of training."""

    max_staleness: Annotated[int, NOT_NEGATIVE] = 0
    """Most updates of the policy between the sampling of a token and its learning. 0: a step generates all of its rows, then
    learns from them. From 1 on, generation goes on with rows of later steps: on a pool of its own while training runs, on a
    shared pool until as many prompts as a step takes are complete; longer responses continue under newer weights."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Which algorithm, with its own options. `algorithm: grpo` is short for `algorithm: {name: grpo}`."""

    name: str = "ppo"
    """From the table in registry.py, or `my_package.module:Class`, or `path/to/file.py:Class`."""
    options: object = None
    """The algorithm's own `Config`, built from the other keys of this section."""

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """The roles with an optimizer, as the algorithm's class says."""
        algorithm = registry.load(self.name, registry.ALGORITHMS, key="algorithm.name")
        roles: tuple[str, ...] = algorithm.trained_roles  # type: ignore[attr-defined]
        return roles


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy, and what holds for every model of the run."""

    path: FilePath = ""
    """Local folder or hub name of a causal language model; actor, reference and rollout start from it."""
    tokenizer: FilePath | None = None
    """Folder or hub name of the tokenizer; null means the model's."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of matrix products in training; auto is bfloat16 on CUDA and float32 on CPU. Master weights are always float32."""
    attention: Literal["auto", "flash_attn", "torch"] = "auto"
    """Packed attention; auto takes flash-attn (release 2, 3 or 4) where it is installed and the device is CUDA."""
    float8: bool = False
    """Multiply in float8 (torchao) in the layers of training models: for billions of parameters, on Ada and newer GPUs."""
    gradient_checkpointing: Switch = "auto"
    """Recompute activations in the backward pass instead of keeping them; auto for each model whose activations do not fit."""
    compile: Switch = "auto"
    """torch.compile the layers of training models; auto does so on CUDA where a run gains twice the minute that it takes."""
    logits_chunk_tokens: Tokens = "auto"
    """Tokens whose logits exist at once in the output layer; auto is 4096, or fewer where memory is short."""
    sequence_parallel: Annotated[int, COUNT] = 1
    """Ranks that share the tokens of a row (Ulysses)."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Rank of LoRA adapters on actor and critic; 0 trains all weights."""
    lora_alpha: Annotated[float, POSITIVE] = 32.0
    """LoRA scale: the update is multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers, each a torch.nn.Linear, that get adapters; all-linear: all but the output layer, which cannot."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts and their lengths."""

    train_files: tuple[FilePath, ...] = ()
    """Parquet files of training prompts."""
    train_weights: tuple[Annotated[float, POSITIVE], ...] = ()
    """Share of each file in a step's prompts; empty means by number of rows."""
    validation_files: tuple[FilePath, ...] = ()
    """Parquet files of validation prompts; empty means no validation."""
    held_out_files: tuple[FilePath, ...] = ()
    """Parquet files like `train_files` of an algorithm that learns from responses or preferences: measured with each
    validation, never learned from."""
    prompts_per_step: Annotated[int, COUNT] = 64
    """Prompts drawn for each step: the train batch, counted in prompts."""
    max_prompt_tokens: Annotated[int, COUNT] = 512
    """Longer prompts are treated as `overlong_prompts` says."""
    max_response_tokens: Annotated[int, COUNT] = 512
    """Responses end here, finished or not."""
    overlong_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """Prompts over `max_prompt_tokens` are left out, lose their beginning, or stop the run."""
    shuffle: bool = True
    """Draw prompts in random order, new in each epoch; else in file order."""
    curriculum: str | None = None
    """Of prompts: a column of numbers by which each epoch goes from low to high, or `success_rate`, from prompts that this run
    has answered well to those that it has not; null for the order of `shuffle`, which also decides between equals."""
    chat_template_options: Mapping[str, object] = field(default_factory=dict)
    """Variables of the chat template, for example `{enable_thinking: false}`; a row's column `chat_template_kwargs` goes before
    them."""
    apply_chat_template: Literal["auto", "always", "never"] = "auto"
    """Wrap string prompts in the tokenizer's chat template; auto does so where it has one. Message lists always are."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One trained model: actor or critic."""

    path: FilePath | None = None
    """Folder or hub name to start from; null means `model.path`."""
    learning_rate: Annotated[float, NOT_NEGATIVE] = 1e-6
    """Peak rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate after warm-up, over the steps of the run."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps of the run (not updates) over which the rate rises from zero."""
    warmup_ratio: Annotated[float, SHARE] = 0.0
    """The same as a share of the run's steps, rounded down, where `warmup_steps` is 0."""
    min_learning_rate_ratio: Annotated[float, SHARE] = 0.0
    """Where linear and cosine schedules end, as a share of the peak."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """Decoupled, on matrices only."""
    adam_betas: tuple[Annotated[float, BELOW_ONE], Annotated[float, BELOW_ONE]] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """Gradients are scaled down to this global L2 norm."""
    tokens_per_microbatch: Tokens = "auto"
    """Prompt and response tokens that go through a rank's model at once in an update; a longer row goes alone."""
    forward_tokens_per_microbatch: Tokens = "auto"
    """The same in passes without gradients; auto is `tokens_per_microbatch` where that is a number."""
    offload_parameters: Switch = "auto"
    """Keep weights in CPU memory while the role is idle; auto where they do not fit."""
    shard_gradients: Switch = "auto"
    """Sum gradients over ranks in every microbatch and keep this rank's share, in place of whole gradients until the last one:
    less memory, more communication. Auto does so where memory requires it."""
    offload_optimizer: Switch = "auto"
    """Keep optimizer state in CPU memory while the role does not learn; auto where it does not fit."""

    @property
    def update_tokens(self) -> int:
        """`tokens_per_microbatch`; where nothing is planned a modest number in place of auto."""
        return MODEST_TOKENS if self.tokens_per_microbatch == "auto" else self.tokens_per_microbatch

    @property
    def forward_tokens(self) -> int:
        """`forward_tokens_per_microbatch` likewise."""
        return self.update_tokens if self.forward_tokens_per_microbatch == "auto" else self.forward_tokens_per_microbatch


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen reference policy."""

    path: FilePath | None = None
    """Folder or hub name; null means `model.path`."""
    tokens_per_microbatch: Tokens = "auto"
    """Tokens that go through a rank's model at once."""
    offload_parameters: Switch = "auto"
    """Keep weights in CPU memory while the role is idle; auto where they do not fit."""

    @property
    def forward_tokens(self) -> int:
        """`tokens_per_microbatch`; where nothing is planned a modest number in place of auto."""
        return MODEST_FROZEN_TOKENS if self.tokens_per_microbatch == "auto" else self.tokens_per_microbatch


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(TrainingConfig):
    """The reward model: what `algorithm: reward_model` trains, and what scores responses where `path` is set."""

    learning_rate: Annotated[float, NOT_NEGATIVE] = 1e-5
    """Peak rate of AdamW, where it is trained."""
    weight: Annotated[float, FLOAT32] = 1.0
    """Of its score in the reward, beside what the rules of `reward` give; reward.name=none has no rules."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Generation during training."""

    engine: str = "vllm"
    """torch, vllm, sglang, or `my_package.module:Class`, or `path/to/file.py:Class`."""
    temperature: Annotated[float, TEMPERATURE] = 1.0
    """Divides the logits, in generation and in training."""
    top_p: Annotated[float, TOP_P] = 1.0
    """Smallest set of tokens whose probabilities reach this sum. Training's log-probabilities are of all tokens, so with vLLM
    this and the next two need temperature 1 and `engine_options: {logprobs_mode: raw_logprobs}`."""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """The most probable tokens kept; 0 keeps all."""
    min_p: Annotated[float, BELOW_ONE] = 0.0
    """Tokens less probable than this times the most probable are dropped."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    stop_token_ids: tuple[Annotated[int, NOT_NEGATIVE], ...] = ()
    """Tokens that end a response, beside the end of sequence."""
    ignore_eos: bool = False
    """In training, generate to the length limit always; for benchmarks."""
    seed_requests: bool = True
    """Every response has a seed of its own: it depends on nothing that is generated beside it, and runs repeat. Without, vLLM
    and SGLang draw all from one generator, which is faster."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the engine's weights; auto is bfloat16 on CUDA and float32 on CPU."""
    tensor_parallel: Annotated[int, COUNT] = 1
    """Ranks that share one engine."""
    max_model_tokens: Annotated[int, COUNT] | None = None
    """Most tokens of a prompt with its response; null means `data.max_prompt_tokens` plus `data.max_response_tokens`. Larger
    where an algorithm makes prompts from responses."""
    max_num_seqs: Annotated[int, COUNT] = 1024
    """Responses generated at once by one engine."""
    gpu_memory_utilization: Annotated[float, OPEN_SHARE] | Literal["auto"] = "auto"
    """Share of the GPU for the engine's weights and cache; auto is what the rows of a step need beside the models that share
    the GPU, or nearly all of a GPU that the engine has to itself."""
    cpu_cache_gib: Annotated[float, POSITIVE] = 1.0
    """Key-value cache of vLLM on CPU."""
    enforce_eager: bool = False
    """No CUDA graphs: starts faster, generates slower."""
    sleep: Switch = "auto"
    """Free the engine's memory (cache and, on CUDA, weights) while training. Costs a second or two per step; auto where models
    do not fit beside the engine."""
    verify_weights: bool = True
    """After each sync, compare checksums of the trainer's and the engine's weights."""
    sync_bucket_mib: Annotated[int, COUNT] = 512
    """Weights travel to the engine in flat buckets of this size."""
    engine_options: Mapping[str, object] = field(default_factory=dict)
    """Passed through to the engine's own constructor: its arguments that have no key of ours."""

    def dtype_on(self, device_type: str) -> Literal["bfloat16", "float32"]:
        """`dtype` with `auto` resolved for `cuda` or `cpu`."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device_type == "cuda" else "float32"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Generation on the validation files, with its own sampling."""

    before_training: bool = True
    """Validate before the first step."""
    every_steps: Annotated[int, NOT_NEGATIVE] = 10
    """Validate after each so many steps, and after the last; 0 never."""
    temperature: Annotated[float, TEMPERATURE_OR_GREEDY] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, TOP_P] = 1.0
    """As in `rollout`."""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """As in `rollout`."""
    responses_per_prompt: Annotated[int, COUNT] = 1
    """Responses to each prompt; their mean reward counts."""
    correct_reward: float = 1.0
    """A response with at least this reward counts as correct in accuracy, pass@k and majority@k."""
    max_prompts: Annotated[int, COUNT] | None = None
    """Only the first so many validation prompts; null means all."""
    num_samples_logged: Annotated[int, NOT_NEGATIVE] = 3
    """Prompts and responses written to the trackers and to samples.jsonl."""
    concurrent: bool = False
    """Validate beside training, by engines on the pool that `placement.roles.validation` names. What is found is logged
    under the step whose weights were used."""


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One of several rewards, whose weighted sum is the reward."""

    name: str = "by_data_source"
    """As `reward.name`."""
    path: FilePath | None = None
    """As `reward.path`."""
    function: str = "compute_score"
    """As `reward.function`."""
    options: Mapping[str, object] = field(default_factory=dict)
    """As `reward.options`."""
    weight: float = 1.0
    """Its factor in the sum; 0 measures without rewarding."""
    data_sources: tuple[str, ...] = ()
    """Scores rows of these alone, where it names any; `*` stands for any text, as in `my_data/*`."""
    label: str | None = None
    """What its metrics are called: `reward/LABEL` is its mean. Null means its name."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How responses are scored."""

    name: str = "by_data_source"
    """Rule from the table in registry.py, or `my_package.module:function`. Ignored where `path` is set."""
    path: FilePath | None = None
    """Python file with a reward function of your own."""
    function: str = "compute_score"
    """Its name in that file."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments for the function."""
    functions: tuple[RewardTerm, ...] = ()
    """Several rewards in place of one, each a mapping of `name` or `path`, and `function`, `options`, `weight`, `data_sources`,
    `label`: the reward is the weighted sum of those that score the row's data source."""
    num_processes: Annotated[int, COUNT] = 2
    """Processes that score, on each rank of the reward role."""
    timeout_s: Annotated[float, POSITIVE] = 10.0
    """For one sample; a batch function gets this times the number of samples."""
    concurrency: Annotated[int, COUNT] = 32
    """Calls of an `async` function under way at once, in each process."""
    failure_reward: Annotated[float, FLOAT32] = 0.0
    """Given to a sample whose function raised or timed out."""
    max_failed_share: Annotated[float, SHARE] = 0.5
    """A step of which more samples than this share could not be scored ends the run with the cause; 1 lets it go on always."""

    @property
    def terms(self) -> tuple[RewardTerm, ...]:
        """What scores: `functions`, or else the one that the other keys name."""
        one = RewardTerm(name=self.name, path=self.path, function=self.function, options=self.options)
        return self.functions or (one,)


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Episodes of several turns with an environment or tools; none where neither `path` nor `name` is set."""

    path: FilePath | None = None
    """Python file with an environment of your own: a class with reset and step."""
    class_name: str | None = None
    """Its name in that file; null means the only one."""
    name: str | None = None
    """`my_package.module:Class`, in place of `path`."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments of the class, of which each episode has an object."""
    max_turns: Annotated[int, COUNT] = 10
    """Turns of the policy in an episode. All tokens of an episode behind its prompt, of both sides, are at most
    `data.max_response_tokens`."""
    max_turn_tokens: Annotated[int, COUNT] | None = None
    """Tokens of one turn of the policy; null means as many as the episode has left."""
    rewards: Literal["episode", "turn"] = "episode"
    """Whether an episode has one reward, the sum over its turns, or each turn has its own, at its last token."""
    add_reward: bool | Literal["all"] = False
    """Also score the last message by the reward role, or with `all` everything behind the prompt, and add that."""
    tool_format: str = "auto"
    """How the model writes calls of tools: hermes, llama3 or mistral; auto is found out from its chat template."""
    num_processes: Annotated[int, COUNT] = 1
    """Processes in which environments run, beside each engine; each holds many episodes."""
    timeout_s: Annotated[float, POSITIVE] = 60.0
    """For one call of reset or step. An episode that takes longer fails."""
    failure_reward: float = 0.0
    """Of an episode whose environment raised, timed out or died; its tokens are not learned from."""

    @property
    def is_set(self) -> bool:
        """Whether rows are episodes."""
        return self.path is not None or self.name is not None


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which role runs where."""

    pools: Mapping[str, str] = field(default_factory=lambda: {"main": "1x1", "scoring": "1x1 cpu"})
    """Name -> `nodes x ranks per node`, for example `2x8`. A rank has one GPU (one CPU slot where `run.device` is cpu);
    with ` cpu` behind it, one CPU slot always."""
    roles: Mapping[str, str] = field(default_factory=lambda: {"data": "scoring", "reward": "scoring"})
    """Role -> pool. Roles that are not named go to the first pool."""
    workers: Mapping[str, str] = field(default_factory=dict)
    """Role -> `my_package.module:Class` or `path/to/file.py:Class`, for a role of your own or in place of a built-in one."""
    cpu_slots: Annotated[int, COUNT] | None = None
    """CPU slots of this machine when a cluster is started here; null means its number of cores, at least 4."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: Annotated[int, NOT_NEGATIVE] = 50
    """Save after each so many steps; 0 saves only after the last."""
    keep: Annotated[int, NOT_NEGATIVE] = 2
    """Checkpoints kept, newest first; 0 keeps all."""
    resume: Literal["auto", "never"] | FilePath = "auto"
    """auto continues from the newest checkpoint in the run's folder; a path (a checkpoint, or a run's folder for its newest) is
    where the first start begins, and later ones continue from the newest in the run's folder; never begins anew."""
    save_last: bool = True
    """Save after the last step."""


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where metrics go. `metrics.jsonl` in the run's folder is always written."""

    names: tuple[str, ...] = ("console", "tensorboard")
    """console, tensorboard, wandb, mlflow, `my_package.module:Class`, or `path/to/file.py:Class`."""
    save_rollouts: Literal["all", "none"] | Annotated[int, COUNT] = "all"
    """Rows of each step that are written to `rollouts/STEP.parquet` in the run's folder, texts and numbers; a number is that of
    rows."""
    project: str = "hybridflow"
    """For trackers that group runs."""
    run_name: str | None = None
    """For trackers that name runs; null means the name of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: TrainingConfig = field(default_factory=TrainingConfig)
    critic: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=1e-5))
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    cost_model: ReferenceConfig = field(default_factory=ReferenceConfig)
    teacher: ReferenceConfig = field(default_factory=ReferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: TrackerConfig = field(default_factory=TrackerConfig)

    @property
    def models(self) -> dict[str, TrainingConfig | ReferenceConfig]:
        """The section of each role that has a model of its own."""
        return {
            "actor": self.actor,
            "critic": self.critic,
            "reference": self.reference,
            "reward_model": self.reward_model,
            "cost_model": self.cost_model,
            "teacher": self.teacher,
        }

    @property
    def max_model_tokens(self) -> int:
        """Most tokens of a prompt with its response."""
        if self.rollout.max_model_tokens is not None:
            return self.rollout.max_model_tokens
        return self.data.max_prompt_tokens + self.data.max_response_tokens
