"""Every knob, on a few screens. One YAML file with these sections is one experiment (``experiment.Experiment``);
``loading`` reads it.

Rules about single values and pairs of values are checked when a section is built, before any model is loaded. No module
below ``runs`` receives a config object: ``runs`` unpacks them into plain arguments.
"""

# knob() is dataclasses.field() with a help text, and copies lists and dicts:
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_toolkit.algorithms.kl_names import KL_NAMES
from rlhf_toolkit.errors import ConfigError, shortened
from rlhf_toolkit.settings.knobs import (
    ABOVE_0,
    ABOVE_0_TO_1,
    ABOVE_1,
    AT_LEAST_1,
    BIASES,
    FROM_0_TO_1,
    LAYERS,
    NO_DROPOUT,
    NOT_NEGATIVE,
    PENALTY,
    TEMPLATE,
    TOKENS,
    WITHIN_0_AND_1,
    WORDS_TO_AVOID,
    Rule,
    Section,
    knob,
)

MODES = ("auto", "window", "stream")
KINDS = ("exact", "merged")
DTYPES = ("bfloat16", "float16", "float32")
QUANTISATIONS = ("none", "nf4", "int8", "float8")
STARTS = ("kaiming", "gaussian")
CHANGES_THE_BASE = "changes the base's weights, which the reference and every other role share"
OTHER_STARTS = {
    **dict.fromkeys(("pissa", "olora", "corda", "loftq", "lora_ga"), CHANGES_THE_BASE),
    "eva": "reads activations of the whole base before anything is sharded; make that adapter with PEFT, name its "
    "folder in model.policy_adapter, and leave this one out",
    "orthogonal": "gives B A = 0 up to rounding only: the policy would not start as its reference",
}
"""Starts that PEFT knows besides, and why they are refused."""
AUTO = "auto"
VALUE_SITES = ("adapter", "policy_trunk")
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")
EACH_TRACKER = Rule(
    f"name some of {', '.join(TRACKERS)}, each once",
    lambda value: all(each in TRACKERS for each in value) and len({*value}) == len(value),
)
CORRECTIONS = ("none", "token", "sequence", "token_mask", "sequence_mask")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
STREAMING = "read rows while they are tokenised; the source is never stored as a whole"
REVISION = "branch, tag or commit of a model of the hub; none: its main branch"
WHICH_TEMPLATE = "the tokenizer's chat template, or in that of a file of Jinja"
TEMPLATE_VALUES = "values that the chat template reads, such as enable_thinking; a row's own come after these"
MAX_ROWS = "only so many rows are read, the first ones, of train and of evaluation each; none: all"


