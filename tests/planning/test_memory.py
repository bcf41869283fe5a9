"""The choice of mode, slots and prefill, from numbers alone; the numbers against tensors that exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.slot_cache import SlotCache, column_bytes, state_bytes, states_of
from rlhf_toolkit.planning.memory import RolloutNeeds, place
from rlhf_toolkit.rollout.decoding import Alone
from rlhf_toolkit.rollout.sampler import one_token
from tests.models.test_architectures import WORKS, Case
from tests.support.offenders import for_each
from tests.support.roles import tiny_shared
from tests.support.tiny import tiny_llama

NEEDS = RolloutNeeds(
    window_bytes=1000,
    live_bytes=100,
    slot_bytes=8,
    choice_bytes=2,
    column_bytes=0,
    prefill_bytes=1,
    longest_prompt=20,
    role_pass_bytes=50,
    weights_bytes=180,
    update_bytes=150,
    streamed_update_bytes=150,
    activation_bytes=100,
    micro_batch=1000,
    role_pass_batch=1000,
)


def choice(free: int, needs: RolloutNeeds = NEEDS, **changes: Any) -> tuple[str, int]:
    placement = place(needs, **{"free": free, "rows": 64, "mode": "auto", "slots": None, **changes})
    assert placement.needed == needs.total(placement.mode, placement.slots, placement.prefill_tokens, 64) <= 0.9 * free
    return placement.mode, placement.slots


def test_the_window_where_all_rows_fit() -> None:
    assert choice(10**6) == ("window", 64)


def test_fewer_slots_before_streaming() -> None:
    assert choice(1500) == ("window", 17)  # 1350 usable - 1180 for base and weights; 10 for each slot


def test_streaming_where_the_gathered_base_leaves_too_few_slots() -> None:
    assert choice(1380) == ("stream", 64)  # the window would have 5
    assert choice(600) == ("stream", 30)  # 540 usable - 280 - a prompt of 20; while choosing 36, with nothing gathered


def test_what_is_given_is_kept() -> None:
    assert choice(10**6, mode="stream") == ("stream", 64)
    assert choice(1380, mode="window") == ("window", 5)  # 62 for slots, less a prompt of 20: five of 8
    assert choice(10**6, slots=5) == ("window", 5)
    assert choice(1380, slots=5) == ("window", 5)  # five slots are what was asked for, and they fit
    assert choice(10**6, slots=500) == ("window", 64)


def test_a_quantised_base_becomes_matrices_where_that_costs_at_most_half_the_slots() -> None:
    """1350 bytes less base, weights and a prompt leave 170: 17 slots of 10 without matrices."""

    def kept(matrices: int, **changes: Any) -> tuple[bool, int]:
        needs = replace(NEEDS, matrices_bytes=matrices)
        placed = place(needs, **{"free": 1500, "rows": 64, "mode": "auto", "slots": None, **changes})
        return placed.keeps_matrices, placed.slots

    assert kept(0) == (False, 17)  # nothing is quantised
    assert kept(70) == (True, 10)  # 100 for slots while choosing
    assert kept(80) == (False, 17)  # 8, of 70 while a prompt of 20 enters, would be less than half of 17
    assert kept(80, rows=8) == (True, 8)
    assert kept(80, slots=10) == (False, 10)  # what is given is kept
    assert kept(70, mode="stream", free=1380) == (False, 64)  # there each layer comes and goes


def test_what_is_not_sharded_is_not_streamed() -> None:
    assert choice(1380, sharded=False) == ("window", 5)
    with pytest.raises(ConfigError, match=r"rollout\.mode=stream.*ZeRO-3"):
        choice(10**6, mode="stream", sharded=False)


def test_a_smaller_prefill_before_fewer_slots() -> None:
    """And never more than the prompts of all slots, nor less than the longest prompt."""
    chosen = [place(NEEDS, free=free, rows=64, mode="window", slots=None) for free in (10**6, 2740, 2730, 2440, 2100)]
    assert [each.slots for each in chosen] == [64] * 5
    # All at once takes 1180 + 1280: there are no slots yet. A part of them takes 1180 + 64 x 8 and itself.
    assert [each.prefill_tokens for each in chosen] == [64 * 20, 64 * 20, 512, 256, 128]
    assert place(NEEDS, free=1380, rows=64, mode="window", slots=None).prefill_tokens == 20


def test_sampling_and_scoring_are_not_at_once() -> None:
    """A pass that scores takes the place of keys and values, and bounds them only where it is larger."""
    assert choice(1500, replace(NEEDS, role_pass_bytes=350)) == ("window", 17)
    assert choice(1500, replace(NEEDS, role_pass_bytes=351)) == ("stream", 64)


def test_a_reward_model_is_gathered_beside_the_base_in_either_mode() -> None:
    """After sampling and before the role pass: it bounds where it is larger than both."""
    assert choice(1500, replace(NEEDS, reward_bytes=350)) == ("window", 17)
    assert choice(1500, replace(NEEDS, reward_bytes=351)) == ("stream", 64)
    assert choice(1500, replace(NEEDS, reward_bytes=1250)) == ("stream", 64)


def test_weights_are_copied_in_the_window_only() -> None:
    assert choice(1500, replace(NEEDS, copied_bytes=50)) == ("window", 12)
    assert choice(600, replace(NEEDS, copied_bytes=50)) == ("stream", 30)


def test_what_an_update_leaves_behind_is_kept_free() -> None:
    assert choice(1500, replace(NEEDS, later_bytes=50)) == ("window", 12)


def test_the_update_is_that_of_the_mode() -> None:
    needs = replace(NEEDS, update_bytes=1200, streamed_update_bytes=300)
    chosen = {mode: place(needs, free=1380, rows=64, mode=mode, slots=5) for mode in ("window", "stream")}
    assert {mode: each.update for mode, each in chosen.items()} == {"window": 1200, "stream": 300}
    with pytest.raises(ConfigError, match="an update with"):
        place(replace(needs, update_bytes=1381), free=1380, rows=64, mode="window", slots=5)
    assert choice(1000, needs)[0] == "stream"  # where the window's update would not fit


@for_each(
    "needs, changes, message",
    [
        ({}, {"mode": "window", "slots": 60}, "set rollout.slots to 7 or less"),
        ({}, {"mode": "window", "free": 1300}, "set rollout.mode: stream"),
        ({}, {"mode": "window", "free": 1300, "sharded": False}, "lower data.max_prompt_tokens"),
        ({}, {"free": 200}, "lower data.max_prompt_tokens or rollout.max_new_tokens"),
        ({"live_bytes": 2000}, {}, "the base alone is too large: take more GPUs"),
        ({"streamed_update_bytes": 1600}, {}, "an update with .* the base alone is too large: take more GPUs"),
        ({"role_pass_bytes": 4000}, {}, r"set update\.micro_batch_tokens to 200 or less"),
        (
            {"streamed_update_bytes": 2400, "activation_bytes": 2000},
            {},
            r"an update with 1000 tokens in a forward pass needs .* set update\.micro_batch_tokens to 500 or less, or "
            "set model.gradient_checkpointing: true",
        ),
        (
            {"streamed_update_bytes": 2400, "activation_bytes": 2000, "checkpointing": True},
            {},
            r"set update\.micro_batch_tokens to 500 or less$",
        ),
        (
            {"role_pass_bytes": 4000, "least_batch": 300},
            {},
            r"lower data\.max_prompt_tokens or rollout.max_new_tokens$",
        ),
        (
            {"streamed_update_bytes": 2400, "activation_bytes": 2000, "least_batch": 501},
            {},
            r"lower data\.max_prompt_tokens or rollout.max_new_tokens, or set model.gradient_checkpointing: true$",
        ),
        ({"reward_bytes": 1300}, {}, r"reward\.model alone needs .* take a smaller one"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(
    needs: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choice(needs=replace(NEEDS, **needs), **{"free": 1400, **changes})


@pytest.mark.parametrize("free", [1380, 1500, 2000, 2500])
def test_the_nearest_setting_fits(free: int) -> None:
    """What a refusal recommends is taken, and one more is not."""
    most = place(NEEDS, free=free, rows=10**6, mode="window", slots=None).slots
    assert place(NEEDS, free=free, rows=10**6, mode="window", slots=most).slots == most
    with pytest.raises(ConfigError, match=f"rollout.slots to {most} or less"):
        place(NEEDS, free=free, rows=10**6, mode="window", slots=most + 1)


def test_the_line_at_the_start_says_the_phases() -> None:
    needs = replace(NEEDS, **{name: getattr(NEEDS, name) * 2**20 for name in ("window_bytes", "role_pass_bytes")})
    line = place(needs, free=2**31, rows=4, mode="auto", slots=None).description()
    assert line == (
        "rollout: base gathered once a rollout, 4 slot(s), 80 tokens a prefill; sampling 0.98, role pass 1.03, update "
        "0.00 of 2.00 GiB free"
    )


@for_each("case", WORKS.values(), ids=list(WORKS))
def test_the_bytes_of_a_slot_are_those_of_its_tensors(case: Case) -> None:
    """What one token shows against the buffers of slots, for every architecture."""
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.model_type](**case.sizes), attn_implementation="eager")
    shared, columns = tiny_shared(base).eval(), 40
    cache = SlotCache(base.config, slots=2, capacity=columns, device=torch.device("cpu"))
    one = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        shared.next_token_logits(one, cache.step_mask, one, cache)
        found = one_token(shared, Alone())
    layers: list[Any] = [layer for layer in cache.layers if hasattr(layer, "columns")]
    buffers = [each for layer in layers for each in vars(layer).values() if isinstance(each, torch.Tensor)]
    buffers = [each for each in buffers if columns in each.shape]
    assert 2 * columns * column_bytes(found) == sum(buffer.nbytes for buffer in buffers)
    states = [state for layer in cache.layers for _, _, state in states_of(layer)]
    assert 2 * state_bytes(found) == sum(state.nbytes for state in states)
    assert buffers or states


def test_the_bytes_of_a_column_by_hand() -> None:
    with torch.no_grad():
        column = column_bytes(one_token(tiny_shared(tiny_llama()), Alone()))
    assert column == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes


def test_a_layer_that_reads_the_keys_of_another_takes_none_of_its_own() -> None:
    case = WORKS["gemma4, shared keys"]
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.model_type](**case.sizes))
    with torch.no_grad():
        column = column_bytes(one_token(tiny_shared(base), Alone()))
    assert column == (2 * 2 * 8 + 2 * 2 * 16) * 4  # of four layers the first two: one with a window, one without
