"""A packed micro-batch says, and learns, what its padded rows do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_toolkit.data.layout import TokenLayout, packed, padded
from rlhf_toolkit.models.attention import ROLE_ATTENTION
from rlhf_toolkit.models.shared_base import SharedBase
from tests.roles import tiny_shared
from tests.tiny import tiny_llama

ALL = ("policy", "value", "reference", "reward")
TEMPLATE = list(range(3, 15))
BATCHES: dict[str, list[tuple[list[int], int]]] = {
    "ragged, nothing shared": [([3, 4, 5], 4), ([6], 1), ([7, 8, 9, 10, 11, 12, 13], 3), ([14, 15], 6)],
    "one template": [([*TEMPLATE, 20], 3), ([*TEMPLATE, 21, 22, 23], 5), ([*TEMPLATE, 21], 1)],
    "groups under one template": [(TEMPLATE + [20, 21] * 5, 3)] * 3 + [(TEMPLATE + [22] * 9, 7)] * 2 + [([25], 2)],
    "one group": [(TEMPLATE, 2), (TEMPLATE, 6), (TEMPLATE, 1)],
    "a prompt that begins another": [(TEMPLATE, 4), ([*TEMPLATE, 20], 3), ([*TEMPLATE, 20, 21, 22], 2)],
    "one token each": [([5], 3), ([5], 2), ([6], 4)],
    "one row": [(TEMPLATE, 3)],
}
BY_BATCH = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())


def tensors(batch: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences with random responses, and both lengths."""
    generator = torch.Generator().manual_seed(4)
    width = max(len(prompt) + size for prompt, size in batch)
    sequences = torch.ones(len(batch), width, dtype=torch.long)
    for row, (prompt, size) in enumerate(batch):
        response = torch.randint(3, 32, (size,), generator=generator)
        sequences[row, : len(prompt) + size] = torch.cat([torch.tensor(prompt), response])
    return sequences, torch.tensor([len(prompt) for prompt, _ in batch]), torch.tensor([size for _, size in batch])


def llama(**options: Any) -> PreTrainedModel:
    model = tiny_llama(**options)
    model.set_attn_implementation(ROLE_ATTENTION)
    return model


def run(shared: SharedBase, layout: TokenLayout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What all roles say, and the gradient of a sum over it with weights of its own for every number."""
    out = shared(layout, roles=ALL, entropy_gradient=True)
    generator = torch.Generator().manual_seed(5)
    weighted = [(torch.randn(said.shape, generator=generator) * said).sum() for said in out.values()]
    shared.zero_grad()
    torch.stack(weighted).sum().backward()
    return out, {name: p.grad.clone() for name, p in shared.named_parameters() if p.grad is not None}


def compare(shared: SharedBase, batch: list[tuple[list[int], int]]) -> None:
    (expected, right), (found, gradients) = (run(shared, make(*tensors(batch))) for make in (padded, packed))
    assert found.keys() == expected.keys() and gradients.keys() == right.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in right:
        scale = right[name].abs().max().item()
        torch.testing.assert_close(
            gradients[name], right[name], rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@BY_BATCH
def test_packed_rows_say_and_learn_what_padded_rows_do(batch: list[tuple[list[int], int]], checkpointing: bool) -> None:
    shared = tiny_shared(llama(), roles=("policy", "value", "reward"), gradient_checkpointing=checkpointing)
    compare(shared.train(), batch)
