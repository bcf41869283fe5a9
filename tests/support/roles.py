"""A SharedBase in miniature, with adapters and heads that say something from the start, and plain PEFT beside it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rlhf_toolkit.data.layout import TokenLayout, packed_layout, padded_layout
from rlhf_toolkit.models.shared_base import SharedBase
from tests.support.tiny import tiny_llama


def lora(**options: Any) -> LoraConfig:
    """LoRA that is not zero at its start."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options})


def tiny_shared(
    base: PreTrainedModel | None = None, roles: Sequence[str] = ("policy", "value"), seed: int = 1, **options: Any
) -> SharedBase:
    """``roles`` have adapters; ``options`` go to SharedBase."""
    base = base or tiny_llama()
    torch.manual_seed(seed)
    shared = SharedBase(base, {role: lora() for role in roles}, **{"value_head_std": 0.3, **options})
    for head in shared.scalar_heads.values():
        nn.init.normal_(head.get_parameter("weight"))
        nn.init.normal_(head.get_parameter("bias"))
    return shared


def plain_peft(shared: SharedBase, role: str, base: PreTrainedModel) -> Any:
    """``base``, an untouched copy of the shared one, with ``role``'s adapter alone, in PEFT's own hands."""
    model = get_peft_model(base, deepcopy(shared.peft_config[role]), adapter_name=role)
    adapter = {name: tensor for name, tensor in shared.state_dict().items() if f".{role}." in name and "lora_" in name}
    missing = model.load_state_dict(adapter, strict=False)
    assert adapter and not missing.unexpected_keys
    assert not [name for name in missing.missing_keys if "lora_" in name]
    return model.eval()


def sequences_and_mask(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], *, vocabulary: int = 32, pad_id: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded sequences of random tokens (N, T) and the mask of their responses."""
    generator = torch.Generator().manual_seed(3)
    width = max(p + r for p, r in zip(prompt_lengths, response_lengths, strict=True))
    sequences = torch.full((len(prompt_lengths), width), pad_id)
    mask = torch.zeros(sequences.shape, dtype=torch.bool)
    for row, (p, r) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        sequences[row, : p + r] = torch.randint(3, vocabulary, (p + r,), generator=generator)
        mask[row, p : p + r] = True
    return sequences, mask


def rows_of(sequences: torch.Tensor, mask: torch.Tensor) -> TokenLayout:
    """The padded layout of sequences and the mask of their responses."""
    return padded_layout(sequences, *prompt_and_response_lengths(mask))


def packed_rows(sequences: torch.Tensor, mask: torch.Tensor) -> TokenLayout:
    """The packed one."""
    return packed_layout(sequences, *prompt_and_response_lengths(mask))


def prompt_and_response_lengths(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return mask.int().argmax(1), mask.sum(1)
