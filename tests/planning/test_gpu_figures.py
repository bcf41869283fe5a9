"""The planner's bytes of a rollout and of an update against those of an H200, as ``bench/gpu_exam.py`` found them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from rlhf_toolkit.models.quantised import Quantisation
from rlhf_toolkit.planning.memory import Placement, place
from rlhf_toolkit.rollout.sizes import RolloutSize, needs_of, sharding
from tests.support.launch import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from exam.subject import WHOLE, config_of, prompts_of
from placements import size_of

SECTIONS = json.loads((ROOT / "bench/results/gpu/exam.json").read_text())["sections"]
FIGURES, CHECKPOINTED = SECTIONS["decode"]["figures"], SECTIONS["seven_billion"]["figures"]
GIB = 2**30


@pytest.fixture(params=FIGURES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def estimated(shape: str, *, shares_heads: bool = False, checkpointing: bool = False, kind: str = "none") -> Placement:
    """The placement of the exam's run without DeepSpeed, once the optimizer has its moments."""
    longest = 2 + max(len(text.split()) for text in prompts_of(WHOLE))  # and the template's two
    size = RolloutSize(
        rows=WHOLE.prompts,
        columns=longest + WHOLE.new_tokens,
        role_pass_tokens=4096,
        longest_prompt=longest,
        update_tokens=4096,
        checkpointing=checkpointing,
        packing=True,
        shares_heads=shares_heads,
    )
    model = size_of(config_of(shape, WHOLE.vocabulary), quantisation=Quantisation(kind))
    needs = needs_of(model, sharding(model, ranks=1, stage=0, on_cpu=False), size, "exact")
    needs = replace(needs, later_bytes=0)
    placed = place(needs, free=10**11, rows=size.rows, mode="auto", slots=None, sharded=False)
    assert (placed.slots, placed.prefill_tokens) == (64, 64 * longest)
    return placed


def over_measured(placed: Placement, found: dict[str, Any]) -> dict[str, float]:
    return {"rollout": placed.needed / GIB / found["rollout_gib"], "update": placed.update / GIB / found["update_gib"]}


def test_within_a_tenth_and_hardly_underestimated(shape: str) -> None:
    """On torch 2.11, whose flash attention wants the keys of grouped heads repeated."""
    ratios = over_measured(estimated(shape), FIGURES[shape])
    assert all(0.95 <= ratio <= 1.10 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_layers_that_are_computed_again_and_quantised_ones_too(kind: str) -> None:
    ratios = over_measured(estimated("7b", checkpointing=True, kind=kind), CHECKPOINTED[kind])
    assert all(0.95 <= ratio <= 1.10 for ratio in ratios.values()), ratios


def test_repeated_keys_are_what_an_update_took_beyond_them(shape: str) -> None:
    """The planted mistake: without them each of the three is underestimated."""
    assert over_measured(estimated(shape, shares_heads=True), FIGURES[shape])["update"] < 0.985
