"""Every knob, on a few screens. One YAML file with these sections is one experiment.

Rules about single values and pairs of values are checked when a section is built, before any model is loaded. No module below the
trainers receives a config object: trainers unpack them into plain arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from rlhf_toolkit.errors import ConfigError


def knob(default: Any, help: str) -> Any:
    """A field with a default and one line of help; lists and dicts are copied for each instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base and the adapters on it."""

    name: str = knob("", "hub name or local folder of a decoder-only model")
    dtype: str = knob("bfloat16", "dtype of the frozen base: bfloat16, float16 or float32; adapters and heads are float32")
    attention: str = knob("sdpa", "transformers' attn_implementation: sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = knob(False, "run model code from the hub")
    lora_rank: int = knob(16, "rank of the policy's and the value's adapter")
    lora_alpha: int = knob(32, "adapters are scaled by lora_alpha / lora_rank")
    lora_dropout: float = knob(0.0, "must be 0: dropout makes old and new log-probs differ before any update")
    rslora: bool = knob(False, "scale by lora_alpha / sqrt(lora_rank) instead")
    target_modules: str | list[str] = knob("all-linear", "linear layers to adapt: all-linear or a list of name endings")
    exclude_modules: list[str] = knob([], "linear layers to leave alone, by name ending")
    policy_adapter: str | None = knob(None, "LoRA folder (SFT) the policy starts from; a frozen copy of it is the reference")
    value_head_std: float = knob(0.0, "standard deviation of the value head's start; 0 starts it at zero")
    gradient_checkpointing: bool = knob(False, "recompute layers in backward: less memory, about a third more time")

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, ("bfloat16", "float16", "float32"))
        _positive("model", lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)
        if self.lora_dropout != 0:
            raise ConfigError(
                f"model.lora_dropout={self.lora_dropout}: under PPO dropout makes the ratio differ from 1 before any update; set it to 0"
            )


@dataclass(frozen=True)
class DataConfig:
    """Prompts to train on and to evaluate on."""

    train: str = knob("", "hub dataset name, or a local json, jsonl, csv or parquet file")
    train_split: str = knob("train", "split of the training prompts")
    evaluation: str | None = knob(None, "held-out prompts: hub name or file; none: no evaluation")
    evaluation_split: str = knob("train", "split of the held-out prompts")
    prompt_column: str = knob("prompt", "column with a string or a list of chat messages; other columns go to the reward")
    chat_template: bool = knob(True, "wrap string prompts as one user message in the tokenizer's chat template")
    system_prompt: str | None = knob(None, "system message put before string prompts when a chat template is used")
    max_prompt_tokens: int = knob(512, "longer prompts are dropped and counted")

    def __post_init__(self) -> None:
        _positive("data", max_prompt_tokens=self.max_prompt_tokens)
        if self.system_prompt is not None and not self.chat_template:
            raise ConfigError("data.system_prompt is set but data.chat_template is false; set chat_template: true or drop the system prompt")


@dataclass(frozen=True)
class RewardConfig:
    """Where scores come from."""

    function: str = knob("", "path/to/file.py:name or package.module:name of a callable (prompts, responses, **columns) -> scores")
    kwargs: dict[str, Any] = knob({}, "extra keyword arguments for the function")
    missing_eos_penalty: float = knob(0.0, "subtracted from the score of a response that the token budget cut off")

    def __post_init__(self) -> None:
        _not_negative("reward", missing_eos_penalty=self.missing_eos_penalty)


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    prompts_per_rollout: int = knob(32, "prompts of one rollout batch, over all ranks")
    responses_per_prompt: int = knob(1, "responses sampled for each of them")
    max_new_tokens: int = knob(256, "token budget of a response")
    temperature: float = knob(1.0, "divides the logits, in sampling and in every log-prob of policy and reference")
    top_k: int = knob(0, "sample from the k most likely tokens; 0: all")
    top_p: float = knob(1.0, "sample from the smallest set of tokens with this probability; 1: all")
    stop_strings: list[str] = knob([], "texts that end a response, beside the model's stop tokens")

    def __post_init__(self) -> None:
        _positive(
            "rollout",
            prompts_per_rollout=self.prompts_per_rollout,
            responses_per_prompt=self.responses_per_prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )
        _not_negative("rollout", top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p={self.top_p} is not in (0, 1]; 1 samples from all tokens")

    @property
    def sequences(self) -> int:
        """B, the responses of one rollout over all ranks."""
        return self.prompts_per_rollout * self.responses_per_prompt


@dataclass(frozen=True)
class PPOConfig:
    """The algorithm. Names and defaults follow docs/ppo_details.md."""

    num_rollouts: int = knob(100, "rollout batches in the run")
    num_ppo_epochs: int = knob(1, "passes over each rollout")
    mini_batches: int = knob(1, "optimizer steps in each pass")
    gamma: float = knob(1.0, "discount")
    gae_lambda: float = knob(0.95, "GAE's lambda; 1: Monte-Carlo returns")
    whiten_advantages: bool = knob(True, "centre and scale advantages over the rollout")
    clip_range_low: float = knob(0.2, "the ratio is clipped below at 1 - this")
    clip_range_high: float = knob(0.2, "and above at 1 + this; larger than low is DAPO's clip-higher")
    dual_clip: float | None = knob(None, "bound of the ratio where the advantage is negative, > 1 (verl: 3); none: off")
    value_clip_range: float | None = knob(0.2, "values move at most this far from their old ones in the clipped value loss; none: off")
    value_coef: float = knob(1.0, "weight of the value loss")
    entropy_coef: float = knob(0.0, "weight of the entropy bonus")
    loss_aggregation: str = knob("token-mean", "token-mean, seq-mean-token-sum, seq-mean-token-mean or seq-mean-token-sum-norm")
    kl_in: str = knob("reward", "reward: a penalty on each token's reward; loss: a term of the loss")
    kl_estimator: str = knob("k1", "k1, abs, k2 or k3")
    kl_coef: float = knob(0.05, "weight of the KL to the reference")
    kl_target: float | None = knob(None, "adapt kl_coef towards this KL a response; none: fixed")
    kl_horizon: int = knob(10000, "responses over which the adaptive coefficient moves")
    value_warmup_rollouts: int = knob(0, "rollouts at the start that train the value only")
    truncated: str = knob("terminal", "responses cut by the budget: terminal (as if ended), bootstrap (value of the cut state) or mask")
    first_ratio_tolerance: float | None = knob(None, "largest |log ratio| before an update; none: 1e-4 in float32, 0.05 below")

    def __post_init__(self) -> None:
        _positive("ppo", num_rollouts=self.num_rollouts, num_ppo_epochs=self.num_ppo_epochs, mini_batches=self.mini_batches)
        _not_negative(
            "ppo",
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
            value_warmup_rollouts=self.value_warmup_rollouts,
        )
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ppo.{name}={getattr(self, name)} is not in [0, 1]")
        if not 0 < self.clip_range_low < 1 or self.clip_range_high <= 0:
            raise ConfigError(
                f"ppo.clip_range_low={self.clip_range_low}, clip_range_high={self.clip_range_high}: low must be in (0, 1) and high above 0"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"ppo.dual_clip={self.dual_clip} must be above 1 (verl uses 3), or none")
        if self.kl_target is not None and self.kl_in != "reward":
            raise ConfigError("ppo.kl_target adapts the penalty in the reward; set kl_in: reward or drop kl_target")
        _one_of("ppo.kl_in", self.kl_in, ("reward", "loss"))
        _one_of("ppo.kl_estimator", self.kl_estimator, ("k1", "abs", "k2", "k3"))
        _one_of("ppo.truncated", self.truncated, ("terminal", "bootstrap", "mask"))
        _one_of(
            "ppo.loss_aggregation",
            self.loss_aggregation,
            ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
        )


@dataclass(frozen=True)
class UpdateConfig:
    """The optimizer: one AdamW, three named parameter groups, one schedule."""

    micro_batch_tokens: int = knob(4096, "padded tokens of one forward pass, a role's rows times their width")
    policy_lr: float = knob(1e-4, "learning rate of the policy's adapter; LoRA wants about 10x that of full fine-tuning")
    value_lr: float = knob(1e-4, "learning rate of the value's adapter")
    value_head_lr: float = knob(1e-3, "learning rate of the value head")
    schedule: str = knob("constant", "transformers' scheduler type: constant, linear, cosine, constant_with_warmup, ...")
    warmup_steps: int = knob(0, "optimizer steps of linear warm-up, for schedules that have one")
    max_grad_norm: float = knob(1.0, "the gradient of all groups together is clipped to this norm")
    weight_decay: float = knob(0.0, "AdamW's weight decay on adapters")
    adam_beta1: float = knob(0.9, "AdamW")
    adam_beta2: float = knob(0.95, "AdamW")
    adam_epsilon: float = knob(1e-5, "AdamW; larger than PyTorch's 1e-8, which makes the first PPO updates too bold")

    def __post_init__(self) -> None:
        _positive("update", micro_batch_tokens=self.micro_batch_tokens, max_grad_norm=self.max_grad_norm)
        _not_negative(
            "update",
            policy_lr=self.policy_lr,
            value_lr=self.value_lr,
            value_head_lr=self.value_head_lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
        )
        if self.warmup_steps and self.schedule == "constant":
            raise ConfigError(f"update.warmup_steps={self.warmup_steps} with schedule constant has no effect; use constant_with_warmup")


@dataclass(frozen=True)
class RunConfig:
    """Where results go, how often, and who watches."""

    output_dir: str = knob("runs/ppo", "run folder: adapters, checkpoints, JSONL, summary")
    seed: int = knob(0, "every random stream derives from it")
    save_every: int = knob(0, "rollouts between checkpoints; 0: only the final adapters")
    keep_checkpoints: int = knob(2, "older checkpoints are deleted")
    evaluate_every: int = knob(0, "rollouts between evaluations, beside those at start and end; 0: only these")
    samples: int = knob(4, "sample responses logged with each rollout")
    wandb: str = knob("offline", "online, offline or off")
    wandb_project: str = knob("rlhf_toolkit", "W&B project")
    name: str | None = knob(None, "run name in W&B; none: the output folder's name")

    def __post_init__(self) -> None:
        _one_of("run.wandb", self.wandb, ("online", "offline", "off"))
        _positive("run", keep_checkpoints=self.keep_checkpoints)
        _not_negative("run", save_every=self.save_every, evaluate_every=self.evaluate_every, samples=self.samples)


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
        for section, name in ((self.model, "name"), (self.data, "train"), (self.reward, "function")):
            if not getattr(section, name):
                known = {ModelConfig: "model", DataConfig: "data", RewardConfig: "reward"}[type(section)]
                raise ConfigError(f"{known}.{name} is missing; set it in the YAML file or as {known}.{name}=... on the command line")
        if self.rollout.sequences % self.ppo.mini_batches:
            raise ConfigError(
                f"a rollout of {self.rollout.sequences} responses does not divide into ppo.mini_batches={self.ppo.mini_batches}; "
                f"try {_nearest_divisor(self.rollout.sequences, self.ppo.mini_batches)}"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.update.micro_batch_tokens < longest:
            raise ConfigError(
                f"update.micro_batch_tokens={self.update.micro_batch_tokens} cannot hold one sequence of {longest} tokens "
                f"(data.max_prompt_tokens + rollout.max_new_tokens); set it to {longest} or more"
            )
        if self.ppo.value_warmup_rollouts and self.update.weight_decay:
            raise ConfigError(
                f"update.weight_decay={self.update.weight_decay} would move the policy during ppo.value_warmup_rollouts="
                f"{self.ppo.value_warmup_rollouts}; set one of them to 0"
            )
        if self.ppo.value_warmup_rollouts >= self.ppo.num_rollouts:
            raise ConfigError(
                f"ppo.value_warmup_rollouts={self.ppo.value_warmup_rollouts} leaves none of ppo.num_rollouts={self.ppo.num_rollouts} "
                "for the policy"
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
        if self.rollout.prompts_per_rollout < processes:
            raise ConfigError(
                f"{processes} processes but rollout.prompts_per_rollout={self.rollout.prompts_per_rollout}: some would have no prompt; "
                f"set it to {processes} or a multiple"
            )
        for name, size in (("rollout.prompts_per_rollout", self.rollout.prompts_per_rollout), ("a mini-batch", self.mini_batch_rows)):
            if size % processes:
                raise ConfigError(
                    f"{name} of {size} does not divide among {processes} processes; try {size // processes * processes or processes} "
                    f"or {(size // processes + 1) * processes}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as they would stand in YAML."""
        return asdict(self)


