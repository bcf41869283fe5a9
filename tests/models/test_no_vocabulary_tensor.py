"""No tensor as large as one row of logits exists in role pass or update: every allocation is watched.

The vocabulary is larger than anything else here, so what has V elements or more has something of the vocabulary in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.models import heads
from rlhf_toolkit.models.attention import ROLE_ATTENTION
from rlhf_toolkit.models.heads import LogitTransform, Tile, TokenScores
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.shared_base import SharedBase
from tests.support.allocations import Allocations
from tests.support.offenders import for_each
from tests.support.roles import packed_rows, rows_of, sequences_and_mask, tiny_shared
from tests.support.tiny import tiny_llama

VOCABULARY, TILE = 8192, 1024
PROMPTS, RESPONSES = (2, 4, 3), (5, 3, 6)
Head = Callable[..., tuple[Tensor, Tensor]]


def shared(
    *, tied: bool, dtype: torch.dtype = torch.float32, attention: str = ROLE_ATTENTION, **options: Any
) -> SharedBase:
    base: Any = tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=tied, attn_implementation=attention)
    base.to(dtype)
    base.get_output_embeddings().weight.data.mul_(20)
    return tiny_shared(base, **options).train()


def run(model: SharedBase, *roles: str) -> RoleOutputs:
    """The one call of the forward pass here."""
    sequences, mask = sequences_and_mask(PROMPTS, RESPONSES, vocabulary=VOCABULARY)
    is_packed = model.causal_lm.config._attn_implementation == ROLE_ATTENTION
    layout = (packed_rows if is_packed else rows_of)(sequences, mask)
    return model(layout, roles=roles, temperature=0.8, entropy_gradient=torch.is_grad_enabled())


def score(model: SharedBase) -> None:
    with torch.no_grad():
        run(model, "policy", "value", "reference")


def update(model: SharedBase) -> dict[str, torch.Tensor]:
    """Forward, backward and a step of policy and value; their gradients."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    out = run(model, "policy", "value")
    weights = torch.linspace(-1, 2, len(out.token_values))
    loss = (weights * out.policy_logprobs).sum() - 0.1 * out.policy_entropies.sum() + out.token_values.square().sum()
    loss.backward()
    optimizer.step()
    return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform, _: bool
) -> tuple[Tensor, Tensor]:
    """Logits of the whole vocabulary at all positions, and autograd."""
    logp = (hidden.float() @ weight.float().t() / transform.temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def casts_the_whole_weight(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return TokenScores.apply(hidden.float(), weight.float(), *rest)


def expands_in_backward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    hidden.register_hook(lambda gradient: gradient + 0 * weight.sum(-1).repeat(len(gradient)).sum())
    return TokenScores.apply(hidden, weight, *rest)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CPU_TILE", Tile(TILE, 512, 1024))


def with_head(monkeypatch: pytest.MonkeyPatch, head: Head) -> None:
    class Replacement(TokenScores):
        apply = staticmethod(head)

    monkeypatch.setattr(heads, "TokenScores", Replacement)


@pytest.mark.thorough
@for_each("work", [score, update])
@for_each("tied", [True, False], ids=["tied", "untied"])
@for_each("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@for_each("checkpointing", [False, True], ids=["", "checkpointing"])
@for_each("attention", [ROLE_ATTENTION, "sdpa"], ids=["packed", "padded"])
def test_no_tensor_has_as_many_elements_as_the_vocabulary(
    work: Callable[..., object], tied: bool, dtype: torch.dtype, checkpointing: bool, attention: str
) -> None:
    model = shared(tied=tied, dtype=dtype, attention=attention, gradient_checkpointing=checkpointing)
    with Allocations() as allocations:
        work(model)
    assert allocations.above(VOCABULARY - 1) == []
    assert len(allocations.seen) > 1000


@pytest.mark.parametrize(
    ("head", "work", "elements"),
    [
        (naive, score, sum(RESPONSES) * VOCABULARY),
        (naive, update, sum(RESPONSES) * VOCABULARY),
        (casts_the_whole_weight, score, 32 * VOCABULARY),
        (expands_in_backward, update, sum(RESPONSES) * VOCABULARY),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_other_heads_are_caught(
    monkeypatch: pytest.MonkeyPatch, head: Head, work: Callable[..., object], elements: int
) -> None:
    with_head(monkeypatch, head)
    model = shared(tied=False, dtype=torch.bfloat16)
    with Allocations() as allocations:
        work(model)
    assert max(allocations.above(VOCABULARY - 1)).elements >= elements


def test_the_gradients_of_an_update_are_the_naive_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = update(shared(tied=False))
    with_head(monkeypatch, naive)
    expected = update(shared(tied=False))
    assert found.keys() == expected.keys() and len(found) == 2 * 2 * 2 * 7 + 2  # A, B; roles; layers; linears; head
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name