@dataclass(frozen=True)
class ModelConfig(Section):
    """The frozen base and the adapters on it."""

    name: str = knob("", "hub name or local folder of a decoder-only model")
    revision: str | None = knob(None, REVISION)
    eos_token: str | list[str] | None = knob(
        None, "the token that ends a response in place of the tokenizer's own, or that and others that do", TOKENS
    )
    dtype: str = knob(
        AUTO,
        "of the frozen base, whose adapters and heads are float32; with sft.full of the products of float32 weights; "
        "auto: bfloat16 where the device computes it, else float32",
        choices=(AUTO, *DTYPES),
    )
    quantization: str = knob(
        "none",
        "how the base's linear layers are stored, for all roles: nf4 takes 4.5 bits a weight, int8 and float8 8; "
        "embeddings, norms, output layer and routers stay in model.dtype",
        choices=QUANTISATIONS,
    )
    attention: str = knob("sdpa", "transformers' attn_implementation: sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = knob(False, "run model code from the hub")
    lora_rank: int = knob(16, "rank of the policy's and the value's adapter", ABOVE_0)
    lora_alpha: int = knob(32, "adapters are scaled by lora_alpha / lora_rank", ABOVE_0)
    lora_dropout: float = knob(0.0, "must be 0: old and new log-probs would differ before any update", NO_DROPOUT)
    rslora: bool = knob(False, "scale by lora_alpha / sqrt(lora_rank) instead")
    init_lora_weights: str = knob(
        "kaiming", "how a new adapter's A starts: kaiming, PEFT's own, or gaussian; B is zero", choices=STARTS
    )
    target_modules: str | list[str] = knob(
        "all-linear", "layers to adapt: all-linear or a list of name endings", LAYERS
    )
    exclude_modules: list[str] = knob([], "linear layers to leave alone, by name ending")
    policy_adapter: str | None = knob(None, "LoRA folder (SFT) the policy starts from; a frozen copy is the reference")
    value_adapter: str | None = knob(None, "reward adapter (LoRA folder with its head) that the value starts from")
    value_on: str = knob(
        "adapter",
        "the value head reads an adapter of its own, or, cheaper, the policy's states without moving them",
        choices=VALUE_SITES,
    )
    value_head_std: float = knob(0.0, "standard deviation of the value head's start; 0 starts it at zero", NOT_NEGATIVE)
    gradient_checkpointing: bool = knob(False, "recompute layers in backward: less memory, about a third more time")

    def __post_init__(self) -> None:
        """A value adapter to start from needs an adapter to start. Starts that PEFT knows have reasons of their own."""
        start = self.init_lora_weights
        why = OTHER_STARTS.get(start.partition("_niter_")[0]) if isinstance(start, str) else None
        if why is not None:
            way_out = "" if start == "eva" else f"; use one of {', '.join(STARTS)}"
            raise ConfigError(f"model.init_lora_weights={shortened(start)} {why}{way_out}")
        super().__post_init__()
        if self.value_adapter is not None and self.value_on != "adapter":
            raise ConfigError(
                f"model.value_adapter={self.value_adapter} needs an adapter of the value's own, but model.value_on is "
                f"{self.value_on}; set it to adapter, or drop value_adapter"
            )


@dataclass(frozen=True)
class DataConfig(Section):
    """Prompts to train on and to evaluate on."""

    train: str = knob("", "hub dataset name, or a local json, jsonl, csv or parquet file")
    train_split: str = knob("train", "split of the training prompts")
    evaluation: str | None = knob(None, "held-out prompts: hub name or file; none: no evaluation")
    evaluation_split: str = knob("train", "split of the held-out prompts")
    streaming: bool = knob(False, STREAMING)
    max_rows: int | None = knob(None, MAX_ROWS, ABOVE_0)
    prompt_column: str = knob("prompt", "column of strings or lists of chat messages; other columns go to the reward")
    chat_template: bool | str = knob(True, f"wrap string prompts as one user message in {WHICH_TEMPLATE}", TEMPLATE)
    system_prompt: str | None = knob(None, "system message of conversations that bring none; needs the chat template")
    chat_template_kwargs: dict[str, Any] = knob({}, TEMPLATE_VALUES)
    max_prompt_tokens: int = knob(512, "longer prompts are dropped and counted", ABOVE_0)
    curriculum: str | None = knob(
        None, "chooses each rollout's prompts: near_target, or path/to/file.py:name; none: all of them in random order"
    )
    curriculum_kwargs: dict[str, Any] = knob({}, "its own constants")

    def __post_init__(self) -> None:
        """A system prompt needs the chat template."""
        super().__post_init__()
        if self.system_prompt is not None and not self.chat_template:
            raise ConfigError(
                "data.system_prompt is set but data.chat_template is false; "
                "set chat_template: true or drop the system prompt"
            )
        if self.curriculum_kwargs and self.curriculum is None:
            raise ConfigError("data.curriculum_kwargs is set but data.curriculum is none; name the curriculum, too")


@dataclass(frozen=True)
class RewardConfig(Section):
    """Where scores come from."""

    function: str = knob("", "path/to/file.py:name or package.module:name of (prompts, responses, **columns) -> scores")
    kwargs: dict[str, Any] = knob({}, "extra keyword arguments for the function")
    functions: list[dict[str, Any]] = knob([], "several rewards instead, each with a weight and more: docs/rewards.md")
    adapter: str | None = knob(None, "folder of a reward adapter on the shared base, whose score is added")
    adapter_weight: float = knob(1.0, "its weight")
    model: str | None = knob(None, "hub name or folder of a reward model with its own tokenizer, whose score is added")
    model_revision: str | None = knob(None, REVISION)
    model_weight: float = knob(1.0, "its weight")
    missing_eos_penalty: float = knob(0.0, "subtracted from the score of a response that was cut off", NOT_NEGATIVE)
    overlong_buffer: int = knob(0, "tokens before the budget where DAPO's soft penalty begins; 0: off", NOT_NEGATIVE)
    overlong_penalty: float = knob(1.0, "and reaches this at the budget", NOT_NEGATIVE)
    clip: float | None = knob(None, "scores are cut to +- this, after penalties; none: off", ABOVE_0)
    scale: float = knob(1.0, "scores and token rewards are multiplied by this, after the clip", ABOVE_0)
    whiten: bool = knob(False, "centre and scale the scores of a rollout, after the scale")
    passes_at: float | None = knob(None, "evaluations give pass@k, where a response with this score or more passes")
    answer: str | None = knob(
        None, "path/to/file.py:name of (responses) -> answers, which vote for maj@k in evaluations; needs passes_at"
    )

    def __post_init__(self) -> None:
        """One way to name rewards, not two."""
        super().__post_init__()
        if self.functions and (self.function or self.kwargs):
            raise ConfigError(
                "reward.functions and reward.function are both set; put the one function into the list of functions"
            )
        if self.answer is not None and self.passes_at is None:
            raise ConfigError(
                f"reward.answer={self.answer} votes for maj@k, but nothing says which answers are right; set "
                "reward.passes_at, such as 1.0, or drop it"
            )

    @property
    def named(self) -> bool:
        """Whether there is any reward."""
        return bool(self.function or self.functions or self.adapter or self.model)


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How responses are sampled."""

    prompts_per_rollout: int = knob(32, "prompts of one rollout batch, over all ranks", ABOVE_0)
    responses_per_prompt: int = knob(1, "responses sampled for each of them", ABOVE_0)
    max_new_tokens: int = knob(256, "token budget of a response", ABOVE_0)
    temperature: float = knob(1.0, "divides the logits, in sampling and in every log-prob", ABOVE_0)
    top_k: int = knob(0, "sample from the k most likely tokens; 0: all", NOT_NEGATIVE)
    top_p: float = knob(1.0, "sample from the smallest set of tokens with this probability; 1: all", ABOVE_0_TO_1)
    min_p: float = knob(0.0, "sample from tokens at least this times as likely as the likeliest; 0: all", FROM_0_TO_1)
    repetition_penalty: float = knob(
        1.0, "logits of tokens in prompt and response are divided by this, negative ones multiplied; 1: off", PENALTY
    )
    logit_bias: dict[str, Any] = knob({}, "numbers added to logits, by token id, as in OpenAI's API", BIASES)
    bad_words: list[str] = knob([], "words that cannot be written, as their tokens", WORDS_TO_AVOID)
    stop_strings: list[str] = knob([], "texts, of special tokens too, that end a response, as stop tokens do")
    keep_special_tokens: bool = knob(
        False, "rewards, environment and samples read special tokens too, all but those that end a response or pad it"
    )
    environment: str | None = knob(
        None, "path/to/file.py:name of (prompts, responses, turn, **columns) -> answers, texts or messages, or none"
    )
    max_turns: int = knob(4, "turns of the policy in one response, where there is an environment", ABOVE_0)
    max_turn_tokens: int | None = knob(None, "token budget of one turn; none: what is left of max_new_tokens", ABOVE_0)
    mode: str = knob(
        "auto", "window: gather the base once; stream: decode through its shards; auto: what fits", choices=MODES
    )
    slots: int | None = knob(None, "sequences decoded at once on each rank; none: as many as memory holds", ABOVE_0)
    replace_uniform_groups: int = knob(
        0,
        "rounds of replacing prompts whose responses all have one score by others (DAPO); 0: off",
        NOT_NEGATIVE,
    )
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
        if self.replace_uniform_groups and self.responses_per_prompt == 1:
            raise ConfigError(
                f"rollout.replace_uniform_groups={self.replace_uniform_groups} with one response for each prompt would "
                "replace every prompt; set responses_per_prompt to 2 or more"
            )

    @property
    def sequences(self) -> int:
        """B, the responses of one rollout over all ranks."""
        return self.prompts_per_rollout * self.responses_per_prompt


@dataclass(frozen=True)
class PPOConfig(Section):
    """The algorithm. Names and defaults follow docs/ppo_details.md and docs/algorithms.md."""

    num_rollouts: int = knob(100, "rollout batches in the run", ABOVE_0)
    num_ppo_epochs: int = knob(1, "passes over each rollout", ABOVE_0)
    mini_batches: int = knob(1, "optimizer steps in each pass", ABOVE_0)
    advantage: str = knob("gae", "advantage estimator by name (docs/algorithms.md), or path/to/file.py:name")
    advantage_kwargs: dict[str, Any] = knob({}, "its own constants")
    gamma: float = knob(1.0, "discount", FROM_0_TO_1)
    gae_lambda: float = knob(0.95, "GAE's lambda; 1: Monte-Carlo returns", FROM_0_TO_1)
    whiten_advantages: bool | None = knob(None, "centre and scale advantages; none: as the estimator's source does")
    whiten_over: str = knob("rollout", "what advantages are whitened over", choices=("rollout", "mini_batch"))
    policy_loss: str = knob("vanilla", "policy loss by name (docs/algorithms.md), or path/to/file.py:name")
    policy_loss_kwargs: dict[str, Any] = knob({}, "its own constants")
    clip_range_low: float = knob(0.2, "the ratio is clipped below at 1 - this", WITHIN_0_AND_1)
    clip_range_high: float = knob(0.2, "and above at 1 + this; larger than low is DAPO's clip-higher", ABOVE_0)
    dual_clip: float | None = knob(None, "bound of the ratio at negative advantages (verl: 3); none: off", ABOVE_1)
    value_clip_range: float | None = knob(0.2, "bound of a value's move in the clipped loss; none: off", ABOVE_0)
    value_coef: float = knob(1.0, "weight of the value loss", NOT_NEGATIVE)
    entropy_coef: float = knob(0.0, "weight of the entropy bonus", NOT_NEGATIVE)
    importance_correction: str = knob(
        "none",
        "weigh the policy's loss by training over sampling probability, a token or a sequence",
        choices=CORRECTIONS,
    )
    importance_cap: float = knob(2.0, "these weights are cut to at most this", AT_LEAST_1)
    importance_floor: float = knob(0.5, "the mask kinds drop what is below this or above the cap", FROM_0_TO_1)
    loss_aggregation: str | None = knob(
        None, "how tokens become one loss; none: as the loss's source does", choices=AGGREGATIONS
    )
    kl_in: str = knob("reward", "reward: shapes each token's; loss: a term of the loss", choices=("reward", "loss"))
    kl_estimator: str = knob("k1", "of the KL to the reference, token by token", choices=KL_NAMES)
    kl_coef: float = knob(0.05, "weight of the KL to the reference", NOT_NEGATIVE)
    kl_target: float | None = knob(
        None, "adapt kl_coef towards this KL per token, averaged over responses as in verl; none: fixed", ABOVE_0
    )
    kl_horizon: int = knob(10000, "responses over which the adaptive coefficient moves", ABOVE_0)
    kl_stop: float | None = knob(
        None,
        "once a mini-batch's KL to the policy at rollout is above this, the rollout's other updates are left out",
        ABOVE_0,
    )
    value_warmup_rollouts: int = knob(0, "rollouts at the start that train the value only", NOT_NEGATIVE)
    truncated: str = knob(
        "terminal",
        "responses cut by the budget: terminal (as if ended), bootstrap (value of the cut state) or mask",
        choices=("terminal", "bootstrap", "mask"),
    )
    first_ratio_tolerance: float | None = knob(
        None, "largest mean |log ratio| before an update; none: what rounding explains, measured at the start", ABOVE_0
    )

    def __post_init__(self) -> None:
        """The controller of the coefficient sits where rewards are shaped."""
        super().__post_init__()
        if self.kl_target is not None and self.kl_in != "reward":
            raise ConfigError("ppo.kl_target adapts the penalty in the reward; set kl_in: reward or drop kl_target")


@dataclass(frozen=True)
class RunConfig(Section):
    """Where results go, how often, and who watches."""

    output_dir: str = knob("runs/ppo", "run folder: adapters, checkpoints, JSONL, summary")
    seed: int = knob(0, "every random stream derives from it")
    save_every: int | None = knob(
        None, "rollouts between checkpoints; none: ten times a run; 0: only the final adapters", NOT_NEGATIVE
    )
    keep_checkpoints: int = knob(2, "older checkpoints are deleted", ABOVE_0)
    keep_best: bool = knob(False, "also write and keep the checkpoint of the best evaluation")
    evaluate_every: int = knob(0, "rollouts between evaluations; 0: only those at start and end", NOT_NEGATIVE)
    evaluation_samples: int = knob(
        0, "responses sampled to each held-out prompt in an evaluation, beside the greedy one", NOT_NEGATIVE
    )
    samples: int = knob(4, "sample responses logged with each rollout", NOT_NEGATIVE)
    most_not_finite: int = knob(
        3, "updates in a row that are left out where a number is NaN or infinite; one more ends the run", NOT_NEGATIVE
    )
    timeout_minutes: int = knob(120, "how long a rank waits for the others, for a slow reward too, then ends", ABOVE_0)
    stall_minutes: float = knob(
        30.0,
        "a rank that stands still for so long while others wait ends the run, which says where; 0: none does",
        NOT_NEGATIVE,
    )
    trackers: list[str] | None = knob(
        None, f"who gets the metrics: {', '.join(TRACKERS)}; none: wandb, unless run.wandb is off", EACH_TRACKER
    )
    wandb: str = knob("offline", "how W&B is used: online, offline or off", choices=("online", "offline", "off"))
    wandb_project: str = knob("rlhf_toolkit", "project in W&B and trackio, experiment in MLflow")
    name: str | None = knob(None, "run name there; none: the output folder's name")

    def __post_init__(self) -> None:
        """A tracker is not both named and switched off."""
        super().__post_init__()
        if "wandb" in (self.trackers or ()) and self.wandb == "off":
            raise ConfigError(
                f"run.trackers={self.trackers} with run.wandb=off: leave wandb out of run.trackers, or set run.wandb "
                "to online or offline"
            )

    @property
    def watchers(self) -> tuple[str, ...]:
        """The trackers that the run has."""
        if self.trackers is None:
            return () if self.wandb == "off" else ("wandb",)
        return tuple(self.trackers)
