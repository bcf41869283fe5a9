"""The planner's bytes of each phase against real runs on two ranks, as ``python bench/phases.py`` found them."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.support.launch import ROOT
from tests.support.offenders import for_each

sys.path.insert(0, str(ROOT / "bench"))

from phases import as_markdown

FIGURES: list[dict[str, Any]] = json.loads((ROOT / "bench/results/phases.json").read_text())["figures"]


@for_each("figure", FIGURES, ids=lambda figure: figure["case"])
def test_every_phase_within_a_tenth_and_hardly_underestimated(figure: dict[str, Any]) -> None:
    ratios = figure["estimate_over_peak"]
    assert {phase: ratio for phase, ratio in ratios.items() if not 0.95 <= ratio <= 1.10} == {}


def test_both_stages_and_modes_were_measured() -> None:
    assert {figure["case"][:6] for figure in FIGURES} == {"ZeRO-2", "ZeRO-3"}
    assert {figure["placement"]["mode"] for figure in FIGURES} == {"window", "stream"}


def test_the_table_of_the_docs() -> None:
    assert as_markdown(FIGURES) in (ROOT / "docs/zero3.md").read_text(), "python bench/phases.py prints the new one"
