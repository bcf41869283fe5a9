"""The knobs of the optimizer, which every kind of run has, and PPO's own rates."""

# knob() is dataclasses.field() with a help text, and copies lists and dicts:

from __future__ import annotations

from dataclasses import dataclass

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.settings.knobs import ABOVE_0, FROM_0_TO_BELOW_1, NOT_NEGATIVE, Section, knob

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
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
class OptimizerConfig(Section):
    """One AdamW, one schedule, and how a mini-batch is cut."""

    SECTION = "update"

    micro_batch_tokens: int = knob(
        4096, "tokens of an update's forward pass, its roles together: those it computes, padding too", ABOVE_0
    )
    packing: str = knob(
        "auto",
        "sequences end to end, shared prefixes once: on, off (padded rows) or auto (on where the model can)",
        choices=("auto", "on", "off"),
    )
    schedule: str = knob("constant", "transformers' scheduler type, of all groups", choices=SCHEDULES)
    warmup_steps: int = knob(0, "optimizer steps of linear warm-up, for schedules that have one", NOT_NEGATIVE)
    max_grad_norm: float = knob(1.0, "the gradient of all groups together is clipped to this norm", ABOVE_0)
    optimizer: str = knob(
        "adamw",
        "adamw; adamw_8bit: bitsandbytes' with moments of 8 bits; paged_adamw_8bit: these paged out of a full GPU",
        choices=OPTIMIZERS,
    )
    loraplus_lr_ratio: float = knob(1.0, "LoRA+: adapters' B train at this multiple of their rate; 1: off", ABOVE_0)
    weight_decay: float = knob(0.0, "AdamW's weight decay on all that is trained", NOT_NEGATIVE)
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
class UpdateConfig(OptimizerConfig):
    """The optimizer of PPO: three named parameter groups."""

    policy_lr: float = knob(1e-4, "rate of the policy's adapter; LoRA wants about 10x full fine-tuning's", NOT_NEGATIVE)
    value_lr: float = knob(1e-4, "rate of the value's adapter, where it has one (model.value_on)", NOT_NEGATIVE)
    value_head_lr: float = knob(1e-3, "learning rate of the value head", NOT_NEGATIVE)
