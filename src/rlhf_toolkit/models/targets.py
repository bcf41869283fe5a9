"""Which layers an adapter may adapt: ``all-linear`` spelt out, and what role slices cannot route refused by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_toolkit.errors import ModelError, nearest, shortened
from rlhf_toolkit.models.quantised import QuantisedLinear

ALL_LINEAR = "all-linear"
SAME_PRODUCT = ("FalconLinear",)  # subclasses of nn.Linear that write the same product in their own words
ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")
OF_ANOTHER_LAYER = re.compile(r"_adapter_list\.")
"""Zamba2's layers that share weights each hold the low-rank products of all of them, and call their own alone."""
SENSES = re.compile(r"(?:^|[._])(?:vision|visual|image|img|audio|speech)(?:[._]|$)")
"""Parts that some models keep inside their decoder, and that text never comes to."""
READ = re.compile(r"\bself\.(\w+)(?:\[[^\]]*\])*\.weight\b(?!\[|\.(?:dtype|device|shape|size|ndim|is_cuda|data)\b)")
WRITTEN = re.compile(r"\bself\.(\w+)(?:\[[^\]]*\])*\.weight\.data\b")
WITHOUT_GRADIENT = re.compile(r"(?:\s*@.*\n)*?\s*@torch\.(?:no_grad|inference_mode)\b")
"""How the source of a forward pass begins that records no gradient."""
TOGETHER = "one product takes the tokens of all roles to an expert"
"""Why no role can have an expert of its own."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # PiSSA, OLoRA and the like change the base


def spelt_out(config: LoraConfig, base: PreTrainedModel) -> LoraConfig:
    """A copy of ``config`` in which ``all-linear`` is the names of the decoder's plain linear layers.

    PEFT's own reading also takes vision towers, routers that return more than a product and, in models whose experts
    transformers 5 has fused, those experts: no role slice can reach them. A linear layer whose name PEFT would take for
    such an expert's is left out too, and one whose weight the model reads itself (``read_past``) or that it runs
    without gradient.
    """
    config = deepcopy(config)
    if str(config.target_modules).lower() != ALL_LINEAR:
        return config
    inside, output = set(base.get_decoder().modules()), base.get_output_embeddings()
    config.target_modules = [
        name
        for name, module in base.named_modules()
        if module in inside
        and module is not output
        and is_plain(module)
        and not ROUTED_EXPERT.search(f".{name}.")
        and not OF_ANOTHER_LAYER.search(name)
        and not SENSES.search(name)
        and not read_past(base, name)
        and not runs_without_gradient(base, name)
    ]
    reread = deepcopy(config)
    convert_peft_config_for_transformers(reread, base, None)
    config.target_modules = sorted(reread.target_modules or ())
    if not config.target_modules:
        raise ModelError(f"{type(base).__name__} has no plain linear layer to adapt; load it without quantisation")
    return config


def refuse_unknown(base: PreTrainedModel, setting: str, names: str | Sequence[str]) -> None:
    """Raise ModelError where one of ``names``, of ``model.target_modules`` or ``exclude_modules``, is that of no layer:
    PEFT would pass over it. A text is a regular expression of whole names, as PEFT has it, or ``all-linear``."""
    if isinstance(names, str) and names.lower() == ALL_LINEAR:
        return
    layers = [name for name, _ in base.named_modules()]
    for name in [names] if isinstance(names, str) else names:
        try:
            found = any(
                re.fullmatch(name, layer) if isinstance(names, str) else f".{layer}".endswith(f".{name}")
                for layer in layers
            )
        except re.error as error:
            raise ModelError(
                f"{setting}={shortened(name)} is no regular expression ({error}); give {ALL_LINEAR} or a list of name "
                "endings"
            ) from error
        experts = [] if found else [each for each in routed_experts(base) if f".{each}".endswith(f".{name}")]
        if name and experts:
            raise ModelError(
                f"{setting} names {shortened(name)}, which is {experts[0]}, one of {len(experts)} such matrices of "
                f"routed experts ({TOGETHER}); {ALL_LINEAR} adapts the linear layers around them"
            )
        if not name or not found:
            endings = sorted({layer.rpartition(".")[2] for layer, module in base.named_modules() if is_plain(module)})
            raise ModelError(
                f"{setting} names {shortened(name)}, which no layer of {type(base).__name__} is called"
                f"{nearest(name[:100], endings)}; its linear layers end with {', '.join(endings[:20])}"
            )


def routed_experts(base: nn.Module) -> list[str]:
    """The names of all matrices of experts that a router chooses among, whatever a family keeps them in."""
    found = dict[str, None]()
    for name, module in base.named_modules():
        is_one = name.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
        if is_one and "shared" not in name:  # a shared expert computes every token, by plain linear layers
            found |= {f"{name}.{part}": None for part, _ in module.named_parameters() if not part.endswith("bias")}
    return list(found)


def beside_experts(model: nn.Module) -> str | None:
    """Which layers the adapters of a ``model`` with routed experts are on, and that those stay as they are; None
    without experts or without adapters."""
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    experts = routed_experts(model)
    if not experts or not adapted:
        return None
    return (
        f"adapters are on {', '.join(sorted(adapted))}; the {len(experts)} matrices of routed experts, "
        f"{experts[0].removeprefix('base_model.model.')} the first, stay the base's: {TOGETHER}"
    )


def refuse_settings(role: str, config: LoraConfig) -> None:
    """Raise ModelError for LoRA settings that would change what all roles share. Called before PEFT acts on them."""
    if config.bias != "none":
        raise ModelError(f"the {role} adapter has bias={config.bias!r}, but roles share the biases; set bias='none'")
    if config.modules_to_save or config.trainable_token_indices:
        raise ModelError(
            f"the {role} adapter trains layers of the base (modules_to_save or trainable_token_indices), which all "
            "roles share; use an adapter of LoRA matrices alone"
        )
    if config.init_lora_weights not in PLAIN_STARTS:
        raise ModelError(
            f"the {role} adapter has init_lora_weights={config.init_lora_weights!r}, which changes the base's weights; "
            "convert it to a plain LoRA adapter first"
        )


def refuse_layers(base: PreTrainedModel) -> None:
    """Raise ModelError where PEFT has put an adapter that role slices cannot route, naming the first one."""
    output = base.get_output_embeddings()
    for name, module in base.named_modules():
        if module is output and isinstance(module, BaseTunerLayer):
            raise ModelError(f"{name}: policy and reference share the output layer; leave it out of the targets")
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if not isinstance(module, LoraLinear) or not is_plain(layer) or ROUTED_EXPERT.search(f".{name}."):
                raise ModelError(
                    f"{name}: role slices adapt nn.Linear and Conv1D outside routed experts ({TOGETHER}), not "
                    f"{type(layer).__name__}; choose model.target_modules without it, or name it in "
                    "model.exclude_modules"
                )
        if isinstance(module, LoraLinear):
            if read_past(base, name):
                raise ModelError(
                    f"{name}: the model reads this layer's weight itself, past an adapter; name it in "
                    "model.exclude_modules"
                )
            if runs_without_gradient(base, name):
                raise ModelError(
                    f"{name}: the model runs this layer without gradient, so that it would never learn; name it in "
                    "model.exclude_modules"
                )
            if module.lora_variant or any(module.lora_bias.values()):
                raise ModelError(
                    f"{name}: role slices know plain LoRA and rsLoRA; switch off DoRA, lora_bias and other variants "
                    "(DoRA would keep six times as much for backward: docs/fine_tuning.md)"
                )
            if any(isinstance(dropout, nn.Dropout) for dropout in module.lora_dropout.values()):
                raise ModelError(
                    f"{name}: LoRA dropout makes old and new log-probs differ before any update; set lora_dropout=0"
                )


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` is x W^T + b and nothing else, W in however many bits."""
    kind = type(module)
    plain = (nn.Linear.forward, Conv1D.forward, QuantisedLinear.forward)
    return kind.forward in plain or kind.__name__ in SAME_PRODUCT


