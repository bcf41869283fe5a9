"""The knobs of supervised runs: SFT, reward models and DPO."""

# knob() is dataclasses.field() with a help text, and copies lists and dicts:
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_toolkit.settings.configs import MAX_ROWS, STREAMING, TEMPLATE_VALUES, WHICH_TEMPLATE
from rlhf_toolkit.settings.knobs import ABOVE_0, FROM_0_TO_BELOW_1, NOT_NEGATIVE, TEMPLATE, Section, knob
from rlhf_toolkit.settings.optimizer import OptimizerConfig

TURNS = ("all", "last")


@dataclass(frozen=True)
class FineTuneUpdateConfig(OptimizerConfig):
    """The optimizer of SFT, reward models and DPO."""

    lr: float | None = knob(
        None, "learning rate; none: 1e-4, which suits adapters; sft.full needs one of its own, about 1e-5", NOT_NEGATIVE
    )
    head_lr: float = knob(1e-3, "learning rate of the reward head", NOT_NEGATIVE)


@dataclass(frozen=True)
class DatasetConfig(Section):
    """Examples or pairs to train on and to evaluate on."""

    SECTION = "data"

    train: str = knob("", "hub dataset name, or a local json, jsonl, csv or parquet file")
    train_split: str = knob("train", "split of the training rows")
    evaluation: str | None = knob(None, "held-out rows: hub name or file; none: no evaluation")
    evaluation_split: str = knob("train", "split of the held-out rows")
    streaming: bool = knob(False, STREAMING)
    max_rows: int | None = knob(None, MAX_ROWS, ABOVE_0)
    chat_template: bool | str = knob(True, f"wrap strings as messages in {WHICH_TEMPLATE}", TEMPLATE)
    system_prompt: str | None = knob(None, "system message of conversations that bring none; needs the chat template")
    chat_template_kwargs: dict[str, Any] = knob({}, TEMPLATE_VALUES)
    max_tokens: int = knob(1024, "longer rows, prompt and response together, are dropped and counted", ABOVE_0)


@dataclass(frozen=True)
class SFTConfig(Section):
    """Supervised fine-tuning."""

    full: bool = knob(False, "train all of the model's weights instead of an adapter")
    turns: str = knob("all", "the assistant's messages that are trained on: all or the last", choices=TURNS)
    epochs: float = knob(1.0, "passes over the training rows", ABOVE_0)
    batch_size: int = knob(32, "examples of one optimizer step, over all ranks", ABOVE_0)


@dataclass(frozen=True)
class RewardModelConfig(Section):
    """A reward adapter from pairs."""

    SECTION = "reward_model"

    epochs: float = knob(1.0, "passes over the training pairs", ABOVE_0)
    batch_size: int = knob(32, "pairs of one optimizer step, over all ranks", ABOVE_0)
    centring: float = knob(0.01, "weight of (chosen + rejected)^2, which keeps scores around 0", NOT_NEGATIVE)
    normalise: bool = knob(True, "at the end, scores of all training responses get mean 0 and variance 1")


@dataclass(frozen=True)
class DPOConfig(Section):
    """Direct preference optimisation."""

    epochs: float = knob(1.0, "passes over the training pairs", ABOVE_0)
    batch_size: int = knob(32, "pairs of one optimizer step, over all ranks", ABOVE_0)
    beta: float = knob(0.1, "strength of the tie to the reference", ABOVE_0)
    loss: str = knob("sigmoid", "DPO's own, or IPO's", choices=("sigmoid", "ipo"))
    label_smoothing: float = knob(0.0, "share of pairs that are taken to be labelled the wrong way", FROM_0_TO_BELOW_1)
