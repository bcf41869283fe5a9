"""A packed micro-batch says, and learns, what its padded rows do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from rlhf_toolkit.data.layout import TokenLayout, packed_layout, padded_layout
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.attention import ROLE_ATTENTION, packing_obstacle
from rlhf_toolkit.models.segment_attention import SegmentAttention
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.offenders import for_each
from tests.support.roles import tiny_shared
from tests.support.tiny import SIZES, merged, tiny_llama, write_task
from tests.support.values import named

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
BY_BATCH = for_each("batch", BATCHES.values(), ids=BATCHES.keys())


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
    (expected, right), (found, gradients) = (
        run(shared, make(*tensors(batch))) for make in (padded_layout, packed_layout)
    )
    assert found.keys() == expected.keys() and gradients.keys() == right.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=named(name))
    for name in right:
        scale = right[name].abs().max().item()
        torch.testing.assert_close(gradients[name], right[name], rtol=1e-5, atol=1e-5 * scale, msg=named(name))


@for_each("checkpointing", [False, True], ids=["kept", "recomputed"])
@BY_BATCH
def test_packed_rows_say_and_learn_what_padded_rows_do(batch: list[tuple[list[int], int]], checkpointing: bool) -> None:
    shared = tiny_shared(llama(), roles=("policy", "value", "reward"), gradient_checkpointing=checkpointing)
    compare(shared.train(), batch)


@pytest.mark.parametrize("window", [None, 4])
def test_a_sliding_window_counts_through_shared_segments(window: int | None) -> None:
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))
    base.set_attn_implementation(ROLE_ATTENTION)
    compare(tiny_shared(base, roles=("policy", "value", "reward")), BATCHES["groups under one template"])


def everything_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment's queries see its own future."""
    own = SegmentAttention.visible
    monkeypatch.setattr(SegmentAttention, "visible", lambda *a: torch.ones_like(own(*a)))


def one_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are not restarted."""
    own = TokenLayout.to
    count = lambda layout: replace(layout, positions=torch.arange(layout.tokens.shape[1])[None])  # noqa: E731
    monkeypatch.setattr(TokenLayout, "to", lambda layout, device: own(count(layout), device))


def a_step_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are read after the token they should predict."""
    own = TokenLayout.to
    monkeypatch.setattr(
        TokenLayout, "to", lambda layout, device: own(replace(layout, before=layout.before + 1), device)
    )


@pytest.mark.parametrize("mutation", [everything_visible, one_long_row, a_step_too_late])
def test_a_mutation_is_noticed(mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    shared, batch = tiny_shared(llama(), roles=("policy", "value", "reward")), BATCHES["one template"]
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="policy_logprobs"):
        compare(shared, batch)


def test_rows_do_not_see_one_another() -> None:
    """Other responses in a micro-batch change no bit that a row reads."""
    shared = tiny_shared(llama()).eval()
    sequences, starts, sizes = tensors(BATCHES["groups under one template"])
    other = sequences.clone()
    other[1, int(starts[1]) :] = 9
    with torch.no_grad():
        before, after = (shared(packed_layout(ids, starts, sizes), roles=("policy",)) for ids in (sequences, other))
    rows = [part.policy_logprobs.split(sizes.tolist()) for part in (before, after)]
    assert [torch.equal(a, b) for a, b in zip(*rows, strict=True)] == [True, False, True, True, True, True]


def test_the_same_layout_twice_gives_the_same_bits() -> None:
    """The first ratio is exactly 1."""
    shared, batch = tiny_shared(llama()), BATCHES["groups under one template"]
    with torch.no_grad():
        scored = shared.eval()(packed_layout(*tensors(batch)), roles=("policy", "value", "reference"))
    updated = shared.train()(packed_layout(*tensors(batch)), roles=("policy", "value"))
    assert torch.equal(scored.policy_logprobs, updated.policy_logprobs)


# ---- whether a model packs -------------------------------------------------------------------------------------------


def test_what_stands_in_the_way_is_named() -> None:
    window: Any = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    assert "runs with model.attention=sdpa, packing needs" in (packing_obstacle(window) or "")
    window.set_attn_implementation(ROLE_ATTENTION)
    assert packing_obstacle(window) is None
    window.config.model_type = "phimoe"
    assert "phimoe tells attention of its sliding window in a mask only" in (packing_obstacle(window) or "")
    window.config.model_type = "mystery"
    assert "mystery is not among the architectures that were tested packed" in (packing_obstacle(window) or "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "micro-batches: packed, shared prefixes once"),
        ({"update.packing": "on"}, "micro-batches: packed, shared prefixes once"),
        ({"update.packing": "off"}, "micro-batches: padded rows\n"),
        ({"model.attention": "eager"}, "micro-batches: padded rows (it runs with model.attention=eager"),
    ],
    ids=["auto", "on", "off", "auto, but it cannot"],
)
def test_the_choice_is_made_at_load_and_printed(
    changes: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(experiment_from_dict(merged(write_task(tmp_path), changes)))
    run.progress.close()
    assert says in capsys.readouterr().out
    assert run.trainer.maker.scored_sampler.cutting.packing == ("packed" in says.split("(")[0])


def test_packing_on_a_model_that_cannot_is_refused(tmp_path: Path) -> None:
    changes = {"update.packing": "on", "model.attention": "eager"}
    with pytest.raises(ModelError, match=r"update\.packing=on, but it runs with model\.attention=eager.*auto or off"):
        prepare(experiment_from_dict(merged(write_task(tmp_path), changes)))
