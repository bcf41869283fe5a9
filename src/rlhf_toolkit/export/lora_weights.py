"""A LoRA adapter as matrices: for each adapted layer A (r, in), B (out, r) and the scale of their product.

Everything that is not plain LoRA or rsLoRA on linear layers is refused by name: merged without it, the model would not
be the one that was trained.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from rlhf_toolkit.errors import ModelError, shortened
from rlhf_toolkit.export.finished import ADAPTER_CONFIG, read_json
from rlhf_toolkit.export.folders import ADAPTER_WEIGHTS
from rlhf_toolkit.models.adapter_files import read_lora_config
from rlhf_toolkit.models.targets import PLAIN_STARTS

PART = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
TAKEN_INTO_ACCOUNT = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # which layers: the weights say
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of training and its start
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings that may have any value here. Any other that is not at its default changes what the adapter computes."""


@dataclass(frozen=True)
class LoraWeights:
    """``update() = scale * B A``, (out, in) in float32."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer it adapts."""
        return self.b.shape[0], self.a.shape[1]

    def update(self) -> Tensor:
        """What it adds to the layer's weight (out, in)."""
        return self.scale * (self.b.float() @ self.a.float())

    def turned_update(self) -> Tensor:
        """The same for a layer that stores its weight as (in, out)."""
        return self.update().T


def read_lora(folder: Path) -> dict[str, LoraWeights]:
    """Every adapted layer's matrices, by the layer's name in the model.

    ``scale`` is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023), with the layer's own alpha and r where
    ``alpha_pattern`` and ``rank_pattern`` give some. Raises ModelError for what is not plain LoRA.
    """
    config = plain_config(folder)
    tensors = load_file(folder / ADAPTER_WEIGHTS)  # adapter_folder has looked at it
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        if match is None:
            raise ModelError(
                f"{folder} holds {name}, which is no LoRA matrix of a linear layer; merge in memory with PEFT's "
                "merge_and_unload, or, where that is a frozen embedding, save with save_embedding_layers=False"
            )
        if tensor.dim() != 2:
            raise ModelError(f"{folder} has {name} of shape {tuple(tensor.shape)}, no matrix; save the adapter again")
        parts.setdefault(match["layer"], {})[match["part"]] = tensor
    if not parts:
        raise ModelError(f"{folder} holds no LoRA matrix; there is nothing to merge")
    return {layer: _weights(folder, config, layer, pair) for layer, pair in sorted(parts.items())}


def plain_config(folder: Path) -> LoraConfig:
    """The settings of an adapter that is plain LoRA or rsLoRA. Raises ModelError, by the setting's name, for others."""
    config = read_lora_config(folder)
    plain = LoraConfig()
    known = {field.name for field in fields(plain)}
    unknown = {name: value for name, value in read_json(folder / ADAPTER_CONFIG).items() if name not in known and value}
    if unknown:  # written by a newer PEFT; this one would only warn
        name, value = next(iter(unknown.items()))
        raise ModelError(
            f"{folder} has {name}={shortened(value)}, which this version of PEFT does not know; update PEFT"
        )
    for field in fields(plain):
        value = getattr(config, field.name)
        if field.name not in TAKEN_INTO_ACCOUNT and value and value != getattr(plain, field.name):
            raise ModelError(
                f"{folder} has {field.name}={shortened(value)}, which a sum of base and B A would leave out; merge it "
                "with PEFT's merge_and_unload, or use the adapter unmerged"
            )
    if config.init_lora_weights not in PLAIN_STARTS:
        raise ModelError(
            f"{folder} has init_lora_weights={config.init_lora_weights!r}, which changes the base's weights; convert "
            "it to a plain LoRA adapter first"
        )
    return config


def _weights(folder: Path, config: LoraConfig, layer: str, pair: dict[str, Tensor]) -> LoraWeights:
    if set(pair) != {"A", "B"}:
        raise ModelError(f"{folder} has only lora_{'/'.join(pair)} of {layer}; save the adapter again")
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
    found = (pair["A"].shape[0], pair["B"].shape[1])
    if found != (rank, rank):
        raise ModelError(
            f"{folder} has lora_A and lora_B of ranks {found} in {layer}, but its {ADAPTER_CONFIG} says {rank}; "
            "the two files do not belong together"
        )
    return LoraWeights(pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.use_rslora else rank))
