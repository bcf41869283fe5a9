"""AdamW over named groups: with moments in 32 bits, PyTorch's, or in 8, bitsandbytes'; and LoRA+'s second rate.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354) trains the matrices B, which start at zero, at a multiple of A's rate.
8-bit moments (Dettmers et al. 2022, arXiv:2110.02861) are a byte an element, and one float32 for each block of 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from rlhf_toolkit.errors import ConfigError, described
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel

PAGED = "paged_adamw_8bit"
EIGHT_BIT = {"adamw_8bit": "AdamW8bit", PAGED: "PagedAdamW8bit"}
"""By ``update.optimizer``, which is transformers' name, bitsandbytes'."""
KERNEL = "bitsandbytes::optimizer_update_8bit_blockwise"
PLAIN_ONE = "or set update.optimizer to adamw"
OF_B = ".B"


def require_optimizer(name: str, device: torch.device, *, offloaded: bool) -> None:
    """Raise ConfigError where ``update.optimizer`` cannot run here: bitsandbytes or its kernel is missing, or pages are
    asked for where there is no GPU memory to page. ``offloaded``: the moments lie in the machine's memory."""
    if name not in EIGHT_BIT:
        return
    setting = f"update.optimizer={name}"
    try:
        import_module("bitsandbytes.optim")
    except Exception as error:  # it loads a library for the device, and may raise whatever that does
        raise ConfigError(
            f"{setting} needs bitsandbytes ({described(error)}); install rlhf_toolkit[quantized], {PLAIN_ONE}"
        ) from error
    if name == PAGED and (offloaded or device.type != "cuda"):
        where = "the launch config keeps moments in the machine's memory" if offloaded else f"this is a {device.type}"
        raise ConfigError(f"{setting} pages moments out of a GPU's memory, but {where}; set it to adamw_8bit")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(KERNEL, device.type.upper()):
        raise ConfigError(f"{setting}: bitsandbytes has no 8-bit AdamW for a {device.type}; update it, {PLAIN_ONE}")


def named_groups(
    model: SharedBase | WholeModel, rates: Mapping[str, float], loraplus_lr_ratio: float
) -> list[dict[str, Any]]:
    """The optimizer's groups in the order of ``parameter_groups``, each with its rate and its name. With a ratio other
    than 1 a group's matrices B follow as a group of their own, named ``<name>.B``, at that multiple of its rate."""
    named = model.named_parameters() if loraplus_lr_ratio != 1 else ()
    of_b = {id(parameter) for name, parameter in named if ".lora_B." in name}
    groups = []
    for name, parameters in model.parameter_groups().items():
        apart = [p for p in parameters if id(p) in of_b]
        rest = [p for p in parameters if id(p) not in of_b]
        groups.append({"params": rest, "lr": rates[name], "name": name})
        if apart:
            groups.append({"params": apart, "lr": loraplus_lr_ratio * rates[name], "name": f"{name}{OF_B}"})
    return groups


def make_adamw(name: str, groups: list[dict[str, Any]], **constants: Any) -> torch.optim.Optimizer:
    """The AdamW that ``name`` means, ``update.optimizer`` or transformers' enum of it, with ``constants``: betas, eps
    and weight_decay."""
    # An enum that equals a text need not have its hash.
    eight_bit = next((theirs for ours, theirs in EIGHT_BIT.items() if ours == name), None)
    if eight_bit is None:
        return torch.optim.AdamW(groups, **constants)
    kind: type[torch.optim.Optimizer] = getattr(import_module("bitsandbytes.optim"), eight_bit)
    return kind(groups, **constants)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of each named group as it is now: with LoRA+ that of its matrices A."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups if not group["name"].endswith(OF_B)}
