"""Compares the logits of a merged model with those of its base and adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.export.folders import adapter_folder, base_name, model_folder
from rlhf_toolkit.seeding import derived_generator

LENGTH = 32
TOLERANCES = {torch.float64: 5e-4, torch.float32: 5e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference of a logit, in standard deviations of all logits, by the dtype merged weights were rounded to."""


@dataclass(frozen=True)
class Verified:
    """Largest differences of a logit: merged against base + adapter, and base against base + adapter."""

    difference: float
    moved: float
    tolerance: float


@torch.no_grad()
def verify(
    base: str, adapter: str, merged: Path, *, dtype: torch.dtype, sequences: int, trust_remote_code: bool = False
) -> Verified:
    """Compare logits of the merged folder with those of base and adapter in PEFT's hands, everything in float32.

    ``sequences`` random token sequences of 32. The merged model's weights have been rounded to ``dtype``, so the two
    differ by rounding: at most ``TOLERANCES[dtype]`` standard deviations of the logits. One model at a time is in
    memory. Raises ModelError above that, and where the difference is more than half of what the adapter itself moves:
    then rounding has lost a small adapter.
    """
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(str(merged), **options).eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (sequences, LENGTH), generator=derived_generator("verify", 0))
    ours = _logits(model, ids)
    del model
    lora = adapter_folder(adapter)
    folder = model_folder(base_name(base, [lora]))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(folder), **options), str(lora)).eval()
    theirs = _logits(peft, ids)
    with peft.disable_adapter():
        unadapted = _logits(peft, ids)
    difference, moved = (float((other - theirs).abs().max()) for other in (ours, unadapted))
    spread = float(theirs.std())
    verified = Verified(difference, moved, TOLERANCES[dtype] * spread)
    if not difference <= verified.tolerance:
        raise ModelError(
            f"{merged} differs from base and adapter by {difference:.3g} in a logit, more than rounding to "
            f"{str(dtype)[6:]} explains ({verified.tolerance:.3g}); do not use it, and check that base and adapter are "
            "those of one run"
        )
    if moved and difference > max(moved / 2, TOLERANCES[torch.float32] * spread):
        raise ModelError(
            f"{merged} differs from base and adapter by {difference:.3g} in a logit, the base alone by {moved:.3g}: "
            f"rounding to {str(dtype)[6:]} lost the adapter; merge with --dtype float32, or use the adapter unmerged"
        )
    return verified


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """(N, LENGTH, V), a sequence at a time."""
    return torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])
