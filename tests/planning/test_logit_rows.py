"""Rows of logits that choosing a token holds at once, counted against the storages that really exist."""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from typing import Any

import torch

from rlhf_toolkit.rollout.logit_changes import LogitChanges, LogitRules
from rlhf_toolkit.rollout.sampling import choose_tokens
from rlhf_toolkit.rollout.sizes import RolloutSize
from rlhf_toolkit.types import Prompt
from tests.support.launch import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from phases import LiveTensors

SLOTS = 16
FILTERS: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0, 0.7),
    "top_k": (0, 50),
    "top_p": (1.0, 0.9),
    "min_p": (0.0, 0.1),
    "changes_logits": (False, True),
}
WAYS = [dict(zip(FILTERS, values, strict=True)) for values in product(*FILTERS.values())]
RULES = LogitRules(((3, 1.0),), 1.1, ((3,), (4, 5)))


def rows_held(vocabulary: int, *, changes_logits: bool, **filters: Any) -> float:
    uniforms, rows = torch.rand(SLOTS, dtype=torch.float64), torch.arange(SLOTS)
    changes = LogitChanges(RULES, [Prompt(0, "", (1, 2), {})] * SLOTS, 8, torch.device("cpu"))
    changed = partial(changes.changed, rows=rows, now=rows % 8) if changes_logits else None
    with LiveTensors() as live, torch.inference_mode():
        logits = torch.randn(SLOTS, vocabulary)
        chosen = logits[torch.arange(SLOTS)]
        choose_tokens(chosen, uniforms, changed=changed, **filters)
    return max(live.peaks.values()) / logits.nbytes


def test_the_rows_of_every_way_to_choose() -> None:
    wrong = {}
    for vocabulary in (16384, 16384 + 100):
        for way in WAYS:
            size = RolloutSize(rows=1, columns=1, longest_prompt=1, role_pass_tokens=1, **way)
            counted, found = size.logit_rows(vocabulary), rows_held(vocabulary, **way)
            if not counted - 1 <= found <= counted * 1.03:  # sums over blocks are some hundredths of a row
                wrong[vocabulary, *way.values()] = (found, counted)
    assert wrong == {}
