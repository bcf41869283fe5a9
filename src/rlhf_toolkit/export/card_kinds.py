"""What a card says of each kind of run: the words of its opening, the settings of its short table, its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Columns = dict[str, tuple[str, str]]
"""Heading -> name of the metric, and how its number is written."""


@dataclass(frozen=True)
class Kind:
    """``axis`` is what the log counts, ``done`` how the opening goes on after "trained with rlhf_toolkit"; ``recipe``
    are the settings of the short table beside those of all runs."""

    axis: str
    task: str
    tags: tuple[str, ...]
    done: str
    recipe: tuple[str, ...]
    trained: Columns
    evaluated: Columns


EVERY_RUN = (
    "model.name",
    "model.revision",
    "model.eos_token",
    "model.dtype",
    "model.quantization",
    "model.policy_adapter",
    "data.train",
    "data.evaluation",
)
SUPERVISED = ("update.lr", "run.seed")
LOSS = {"loss": "loss"}
PAIRS = {"loss": "loss", "accuracy": "accuracy", "margin": "margin"}
SIZES = ("epochs", "batch_size")


def _columns(prefix: str, place: str, metrics: Mapping[str, str]) -> Columns:
    forms = {"accuracy": "{:.1%}"}
    return {place: ("step", "{}")} | {
        words: (f"{prefix}/{name}", forms.get(name, "{:.3f}")) for words, name in metrics.items()
    }


def _supervised(name: str, task: str, done: str, settings: tuple[str, ...], metrics: Mapping[str, str]) -> Kind:
    return Kind(
        axis="step",
        task=task,
        tags=("lora", name.replace("_", "-")),
        done=done,
        recipe=(*(f"{name}.{setting}" for setting in (*SIZES, *settings)), *SUPERVISED),
        trained=_columns(name, "step", metrics),
        evaluated=_columns("eval", "after step", metrics),
    )


KINDS = {
    "ppo": Kind(
        axis="rollout",
        task="text-generation",
        tags=("lora", "reinforcement-learning"),
        done="in {count} rollouts. A score is what the reward gave a response; it is comparable within this run only.",
        recipe=(
            *("model.value_adapter", "reward.function", "reward.functions", "reward.adapter", "reward.model"),
            *("rollout.prompts_per_rollout", "rollout.responses_per_prompt", "rollout.max_new_tokens"),
            *("rollout.temperature", "ppo.num_rollouts", "ppo.num_ppo_epochs", "ppo.mini_batches", "ppo.advantage"),
            *("ppo.policy_loss", "ppo.kl_in", "ppo.kl_coef", "update.policy_lr", "update.value_lr", "run.seed"),
        ),
        trained={
            "rollout": ("rollout", "{}"),
            "mean score": ("critic/score/mean", "{:.3f}"),
            "KL to the reference (nats a response)": ("actor/ref_kl", "{:.3f}"),
            "tokens of a response": ("response_length/mean", "{:.1f}"),
        },
        evaluated={
            "after rollout": ("rollout", "{}"),
            "mean score": ("eval/score/mean", "{:.3f}"),
            "KL to the reference": ("eval/ref_kl", "{:.3f}"),
            "tokens of a response": ("eval/response_length", "{:.1f}"),
            "cut off by the budget": ("eval/clip_ratio", "{:.1%}"),
        },
    ),
    "sft": _supervised(
        "sft",
        "text-generation",
        "by supervised fine-tuning in {count} steps. The loss is in nats a token, over the assistant's tokens.",
        ("full",),
        {**LOSS, "entropy": "entropy"},
    ),
    "reward_model": _supervised(
        "reward_model",
        "text-classification",
        "as a reward model in {count} steps, on pairs of responses of which one is preferred. The head beside the "
        "adapter reads a response's score at its last token; accuracy is the share of pairs whose chosen response has "
        "the higher one, margin the mean difference.",
        ("centring", "normalise"),
        PAIRS,
    ),
    "dpo": _supervised(
        "dpo",
        "text-generation",
        "by direct preference optimisation in {count} steps. Accuracy is the share of pairs whose chosen response has "
        "the higher implicit reward, margin the mean difference.",
        ("beta", "loss", "label_smoothing"),
        PAIRS,
    ),
}


def kind_of(settings: Mapping[str, Any]) -> Kind:
    """The kind of a run, by the section that only its recipe has."""
    return KINDS[name_of_kind(settings)]


def name_of_kind(settings: Mapping[str, Any]) -> str:
    """That section."""
    return next(name for name in KINDS if name in settings)
