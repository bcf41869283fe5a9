"""Rows of logits that choosing a token holds at once, counted against the storages that really exist."""

from __future__ import annotations

import sys
from typing import Any

import torch

from rlhf_toolkit.rollout.sampling import choose_tokens
from rlhf_toolkit.rollout.sizes import RolloutSize
from tests.support.launch import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from phases import LiveTensors

SLOTS = 16
WAYS = [(temperature, top_k, top_p) for temperature in (1.0, 0.7) for top_k in (0, 50) for top_p in (1.0, 0.9)]


def rows_held(vocabulary: int, temperature: float, top_k: int, top_p: float) -> float:
    uniforms = torch.rand(SLOTS, dtype=torch.float64)
    with LiveTensors() as live, torch.inference_mode():
        logits = torch.randn(SLOTS, vocabulary)
        chosen = logits[torch.arange(SLOTS)]
        choose_tokens(chosen, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    return max(live.peaks.values()) / logits.nbytes


def test_the_rows_of_every_way_to_choose() -> None:
    wrong = {}
    for vocabulary in (16384, 16384 + 100):
        for temperature, top_k, top_p in WAYS:
            sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            counted = RolloutSize(rows=1, columns=1, longest_prompt=1, role_pass_tokens=1, **sampling).logit_rows(
                vocabulary
            )
            found = rows_held(vocabulary, **sampling)
            if not counted - 1 <= found <= counted * 1.03:  # sums over blocks are some hundredths of a row
                wrong[vocabulary, *sampling.values()] = (found, counted)
    assert wrong == {}
