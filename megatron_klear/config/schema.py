"""Every setting there is: one section per concern, one docstring per field (it is the field's help text).

Torch is never imported here, so that settings are judged before anything slow or expensive starts.
Paths are taken relative to the directory that a command is started in.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.architecture import Architecture, ModelSettings, PresetName, resolve_architecture
from megatron_klear.config.data import DataSettings
from megatron_klear.config.fields import (
    SECTION,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Prompts,
    Ranks,
    Responses,
    Seconds,
    Sequences,
    Steps,
    StepsOrNever,
    Tokens,
    Unit,
)
from megatron_klear.config.precision import Fp8Settings
from megatron_klear.config.profiling import ProfileSettings
from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
from megatron_klear.config.serving import SchedulingSettings, SglangSettings, WeightSyncSettings
from megatron_klear.config.yarn import YarnSettings

Entry = Literal["sft", "rl"]

__all__ = ["DataSettings", "Entry", "PresetName", "Settings"]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RunSettings:
    """The run as a whole: where it lives and what makes it repeatable."""

    dir: Annotated[str, Field(min_length=1)]
    """Directory of the run; everything it writes is below it. Starting again on the same directory resumes."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of initial weights, data order and sampling."""

    resume: bool = True
    """Continue from the newest good checkpoint in `run.dir`; false refuses a directory that already holds a run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU when there is one."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TokenizerSettings:
    """The tokenizer and the tags that enclose the thinking part of a response."""

    dir: Annotated[str, Field(min_length=1)]
    """Hugging Face tokenizer directory (tokenizer.json, tokenizer_config.json with a chat template)."""

    think_start: Annotated[str, Field(min_length=1)] = "<think>"
    """Text that opens the thinking part."""

    think_end: Annotated[str, Field(min_length=1)] = "</think>"
    """Text that closes the thinking part; the answer is read after it."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ParallelSettings:
    """How the model and its data are spread over ranks; data parallel is what is left of the world size."""

    tp: Ranks = 1
    """Tensor parallel: ranks that share every weight matrix and the vocabulary."""

    pp: Ranks = 1
    """Pipeline parallel: stages of consecutive layers."""

    cp: Ranks = 1
    """Context parallel: ranks that share the tokens of every sequence."""

    sequence_parallel: bool = False
    """Also split norms and dropout over the tensor parallel ranks, by tokens; needs `parallel.tp` above 1."""

    distributed_optimizer: bool = True
    """Spread optimizer states and float32 weights over the data parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    overlap_param_gather: bool = False
    """Gather updated weights while the forward pass runs; needs the distributed optimizer and overlap_grad_reduce."""

    timeout_seconds: Seconds = 1800.0
    """How long a collective may wait for a missing rank before the run fails."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PackingSettings:
    """How sequences are laid side by side in microbatches."""

    token_budget: Tokens = 32768
    """Tokens of one microbatch, padding included, summed over the context parallel ranks."""

    oversize: Literal["refuse", "drop"] = "refuse"
    """What happens to a sequence over `packing.token_budget`: stop before training, or leave it out and count it."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class OptimizerSettings:
    """AdamW and its learning rate schedule; a step here is one optimizer update."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate (the paper: 8e-5 for SFT, 1e-6 for math RL, 5e-7 for code RL)."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine schedule; not used by the constant one (the paper: 4e-5 for SFT)."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""

    warmup_steps: StepsOrNever = 0
    """Optimizer updates over which the learning rate rises linearly from 0."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; never applied to norms and biases."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean."""

    adam_eps: PositiveFloat = 1e-8
    """Added to the denominator of the update."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SftSettings:
    """Supervised fine-tuning on long chains of thought (Eq. 8). Give exactly one of steps and epochs."""

    steps: Annotated[int | None, Unit("steps"), Positive] = None
    """Number of optimizer updates."""

    epochs: Annotated[int | None, Unit("epochs"), Positive] = None
    """Number of passes over the data (the paper: 4), each row exactly so many times. Less than half an update that is
    left at the end joins the update before."""

    batch_sequences: Sequences = 128
    """Sequences per optimizer update, over all ranks; not used with `sft.batch_bins`."""

    batch_bins: Annotated[int | None, Unit("bins"), Positive] = None
    """Full bins of `packing.token_budget` tokens per optimizer update, over all ranks, in place of a fixed number of
    sequences: the whole epoch is packed at once, and its last update has what is left, half to one and a half as many.
    At least 4 per data parallel rank keep ranks within 3 % in FLOPs."""

    normalizer: Literal["sequence", "token"] = "sequence"
    """Divide the summed loss by the batch's sequences (Eq. 8) or by its response tokens."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RlSettings:
    """The reinforcement learning loop; a step is one rollout batch, trained on in several minibatches."""

    steps: Steps = 100
    """Number of rollout batches."""

    prompts_per_step: Prompts = 128
    """Prompts per rollout batch (the paper: 128)."""

    minibatch_prompts: Prompts = 16
    """Most prompts per optimizer update; divides `rl.prompts_per_step` (the paper: 16 for math, 32 for code). What the
    zero-advantage filter leaves of a step is spread evenly over as few updates as hold it."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RolloutSettings:
    """How responses are sampled for training."""

    engine: Literal["local", "sglang"] = "local"
    """What generates: a transformers model inside the training processes, or SGLang's servers (section `sglang`)."""

    responses_per_prompt: Annotated[int, Unit("responses"), Field(ge=2)] = 8
    """Responses of a group (M in the paper: 8); at least 2, since advantages compare within the group."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probabilities are taken at the same temperature by engine and trainer."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass that is sampled from; below 1 the engine and the trainer no longer agree on probabilities."""

    max_response_tokens: Tokens = 30720
    """Longest response; prompt and response together fill the paper's 32K."""

    batch_responses: Responses = 64
    """Responses that one engine generates at a time; each SGLang server is one engine."""

    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response, by their text, besides the tokenizer's own and those of `model.hf_dir` (eos_token_id
    in config.json and generation_config.json)."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class AlgorithmSettings:
    """The policy objective and its weights (Eqs. 4-18)."""

    kind: Literal["gppo", "clip", "cispo"] = "gppo"
    """gppo (Eqs. 11, 17), clip (PPO/GRPO; clip-higher when the epsilons differ, Eqs. 3-7) or cispo (Eq. 15)."""

    epsilon_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped below at 1 - epsilon_low."""

    epsilon_high: PositiveFloat = 0.28
    """The ratio is clipped above at 1 + epsilon_high."""

    beta_low: NonNegativeFloat = 1.0
    """Scale of GPPO's gradient where the ratio is below its lower clip (Eq. 18)."""

    beta_high: NonNegativeFloat = 1.0
    """Scale of GPPO's gradient where the ratio is above its upper clip (Eq. 18)."""

    normalizer: Literal["group", "batch", "sequence"] = "group"
    """Average over each prompt's tokens (Eqs. 7, 11), over the minibatch's tokens, or per response (Eqs. 3, 6)."""

    lm_loss_weight: NonNegativeFloat = 0.1
    """alpha of Eq. 14: weight of the language modelling loss on correct responses; 0 turns it off."""

    filter_zero_advantage: bool = True
    """Leave out groups whose responses all got the same reward (section 5.2.5), of the language modelling loss too."""

    filter_metric: Literal["reward", "correctness"] = "reward"
    """What the filter compares; correctness also drops groups that differ only in partial code scores, a trap that
    `verify --rewards` reports."""

    advantage_std: bool = True
    """Divide a group's advantages by the standard deviation of its rewards (Eq. 4)."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CorrectionSettings:
    """Off-policy correction: tokens are weighted by trainer's old probability / engine's probability at sampling."""

    kind: Literal["none", "token", "sequence", "token_mask", "sequence_mask"] = "none"
    """The ratio of each token or sequence, truncated at `correction.cap`, or (mask) 0 outside [low, high]."""

    cap: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight of the kinds token and sequence."""

    low: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Ratio below which the mask kinds leave a token or sequence out."""

    high: Annotated[float, Field(ge=1)] = 2.0
    """Ratio above which the mask kinds leave a token or sequence out."""

    sequence_ratio: Literal["geometric_mean", "product"] = "geometric_mean"
    """Ratio of a sequence, from those of its tokens; the product spreads ever wider with the length."""

    bound: Annotated[PositiveFloat, Unit("nats")] = 1.0
    """A token differs too much when engine and trainer log-probability are further apart; its share is reported."""

    stop_above_mean: Annotated[float | None, Unit("nats"), Field(gt=0)] = 1.0
    """Stop when the mean absolute difference of a step is above this; null never stops (right engines: below 0.1)."""

    stop_above_share: Annotated[float | None, Unit("fraction of tokens"), Field(gt=0, le=1)] = None
    """Stop when the share of tokens beyond `correction.bound` in a step is above this; null never stops."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CheckpointSettings:
    """Saving, keeping and starting from checkpoints."""

    every_steps: StepsOrNever = 20
    """Steps between checkpoints; 0 saves at the end only."""

    keep: Annotated[int, Unit("checkpoints"), Positive] = 2
    """Newest checkpoints to keep."""

    start_from: str | None = None
    """Run or checkpoint directory whose weights (not optimizer or data position) a fresh run starts from."""

    export_hf: bool = False
    """Also write the final weights as a Hugging Face directory, `hf` below `run.dir`."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EvaluationSettings:
    """Accuracy on `data.heldout`."""

    every_steps: StepsOrNever = 0
    """Steps between evaluations during training; 0 means none."""

    at_end: bool = True
    """Evaluate once more when training is done; without `data.heldout` there is nothing to evaluate."""

    prompts: Prompts = 256
    """Most prompts to use, the first of the files."""

    samples_per_prompt: Responses = 1
    """Responses per prompt; the accuracy is their mean (avg@n)."""

    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy (the paper's benchmarks: 0.6)."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass that is sampled from (the paper's benchmarks: 0.95)."""

    max_response_tokens: Annotated[int | None, Unit("tokens"), Positive] = None
    """Longest response; null takes `rollout.max_response_tokens`."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ObserveSettings:
    """What a person gets to see."""

    tensorboard: bool = True
    """Write metrics for TensorBoard beside metrics.jsonl."""

    report: bool = True
    """Write report.html at the end: curves and responses to read."""

    progress: bool = True
    """Show a live display on a terminal; without a terminal, or when false, one line per step."""

    example_rollouts: Annotated[int, Unit("responses"), NonNegative] = 8
    """Responses to keep for the report, right ones and wrong ones in equal parts."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Settings:
    """All settings of a run; `run.dir` and `tokenizer.dir` are the only ones without a default."""

    run: RunSettings
    tokenizer: TokenizerSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    fp8: Fp8Settings = field(default_factory=Fp8Settings)
    yarn: YarnSettings = field(default_factory=YarnSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    packing: PackingSettings = field(default_factory=PackingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    rl: RlSettings = field(default_factory=RlSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    scheduling: SchedulingSettings = field(default_factory=SchedulingSettings)
    sglang: SglangSettings = field(default_factory=SglangSettings)
    weight_sync: WeightSyncSettings = field(default_factory=WeightSyncSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    code_reward: CodeRewardSettings = field(default_factory=CodeRewardSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    observe: ObserveSettings = field(default_factory=ObserveSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    @property
    def architecture(self) -> Architecture:
        """The model's sizes; reads no file when the settings come from `load_settings`.

        Raises:
            ConfigError: the model section does not determine an architecture.
        """
        return resolve_architecture(self.model)

    @property
    def evaluates(self) -> bool:
        """Whether there are problems to evaluate on and a time to do so."""
        return bool(self.data.heldout) and bool(self.evaluation.every_steps or self.evaluation.at_end)

    def generates(self, entry: str) -> bool:
        """Whether an entry (`sft` or `rl`) draws the responses that it trains on; a replay has them."""
        return entry == "rl" and self.scheduling.replay_from is None

    def needs_engine(self, entry: str) -> bool:
        """Whether an entry (`sft` or `rl`) needs a rollout engine: to generate, or to evaluate."""
        return self.generates(entry) or self.evaluates
