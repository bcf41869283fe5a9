"""Recurrent states: prompts longer than a piece of the scan, what padding and packing would do, what states take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5 import modeling_qwen3_5

from rlhf_toolkit.data.layout import TokenLayout, packed_layout, padded_layout
from rlhf_toolkit.models import recurrent, state_steps
from rlhf_toolkit.models.attention import ROLE_ATTENTION, packing_obstacle
from rlhf_toolkit.models.recurrent import LayerMemory, layer_memory, read_themselves
from rlhf_toolkit.models.reward_model import RewardModel
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import state_bytes
from rlhf_toolkit.models.state_steps import delta_step, steps_in_place
from rlhf_toolkit.rollout.decoding import Alone, Sampling, decode
from rlhf_toolkit.rollout.prefill import left_padded
from rlhf_toolkit.rollout.sampler import one_token
from rlhf_toolkit.types import Prompt, PromptBatch
from tests.models.test_architectures import RECURRENT, argmax_decode, own_logprobs
from tests.planning.test_sizes import built
from tests.support.builders import tiny_tokenizer
from tests.support.offenders import for_each
from tests.support.roles import plain_peft, tiny_shared
from tests.support.tiny import RECURRENT as SETTINGS
from tests.support.tiny import WORDS, tiny_llama, tiny_recurrent

LENGTHS = (2, 70, 5, 130, 1, 64)
"""Of prompts. The scan goes in pieces of 64."""


def strong(**options: Any) -> PreTrainedModel:
    """States and gates that matter."""
    return tiny_recurrent(initializer_range=0.2, attn_implementation=ROLE_ATTENTION, **options).eval()


def prompts() -> list[Prompt]:
    drawn = torch.randint(2, 32, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1)).tolist()
    return [Prompt(i, "", tuple(drawn[i][:length]), {}) for i, length in enumerate(LENGTHS)]


def test_long_prompts_in_two_slots_are_what_each_is_alone() -> None:
    shared = tiny_shared(strong()).eval()
    policy = plain_peft(shared, "policy", strong())
    batch = PromptBatch(tuple(prompts()), (0,) * len(LENGTHS))
    sampling, budgets = Sampling(max_new_tokens=8, stop_ids=(), pad_id=1, greedy=True), [2, 8, 2, 2, 2, 2]
    with torch.no_grad(), steps_in_place(shared):
        found = decode(shared, tiny_tokenizer(), batch, sampling, stream=(), slots=2, budgets=budgets)
    for row, (prompt, budget) in enumerate(zip(prompts(), budgets, strict=True)):
        tokens, logprobs = (each[:budget] for each in argmax_decode(policy, prompt.token_ids, None))
        assert found.responses[row, :budget].tolist() == tokens
        torch.testing.assert_close(found.rollout_logprobs[row, :budget], torch.tensor(logprobs), rtol=1e-4, atol=1e-5)


def test_padding_that_no_mask_names_would_reach_the_state() -> None:
    """So that the tests of prompts beside one another say something about masks."""
    shared = tiny_shared(strong()).eval()
    ids, mask = left_padded(prompts()[:2], pad_id=1)
    with torch.no_grad():
        right, wrong = (
            shared.next_token_logits(
                ids, each, (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=shared.causal_lm.config)
            )
            for each in (mask, torch.ones_like(mask))
        )
    assert (right[0] - wrong[0]).abs().max() > 0.1
    assert torch.equal(right[1], wrong[1])


def test_a_packed_row_would_carry_a_state_into_the_next_sequence() -> None:
    """Which nothing would say: that is why these models never pack."""
    base = strong()
    shared = tiny_shared(base).eval()
    assert (
        packing_obstacle(base) == "qwen3_5_text keeps recurrent state, which packing and shared prefixes would mix up"
    )
    ids = torch.randint(2, 32, (3, 12), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([6, 6, 6])
    padded, packed = (said(shared, layout(ids, lengths, lengths)) for layout in (padded_layout, packed_layout))
    mask = (torch.arange(12) >= 6).expand(3, 12)
    policy = own_logprobs(plain_peft(shared, "policy", strong()), ids, mask)
    torch.testing.assert_close(padded, policy, rtol=1e-4, atol=1e-5)
    assert (packed - policy).abs().max() > 0.1


@torch.no_grad()
def said(shared: SharedBase, layout: TokenLayout) -> Tensor:
    return shared(layout, roles=("policy",)).policy_logprobs


def test_a_reward_model_with_states_gives_a_response_its_score_in_any_company() -> None:
    settings = {**SETTINGS, "pad_token_id": 1, "eos_token_id": 1, "num_labels": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(Qwen3_5TextConfig(**settings))
    classifier.get_input_embeddings().weight.data[1].normal_(std=0.3)
    model = RewardModel("states", classifier, tiny_tokenizer(words=WORDS, pad="</s>", chat_template=None))
    responses, same = ["w3", "w4 w5 w6 w7", " ".join(["w9"] * 70)], [Prompt(0, "w1 w2", (1,), {})]
    alone = [model.scores(same, [response])[0] for response in responses]
    assert model.scores(same * 3, responses) == pytest.approx(alone, rel=1e-5)


# ---- one token -------------------------------------------------------------------------------------------------------


@for_each("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_place_is_transformers_own(dtype: torch.dtype) -> None:
    """Output and state of eight tokens, with two heads of values for one of keys."""
    torch.manual_seed(0)
    sizes = {"query": (3, 1, 2, 16), "key": (3, 1, 2, 16), "value": (3, 1, 4, 8), "beta": (3, 1, 4)}
    state = torch.randn(3, 4, 16, 8)
    right, found = state.clone(), state
    own: Any = modeling_qwen3_5.torch_recurrent_gated_delta_rule
    for _ in range(8):
        given: dict[str, Any] = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}
        given |= {"g": -torch.rand(3, 1, 4), "use_qk_l2norm_in_kernel": True, "output_final_state": True}
        said_by_own, right = own(**given, initial_state=right)
        with torch.no_grad():
            out, written = delta_step(refuses, **given, initial_state=found)
        assert written is found and out.shape == said_by_own.shape and out.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out, said_by_own, rtol=bound, atol=bound)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def refuses(*args: Any, **options: Any) -> Any:
    raise AssertionError("transformers' own function was called")


def test_what_a_step_in_place_is_not_for_goes_to_transformers_own() -> None:
    heads, state = torch.randn(2, 1, 2, 4), torch.randn(2, 2, 4, 4)
    given: dict[str, Any] = {"g": -torch.rand(2, 1, 2), "beta": torch.rand(2, 1, 2), "use_qk_l2norm_in_kernel": True}
    long = {name: torch.cat([each, each], dim=1) for name, each in {"g": given["g"], "beta": given["beta"]}.items()}
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((heads, heads, heads), {**given, "initial_state": None}),
        ((heads, heads, heads), {**given, "initial_state": state.double()}),
        ((heads, heads, heads), {**given, "initial_state": state, "use_qk_l2norm_in_kernel": False}),
        ((torch.cat([heads, heads], dim=1),) * 3, {**given, **long, "initial_state": state}),
    ]
    for place, (tensors, options) in enumerate(calls):
        with torch.no_grad(), pytest.raises(AssertionError, match="own function"):
            delta_step(refuses, *tensors, **options)
            pytest.fail(f"call {place}")
    with torch.enable_grad(), pytest.raises(AssertionError, match="own function"):
        delta_step(refuses, heads, heads, heads, **given, initial_state=state)


def test_steps_are_in_place_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_qwen3_5.torch_recurrent_gated_delta_rule
    with pytest.raises(KeyError), steps_in_place(tiny_recurrent()):
        assert modeling_qwen3_5.torch_recurrent_gated_delta_rule is not own
        raise KeyError
    assert modeling_qwen3_5.torch_recurrent_gated_delta_rule is own
    monkeypatch.setattr(state_steps, "find_spec", lambda name: object())
    with steps_in_place(tiny_recurrent()):
        assert modeling_qwen3_5.torch_recurrent_gated_delta_rule is own


# ---- what states take ------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_sequences_states_by_hand() -> None:
    shared = tiny_shared(tiny_recurrent()).eval()
    with torch.no_grad():
        found = state_bytes(one_token(shared, Alone()))
        none = state_bytes(one_token(tiny_shared(tiny_llama()).eval(), Alone()))
    assert found == 2 * (4 * 8 * 8 + (2 * 2 * 8 + 4 * 8) * 4) * 4  # layers, heads x keys x values, channels x kernel
    assert none == 0


def test_a_layer_of_a_model_of_9_billion_takes_210_kib_a_token() -> None:
    config = Qwen3_5TextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with torch.device("meta"):
        base: Any = Qwen3_5ForCausalLM(config)
    base.to(torch.bfloat16)
    found = layer_memory(base)
    assert (found.layers, found.scratch // 1024, found.kept // 1024) == (1, 210, 345)  # its input not counted
    assert layer_memory(tiny_llama()) == LayerMemory()


def test_kernels_that_know_no_tensors_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_recurrent()
    kind: Any = type(next(module for module in base.modules() if read_themselves(module)))

    def compiled(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Pointer argument cannot be accessed")

    monkeypatch.setattr(kind, "forward", compiled)
    with pytest.raises(RuntimeError, match="Pointer"):
        layer_memory(base)
    monkeypatch.setattr(type(base), "device", torch.device("cuda"))
    assert layer_memory(base) == LayerMemory()


@for_each("name", RECURRENT)
def test_every_convolution_is_read_by_its_owner(name: str) -> None:
    """Whatever a forward pass reads without calling its owner, ZeRO-3 must be told of."""
    model = built(RECURRENT[name])
    calls, reads = set[nn.Module](), set[nn.Module]()
    for module in model.modules():
        module.register_forward_pre_hook(lambda it, args: calls.add(it))
        reads |= {getattr(module, each) for each in read_themselves(module)}
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.long))
    owners = {module for module in model.modules() if any(True for _ in module.parameters(recurse=False))}
    unseen = {type(module).__name__ for module in owners - calls - reads}
    assert unseen <= {"Embedding", "Linear"}, unseen
    assert recurrent.keeps_state(model) and any(isinstance(module, nn.Conv1d) for module in reads)
