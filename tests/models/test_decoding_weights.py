"""Adapted layers while the policy decodes: exact or merged, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_toolkit.models.decoding_weights import decoding_weights
from rlhf_toolkit.models.shared_base import SharedBase
from tests.support.offenders import for_each
from tests.support.roles import plain_peft, tiny_shared
from tests.support.tiny import tiny_llama

IDS = torch.tensor([[5, 9, 11], [7, 8, 2]])


def bases() -> list[PreTrainedModel]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return [tiny_llama(), tiny_llama(attention_bias=True), GPT2LMHeadModel(GPT2Config(**sizes))]  # type: ignore[arg-type]


def logits(shared: SharedBase) -> Tensor:
    with torch.no_grad():
        cache = DynamicCache(config=shared.causal_lm.config)
        return shared.next_token_logits(IDS, torch.ones_like(IDS), torch.arange(3).expand(2, 3), cache)


@for_each("kind", ["exact", "merged"])
@for_each("number", range(3))
def test_both_say_what_plain_peft_says(number: int, kind: str) -> None:
    shared = tiny_shared(bases()[number]).eval()
    plain = plain_peft(shared, "policy", bases()[number])
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits[:, -1]
        bare = bases()[number].eval()(input_ids=IDS).logits[:, -1]
    with decoding_weights(shared, "policy", kind):
        found = logits(shared)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - bare).abs().max() > 1e-2, "the adapter must matter for this to say something"


@pytest.mark.parametrize("kind", ["exact", "merged"])
def test_the_base_and_the_forward_passes_come_back_bit_for_bit(kind: str) -> None:
    shared = tiny_shared().eval().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    own = logits(shared)
    with pytest.raises(KeyboardInterrupt), decoding_weights(shared, "policy", kind):
        raise KeyboardInterrupt
    assert torch.equal(logits(shared), own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.state_dict().items())


def test_exact_is_the_training_paths_arithmetic_in_bfloat16_and_merged_is_not() -> None:
    shared = tiny_shared().eval().to(torch.bfloat16)
    for name, parameter in shared.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    own = logits(shared)
    with decoding_weights(shared, "policy", "exact"):
        assert torch.equal(logits(shared), own)
    with decoding_weights(shared, "policy", "merged"):
        assert 0 < (logits(shared) - own).abs().max() < 0.2


def test_a_layer_without_an_adapter_of_the_role_is_the_base() -> None:
    shared = tiny_shared().eval()
    with decoding_weights(shared, "reference", "exact"):
        found = logits(shared)
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_llama().eval()(input_ids=IDS).logits[:, -1], rtol=1e-5, atol=1e-5)