def read_past(base: nn.Module, name: str, pattern: re.Pattern[str] = READ) -> bool:
    """Whether the module that holds the layer ``name`` has code for a product of its own with ``self.<layer>.weight``.

    An adapter on such a layer would be passed over, at times or always: Gemma 3n's AltUp reads the weight in training
    and calls the layer otherwise, Mamba's kernels read it on a GPU alone. Where code asks for the weight's dtype,
    device or shape, cuts it (BLOOM's way for tensor parallelism, off by default) or writes to its ``data``, the layer
    itself is called. With ``WRITTEN`` as the ``pattern``: whether it has code that writes to the weight's ``data``.
    """
    holder, _, attribute = name.rpartition(".")
    while attribute.isdigit() and holder:  # in a list: the module that has the list reads it
        holder, _, attribute = holder.rpartition(".")
    kind: Any = type(base.get_submodule(holder))
    return attribute in weights_read(kind, pattern)


def runs_without_gradient(base: nn.Module, name: str) -> bool:
    """Whether the layer ``name`` is part of a module whose forward pass records no gradient, such as the indexer by
    which sparse attention chooses what a token attends to: a choice has none."""
    parts = name.split(".")
    kinds: list[Any] = [type(base.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts))]
    return any(_is_without_gradient(kind) for kind in kinds)


@cache
def _is_without_gradient(kind: Any) -> bool:
    try:
        return bool(WITHOUT_GRADIENT.match(inspect.getsource(kind.forward)))
    except (OSError, TypeError):  # a class made at run time has no source; the first update tells
        return False


@cache
def weights_read(kind: Any, pattern: re.Pattern[str] = READ) -> frozenset[str]:
    """The children of a class of modules whose weights its code takes for a product of its own, or otherwise has as
    ``pattern`` says."""
    try:
        return frozenset(pattern.findall(inspect.getsource(kind)))
    except (OSError, TypeError):  # a class made at run time has no source; the first update tells
        return frozenset()
