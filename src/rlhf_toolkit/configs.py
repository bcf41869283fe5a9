"""Every knob, on a few screens. One YAML file with these sections is one experiment; ``config_loading`` reads it.

Rules about single values and pairs of values are checked when a section is built, before any model is loaded. No module
below the trainers receives a config object: trainers unpack them into plain arguments.
"""

# knob() is dataclasses.field() with a help text, and copies lists and dicts:
# ruff: noqa: RUF009

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from rlhf_toolkit.algorithms.kl_control import ERROR_BOUND
from rlhf_toolkit.errors import ConfigError

# ---- what a knob is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a value must do: in words that follow "must", and as a test."""

    words: str
    holds: Callable[[Any], bool]


ABOVE_0 = Rule("be above 0", lambda value: value > 0)
ABOVE_1 = Rule("be above 1", lambda value: value > 1)
NOT_NEGATIVE = Rule("not be negative", lambda value: value >= 0)
WITHIN_0_AND_1 = Rule("be above 0 and below 1", lambda value: 0 < value < 1)
FROM_0_TO_1 = Rule("be in [0, 1]", lambda value: 0 <= value <= 1)
FROM_0_TO_BELOW_1 = Rule("be in [0, 1)", lambda value: 0 <= value < 1)
ABOVE_0_TO_1 = Rule("be in (0, 1]", lambda value: 0 < value <= 1)
NO_DROPOUT = Rule("be 0: dropout makes the ratio differ from 1 before any update", lambda value: value == 0)


