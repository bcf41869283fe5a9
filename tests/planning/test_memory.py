"""The choice of mode and slots, from numbers alone; the numbers against tensors that exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.slot_cache import SlotCache
from rlhf_toolkit.planning.memory import RolloutNeeds, place
from rlhf_toolkit.rollout.decoding import Alone
from rlhf_toolkit.rollout.sampler import measured_column
from tests.models.test_architectures import WORKS, Case
from tests.roles import tiny_shared
from tests.tiny import tiny_llama

NEEDS = RolloutNeeds(window_bytes=1000, live_bytes=100, slot_bytes=10, scratch_bytes=200)


def choice(free: int, **changes: Any) -> tuple[str, int]:
    placement = place(NEEDS, **{"free": free, "rows": 64, "mode": "auto", "slots": None, **changes})
    assert placement.needed == NEEDS.total(placement.mode, placement.slots) <= 0.9 * free
    return placement.mode, placement.slots


def test_the_window_where_all_rows_fit() -> None:
    assert choice(10**6) == ("window", 64)


def test_fewer_slots_before_streaming() -> None:
    assert choice(1500) == ("window", 15)  # 1350 usable - 1200 for base and scratch


def test_streaming_where_the_gathered_base_leaves_too_few_slots() -> None:
    assert choice(1400) == ("stream", 64)  # the window would have 6
    assert choice(600) == ("stream", 24)


def test_what_is_given_is_kept() -> None:
    assert choice(10**6, mode="stream") == ("stream", 64)
    assert choice(1400, mode="window") == ("window", 6)
    assert choice(10**6, slots=5) == ("window", 5)
    assert choice(1400, slots=5) == ("window", 5)  # five slots are what was asked for, and they fit
    assert choice(10**6, slots=500) == ("window", 64)


def test_what_is_not_sharded_is_not_streamed() -> None:
    assert choice(1400, sharded=False) == ("window", 6)
    with pytest.raises(ConfigError, match=r"rollout\.mode=stream.*ZeRO-3"):
        choice(10**6, mode="stream", sharded=False)


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"mode": "window", "slots": 60}, "set rollout.slots to 6 or less"),
        ({"mode": "window", "free": 1300}, "set rollout.mode: stream"),
        ({"free": 300}, "lower rollout.max_new_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(changes: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out):
        choice(**{"free": 1400, **changes})


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in WORKS.items()])
def test_the_bytes_of_a_slot_are_those_of_its_tensors(case: Case) -> None:
    """What one token shows against the buffers of slots, for every architecture."""
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.model_type](**case.sizes), attn_implementation="eager")
    shared, columns = tiny_shared(base).eval(), 40
    cache = SlotCache(base.config, slots=2, capacity=columns, device=torch.device("cpu"))
    one = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        shared.next_token_logits(one, cache.step_mask, one, cache)
        column = measured_column(shared, Alone())
    buffers = [b for layer in cache.layers if hasattr(layer, "columns") for b in (layer.keys, layer.values)]
    assert 2 * columns * column == sum(buffer.nbytes for buffer in buffers) > 0


def test_the_bytes_of_a_column_by_hand() -> None:
    with torch.no_grad():
        column = measured_column(tiny_shared(tiny_llama()), Alone())
    assert column == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
