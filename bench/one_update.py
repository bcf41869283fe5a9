"""The model and the work of one update, for update.py and roofline.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import patch

import torch
from common import model_folder
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_toolkit.data.layout import TokenLayout, packed_layout, padded_layout
from rlhf_toolkit.models.attention import ROLE_ATTENTION, packing_obstacle
from rlhf_toolkit.models.loading import lora_config
from rlhf_toolkit.models.shared_base import SharedBase

ROWS, PROMPT, RESPONSE = 16, 45, 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(model: str, *, fuse: bool = True) -> SharedBase:
    """Policy and value of rank 16 on every linear layer of a bfloat16 base; B is not zero, as after an update."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        model_folder(model), dtype=torch.bfloat16, attn_implementation=ROLE_ATTENTION
    )
    return adapted(base, fuse=fuse)


def adapted(base: PreTrainedModel, *, fuse: bool = True) -> SharedBase:
    """The same of a base that is there already."""
    torch.manual_seed(0)
    adapter = lora_config(rank=16, alpha=32, rslora=False, target_modules="all-linear", exclude_modules=())
    with nullcontext() if fuse else patch("rlhf_toolkit.models.shared_base.fuse", lambda base: 0):
        shared = SharedBase(base, {"policy": adapter, "value": adapter})
    for name, parameter in shared.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return shared.to(DEVICE).train()


def micro_batches(
    shared: SharedBase,
    rows: int,
    *,
    sequences: int = ROWS,
    prompt: int = PROMPT,
    response: int = RESPONSE,
    vocabulary: int = 40000,
) -> Iterator[TokenLayout]:
    """Random sequences in micro-batches of ``rows``: packed where the base can, as a run would."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, vocabulary, (sequences, prompt + response), generator=generator)
    lay_out = packed_layout if packing_obstacle(shared.causal_lm) is None else padded_layout
    for part in tokens.split(rows):
        lengths = torch.full((2, len(part)), prompt)
        lengths[1] = response
        yield lay_out(part, *lengths).to(torch.device(DEVICE))


def update(shared: SharedBase, layouts: list[TokenLayout]) -> None:
    """Forward and backward of policy and value."""
    for layout in layouts:
        out = shared(layout, roles=("policy", "value"))
        (out.policy_logprobs.sum() + out.token_values.square().sum()).backward()


def score(shared: SharedBase, layouts: list[TokenLayout]) -> None:
    """Policy, value and reference without gradients."""
    with torch.no_grad():
        for layout in layouts:
            shared(layout, roles=("policy", "value", "reference"))


def linear_shapes(config: PretrainedConfig) -> dict[tuple[int, int], int]:
    """(in, out) of the base's linear layers, and how many of each."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    wide, narrow = config.num_attention_heads * head, config.num_key_value_heads * head
    found: dict[tuple[int, int], int] = {}
    for shape in ((size, wide), (size, narrow), (size, narrow), (wide, size), (size, inner), (size, inner)):
        found[shape] = found.get(shape, 0) + layers
    found[inner, size] = found.get((inner, size), 0) + layers
    return found
