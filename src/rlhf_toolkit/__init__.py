"""PPO for language models on a few consumer GPUs: one frozen base, small LoRA adapters for every role."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_toolkit.errors import RLHFError, reported
    from rlhf_toolkit.runs.api import DPOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
    from rlhf_toolkit.runs.api_settings import DPOConfig, PPOConfig, RewardConfig, SFTConfig

__version__ = "0.1.0"

# PEFT imports bitsandbytes where that is installed, which on a CPU looks for a kernel of the hub's that nothing here
# uses, and warns at every start that it has found none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PLACES = {
    "errors": ("RLHFError", "reported"),
    "runs.api_settings": ("PPOConfig", "SFTConfig", "RewardConfig", "DPOConfig"),
    "runs.api": ("PPOTrainer", "SFTTrainer", "RewardTrainer", "DPOTrainer"),
}
__all__ = [
    "RLHFError",
    "reported",
    "PPOConfig",
    "SFTConfig",
    "RewardConfig",
    "DPOConfig",
    "PPOTrainer",
    "SFTTrainer",
    "RewardTrainer",
    "DPOTrainer",
]


def __getattr__(name: str) -> Any:
    """What programs import from here comes from its module when it is first asked for: torch takes seconds."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"rlhf_toolkit.{module}"), name)
    raise AttributeError(f"module 'rlhf_toolkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