def load_experiment(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read a YAML file; ``overrides`` maps dotted names such as ``ppo.kl_coef`` to values that replace it."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the experiment {path}: {error.strerror}; give the path of a YAML file") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not sections such as model: and ppo:")
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        values[section] = {**(values.get(section) or {}), key: value}
    return experiment_from_dict(values)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["ppo.kl_coef=0.1"]`` to ``{"ppo.kl_coef": 0.1}``, values read as YAML."""
    overrides = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or "." not in name:
            raise ConfigError(f"cannot read the override {argument!r}; write section.key=value, such as ppo.kl_coef=0.1")
        overrides[name] = yaml.safe_load(value)
    return overrides


def experiment_from_dict(values: Mapping[str, Any]) -> Experiment:
    """Build the typed experiment; an unknown name is an error that offers the nearest known one."""
    known = {f.name: f for f in fields(Experiment)}
    sections = {}
    types = get_type_hints(Experiment)
    for name, section in values.items():
        if name not in known:
            raise ConfigError(f"unknown section {name!r}{_nearest(name, known)}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"section {name} holds {section!r}, not settings")
        sections[name] = _section(name, types[name], section)
    return Experiment(**sections)


def _section(name: str, kind: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    names = {f"{name}.{key}" for key in hints}
    converted = {}
    for key, value in values.items():
        if key not in hints:
            elsewhere = [f"{s}.{key}" for s, t in get_type_hints(Experiment).items() if key in get_type_hints(t)]
            hint = f"; did you mean {elsewhere[0]}?" if elsewhere else _nearest(f"{name}.{key}", names)
            raise ConfigError(f"unknown setting {name}.{key}{hint}")
        converted[key] = _converted(f"{name}.{key}", value, hints[key])
    return kind(**converted)


def _converted(name: str, value: Any, hint: Any) -> Any:
    """``value`` if it fits ``hint``; a whole number also fits float, and YAML's string '1e-4' is read as the number it is."""
    options = get_args(hint) if get_origin(hint) not in (list, dict) and get_args(hint) else (hint,)
    for option in options:
        plain = get_origin(option) or option
        if plain is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if plain is float and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                continue
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    wanted = " or ".join("none" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{name}={value!r} is not {wanted}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r}{_nearest(value, known) if isinstance(value, str) else ''}; known are {', '.join(known)}")


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{section}.{name}={value} must be above 0")


def _not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"{section}.{name}={value} must not be negative")
