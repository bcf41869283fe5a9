"""DeepSeek-V3.2's attention: its sparse mask is used, and an indexer's keys move with those of attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_toolkit.models.slot_cache import IndexedSlotLayer, column_bytes
from rlhf_toolkit.rollout import decoding
from rlhf_toolkit.rollout.decoding import Alone, Sampling, decode
from rlhf_toolkit.rollout.sampler import one_token
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.models.test_architectures import WORKS, Built, Case, build, own_logprobs, prompts
from tests.support.builders import tiny_tokenizer
from tests.support.roles import sequences_and_mask

SPARSE = WORKS["deepseek_v32, three tokens of all"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(SPARSE, tmp_path_factory.mktemp("model"))


def test_the_base_attends_to_the_tokens_that_the_indexer_chooses(built: Built, tmp_path: Path) -> None:
    ids, mask = sequences_and_mask((12,), (8,), vocabulary=36, pad_id=0)
    assert built.reference.config._attn_implementation == "sdpa"
    everything = build(Case(SPARSE.model_type, {**SPARSE.sizes, "index_topk": 64}), tmp_path)
    sparse, dense = (own_logprobs(each.reference, ids, mask) for each in (built, everything))
    assert (sparse - dense).abs().mean() > 1e-2


def rolled_out(built: Built, slots: int) -> Rollout:
    batch = PromptBatch(tuple(Prompt(i, "", ids, {}) for i, ids in enumerate(prompts())), (0,) * len(prompts()))
    sampling = Sampling(max_new_tokens=12, stop_ids=(5, 6), pad_id=0, greedy=True)
    with torch.no_grad():
        return decode(built.shared.eval(), tiny_tokenizer(), batch, sampling, stream=(), slots=slots)


def test_few_slots_that_move_say_what_many_say(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    many, moves = rolled_out(built, 5), list[int]()
    monkeypatch.setattr(decoding, "SPARE_COLUMNS", 1)
    shift = IndexedSlotLayer.shift

    def noted(layer: IndexedSlotLayer, by: int) -> None:
        moves.append(by)
        shift(layer, by)

    monkeypatch.setattr(IndexedSlotLayer, "shift", noted)
    few = rolled_out(built, 2)
    assert any(by < 0 for by in moves), "columns ran out"
    assert torch.equal(few.responses, many.responses)
    torch.testing.assert_close(few.rollout_logprobs, many.rollout_logprobs, rtol=1e-4, atol=1e-4)


def test_a_token_takes_its_latents_and_the_indexers_keys(built: Built) -> None:
    with torch.no_grad():
        cache = one_token(built.shared, Alone())
    assert column_bytes(cache) == 2 * (8 + 4 + 8) * 4