def knob(default: Any, help: str, rule: Rule | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field with a default, one line of help, and what it may be; lists and dicts are copied for each instance."""
    metadata = {"help": help, "rule": rule, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(setting: Field[Any]) -> str:
    """The default of a knob as the end of a message, in YAML's words."""
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    if default == "":
        return "it has no default, so give it a value"
    words = "none" if default is None else str(default).lower() if isinstance(default, bool) else default
    return f"the default is {words}"


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?``, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class Section:
    """The settings under one name of the YAML file. Raises ConfigError where one breaks the rule of its knob."""

    def __post_init__(self) -> None:
        """``PPOConfig`` is the section ``ppo``, and so on."""
        section, hints = type(self).__name__.removesuffix("Config").lower(), get_type_hints(type(self))
        for setting in fields(self):
            optional = NoneType in get_args(hints[setting.name])
            _check(f"{section}.{setting.name}", getattr(self, setting.name), setting, " or none" if optional else "")


def _check(name: str, value: Any, setting: Field[Any], or_none: str) -> None:
    if value is None:
        return
    rule, choices = setting.metadata["rule"], setting.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{name}={value!r}{nearest(value, choices)}; known are {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be a finite number{or_none}; {default_of(setting)}")
    if rule is not None and not rule.holds(value):
        raise ConfigError(f"{name}={value} must {rule.words}{or_none}; {default_of(setting)}")


# ---- the sections ----------------------------------------------------------------------------------------------------

MODES = ("auto", "window", "stream")
KINDS = ("exact", "merged")
DTYPES = ("bfloat16", "float16", "float32")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("k1", "abs", "k2", "k3")
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
"""Those of transformers' ``SchedulerType`` that need nothing but a number of steps."""


@dataclass(frozen=True)
class ModelConfig(Section):
    """The frozen base and the adapters on it."""

    name: str = knob("", "hub name or local folder of a decoder-only model")
    dtype: str = knob("bfloat16", "of the frozen base; adapters and heads are float32", choices=DTYPES)
    attention: str = knob("sdpa", "transformers' attn_implementation: sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = knob(False, "run model code from the hub")
    lora_rank: int = knob(16, "rank of the policy's and the value's adapter", ABOVE_0)
    lora_alpha: int = knob(32, "adapters are scaled by lora_alpha / lora_rank", ABOVE_0)
    lora_dropout: float = knob(0.0, "must be 0: old and new log-probs would differ before any update", NO_DROPOUT)
    rslora: bool = knob(False, "scale by lora_alpha / sqrt(lora_rank) instead")
    target_modules: str | list[str] = knob("all-linear", "layers to adapt: all-linear or a list of name endings")
    exclude_modules: list[str] = knob([], "linear layers to leave alone, by name ending")
    policy_adapter: str | None = knob(None, "LoRA folder (SFT) the policy starts from; a frozen copy is the reference")
    value_head_std: float = knob(0.0, "standard deviation of the value head's start; 0 starts it at zero", NOT_NEGATIVE)
    gradient_checkpointing: bool = knob(False, "recompute layers in backward: less memory, about a third more time")


@dataclass(frozen=True)
class DataConfig(Section):
    """Prompts to train on and to evaluate on."""

    train: str = knob("", "hub dataset name, or a local json, jsonl, csv or parquet file")
    train_split: str = knob("train", "split of the training prompts")
    evaluation: str | None = knob(None, "held-out prompts: hub name or file; none: no evaluation")
    evaluation_split: str = knob("train", "split of the held-out prompts")
    prompt_column: str = knob("prompt", "column of strings or lists of chat messages; other columns go to the reward")
    chat_template: bool = knob(True, "wrap string prompts as one user message in the tokenizer's chat template")
    system_prompt: str | None = knob(None, "system message put before string prompts when a chat template is used")
    max_prompt_tokens: int = knob(512, "longer prompts are dropped and counted", ABOVE_0)

    def __post_init__(self) -> None:
        """A system prompt needs the chat template."""
        super().__post_init__()
        if self.system_prompt is not None and not self.chat_template:
            raise ConfigError(
                "data.system_prompt is set but data.chat_template is false; "
                "set chat_template: true or drop the system prompt"
            )


@dataclass(frozen=True)
class RewardConfig(Section):
    """Where scores come from."""

    function: str = knob("", "path/to/file.py:name or package.module:name of (prompts, responses, **columns) -> scores")
    kwargs: dict[str, Any] = knob({}, "extra keyword arguments for the function")
    missing_eos_penalty: float = knob(0.0, "subtracted from the score of a response that was cut off", NOT_NEGATIVE)


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How responses are sampled."""

    prompts_per_rollout: int = knob(32, "prompts of one rollout batch, over all ranks", ABOVE_0)
    responses_per_prompt: int = knob(1, "responses sampled for each of them", ABOVE_0)
    max_new_tokens: int = knob(256, "token budget of a response", ABOVE_0)
    temperature: float = knob(1.0, "divides the logits, in sampling and in every log-prob", ABOVE_0)
    top_k: int = knob(0, "sample from the k most likely tokens; 0: all", NOT_NEGATIVE)
    top_p: float = knob(1.0, "sample from the smallest set of tokens with this probability; 1: all", ABOVE_0_TO_1)
    stop_strings: list[str] = knob([], "texts that end a response, beside the model's stop tokens")
    mode: str = knob(
        "auto", "window: gather the base once; stream: decode through its shards; auto: what fits", choices=MODES
    )
    slots: int | None = knob(None, "sequences decoded at once on each rank; none: as many as memory holds", ABOVE_0)
    weights: str = knob(
        "exact", "in decoding: exact, or merged (faster, adapters rounded into the base)", choices=KINDS
    )

    def __post_init__(self) -> None:
        """Merged weights need the whole base."""
        super().__post_init__()
        if self.mode == "stream" and self.weights != "exact":
            raise ConfigError(
                f"rollout.weights={self.weights} needs the whole base, but rollout.mode is stream; "
                "use weights: exact, or mode: window"
            )

    @property
    def sequences(self) -> int:
        """B, the responses of one rollout over all ranks."""
        return self.prompts_per_rollout * self.responses_per_prompt


@dataclass(frozen=True)
class PPOConfig(Section):
    """The algorithm. Names and defaults follow docs/ppo_details.md."""

    num_rollouts: int = knob(100, "rollout batches in the run", ABOVE_0)
    num_ppo_epochs: int = knob(1, "passes over each rollout", ABOVE_0)
    mini_batches: int = knob(1, "optimizer steps in each pass", ABOVE_0)
    gamma: float = knob(1.0, "discount", FROM_0_TO_1)
    gae_lambda: float = knob(0.95, "GAE's lambda; 1: Monte-Carlo returns", FROM_0_TO_1)
    whiten_advantages: bool = knob(True, "centre and scale advantages over the rollout")
    clip_range_low: float = knob(0.2, "the ratio is clipped below at 1 - this", WITHIN_0_AND_1)
    clip_range_high: float = knob(0.2, "and above at 1 + this; larger than low is DAPO's clip-higher", ABOVE_0)
    dual_clip: float | None = knob(None, "bound of the ratio at negative advantages (verl: 3); none: off", ABOVE_1)
    value_clip_range: float | None = knob(0.2, "bound of a value's move in the clipped loss; none: off", ABOVE_0)
    value_coef: float = knob(1.0, "weight of the value loss", NOT_NEGATIVE)
    entropy_coef: float = knob(0.0, "weight of the entropy bonus", NOT_NEGATIVE)
    loss_aggregation: str = knob("token-mean", "how tokens become one loss", choices=AGGREGATIONS)
    kl_in: str = knob("reward", "reward: shapes each token's; loss: a term of the loss", choices=("reward", "loss"))
    kl_estimator: str = knob("k1", "of the KL to the reference, token by token", choices=ESTIMATORS)
    kl_coef: float = knob(0.05, "weight of the KL to the reference", NOT_NEGATIVE)
    kl_target: float | None = knob(
        None, "adapt kl_coef towards this KL per token, averaged over responses as in verl; none: fixed", ABOVE_0
    )
    kl_horizon: int = knob(10000, "responses over which the adaptive coefficient moves", ABOVE_0)
    value_warmup_rollouts: int = knob(0, "rollouts at the start that train the value only", NOT_NEGATIVE)
    truncated: str = knob(
        "terminal",
        "responses cut by the budget: terminal (as if ended), bootstrap (value of the cut state) or mask",
        choices=("terminal", "bootstrap", "mask"),
    )
    first_ratio_tolerance: float | None = knob(
        None, "largest |log ratio| before an update; none: 1e-4 in float32, 0.1 below", ABOVE_0
    )

    def __post_init__(self) -> None:
        """The controller of the coefficient sits where rewards are shaped."""
        super().__post_init__()
        if self.kl_target is not None and self.kl_in != "reward":
            raise ConfigError("ppo.kl_target adapts the penalty in the reward; set kl_in: reward or drop kl_target")


@dataclass(frozen=True)
class UpdateConfig(Section):
    """The optimizer: one AdamW, three named parameter groups, one schedule."""

    micro_batch_tokens: int = knob(4096, "a role's tokens of one forward pass: those it computes, padding too", ABOVE_0)
    packing: str = knob(
        "auto",
        "sequences end to end, shared prefixes once: on, off (padded rows) or auto (on where the model can)",
        choices=("auto", "on", "off"),
    )
    policy_lr: float = knob(1e-4, "rate of the policy's adapter; LoRA wants about 10x full fine-tuning's", NOT_NEGATIVE)
    value_lr: float = knob(1e-4, "learning rate of the value's adapter", NOT_NEGATIVE)
    value_head_lr: float = knob(1e-3, "learning rate of the value head", NOT_NEGATIVE)
    schedule: str = knob("constant", "transformers' scheduler type, of all groups", choices=SCHEDULES)
    warmup_steps: int = knob(0, "optimizer steps of linear warm-up, for schedules that have one", NOT_NEGATIVE)
    max_grad_norm: float = knob(1.0, "the gradient of all groups together is clipped to this norm", ABOVE_0)
    weight_decay: float = knob(0.0, "AdamW's weight decay on adapters", NOT_NEGATIVE)
    adam_beta1: float = knob(0.9, "AdamW", FROM_0_TO_BELOW_1)
    adam_beta2: float = knob(0.95, "AdamW", FROM_0_TO_BELOW_1)
    adam_epsilon: float = knob(1e-5, "AdamW; PyTorch's 1e-8 makes the first PPO updates too bold", ABOVE_0)

    def __post_init__(self) -> None:
        """Warm-up needs a schedule that has one."""
        super().__post_init__()
        if self.warmup_steps and self.schedule == "constant":
            raise ConfigError(
                f"update.warmup_steps={self.warmup_steps} with schedule constant has no effect; "
                "use constant_with_warmup"
            )


@dataclass(frozen=True)
class RunConfig(Section):
    """Where results go, how often, and who watches."""

    output_dir: str = knob("runs/ppo", "run folder: adapters, checkpoints, JSONL, summary")
    seed: int = knob(0, "every random stream derives from it")
    save_every: int = knob(0, "rollouts between checkpoints; 0: only the final adapters", NOT_NEGATIVE)
    keep_checkpoints: int = knob(2, "older checkpoints are deleted", ABOVE_0)
    evaluate_every: int = knob(0, "rollouts between evaluations; 0: only those at start and end", NOT_NEGATIVE)
    samples: int = knob(4, "sample responses logged with each rollout", NOT_NEGATIVE)
    wandb: str = knob("offline", "online, offline or off", choices=("online", "offline", "off"))
    wandb_project: str = knob("rlhf_toolkit", "W&B project")
    name: str | None = knob(None, "run name in W&B; none: the output folder's name")


# ---- all of them together --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Rules that tie sections together."""
        self._check_required()
        self._check_batches()
        self._check_value_warmup()
        self._check_kl_horizon()

    def _check_required(self) -> None:
        required = {
            "model.name": self.model.name,
            "data.train": self.data.train,
            "reward.function": self.reward.function,
        }
        for name, value in required.items():
            if not value:
                raise ConfigError(f"{name} is missing; set it in the YAML file or as {name}=... on the command line")

    def _check_batches(self) -> None:
        rows, mini_batches = self.rollout.sequences, self.ppo.mini_batches
        if rows % mini_batches:
            raise ConfigError(
                f"a rollout of {rows} responses does not divide into ppo.mini_batches={mini_batches}; "
                f"try {_divisors_near(rows, mini_batches)}"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.update.micro_batch_tokens < longest:
            raise ConfigError(
                f"update.micro_batch_tokens={self.update.micro_batch_tokens} cannot hold one sequence of {longest} "
                f"tokens (data.max_prompt_tokens + rollout.max_new_tokens); set it to {longest} or more"
            )

    def _check_value_warmup(self) -> None:
        warmup, rollouts = self.ppo.value_warmup_rollouts, self.ppo.num_rollouts
        if warmup and self.update.weight_decay:
            raise ConfigError(
                f"update.weight_decay={self.update.weight_decay} would move the policy during "
                f"ppo.value_warmup_rollouts={warmup}; set one of them to 0"
            )
        if warmup >= rollouts:
            raise ConfigError(
                f"ppo.value_warmup_rollouts={warmup} leaves none of ppo.num_rollouts={rollouts} for the policy; "
                f"set it to {rollouts - 1} or less"
            )

    def _check_kl_horizon(self) -> None:
        """``AdaptiveKL.update`` refuses more responses than this at once; here no rollout is lost."""
        if self.ppo.kl_target is None:
            return
        too_short = ERROR_BOUND * self.rollout.sequences
        if self.ppo.kl_horizon <= too_short:
            raise ConfigError(
                f"ppo.kl_horizon={self.ppo.kl_horizon} is too short for rollouts of {self.rollout.sequences} responses "
                f"under ppo.kl_target; set it to {math.floor(too_short) + 1} or more"
            )

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps for each rollout."""
        return self.ppo.num_ppo_epochs * self.ppo.mini_batches

    @property
    def mini_batch_rows(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.rollout.sequences // self.ppo.mini_batches

    def check_processes(self, processes: int) -> None:
        """Raise ConfigError where sizes do not fit this many ranks."""
        prompts = self.rollout.prompts_per_rollout
        if prompts % processes:
            raise ConfigError(
                f"rollout.prompts_per_rollout={prompts} does not divide among {processes} processes; "
                f"try {_multiples_near(processes, prompts)}"
            )
        if self.mini_batch_rows % processes:
            raise ConfigError(
                f"ppo.mini_batches={self.ppo.mini_batches} makes mini-batches of {self.mini_batch_rows} responses, "
                f"which do not divide among {processes} processes; "
                f"try {_divisors_near(self.rollout.sequences // processes, self.ppo.mini_batches)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as they would stand in YAML."""
        return asdict(self)


def _multiples_near(unit: int, wanted: int) -> str:
    """The multiples of ``unit`` on both sides of ``wanted``, without 0."""
    below = wanted // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def _divisors_near(size: int, wanted: int) -> str:
    """The divisors of ``size`` on both sides of ``wanted``, which is none, or the one there is."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    near = [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, near))
