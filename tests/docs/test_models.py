"""docs/models.md names every architecture that the installed transformers has, and a sample of its rows is so."""

from __future__ import annotations

import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.sweep import PAGE, WORKING, sweep

ROW = re.compile(r"^\| `(\S+)` \| ([a-z ]+) \|", re.MULTILINE)
SAMPLE = (
    *("llama", "qwen3", "gemma3_text", "gemma4_text", "qwen3_5_text", "mistral", "phi3", "gpt2", "falcon"),
    *("rwkv", "llama4_text"),
)


def test_the_page_names_every_architecture() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"`([\w.-]+)`", text))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - named == set()
    results = [result for _, result in ROW.findall(text)]
    assert f"**{results.count(WORKING)} work" in text and f"of {len(results)} decoder-only" in text


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sample_of_its_rows_is_so() -> None:
    rows = dict(ROW.findall(PAGE.read_text()))
    assert {name: result for name, (result, _) in sweep(list(SAMPLE)).items()} == {name: rows[name] for name in SAMPLE}
