"""What all-linear means, and which adapters are refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.targets import beside_experts, is_plain, refuse_unknown, spelt_out
from tests.models.test_architectures import EXPERTS, GEMMA3N, INDEXED, LATENT, ROUTED, TINY
from tests.support.offenders import for_each
from tests.support.roles import lora
from tests.support.tiny import tiny_llama

OF_EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "eos_token_id": 1,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def leaves(base: PreTrainedModel, **options: Any) -> set[str]:
    """The last part of the names that all-linear is spelt out to."""
    return {name.rpartition(".")[2] for name in spelt_out(lora(**options), base).target_modules or ()}


def vision_model() -> PreTrainedModel:
    text = {**SMALL, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def experts(**options: Any) -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, **options))


# ---- all-linear ------------------------------------------------------------------------------------------------------


def test_of_llama_it_is_every_linear_layer_but_the_output() -> None:
    base = tiny_llama()
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert set(spelt_out(lora(), base).target_modules or ()) == linears - {"lm_head"}
    assert len(linears) == 2 * 7 + 1


def test_conv1d_and_falcons_own_linear_are_linear() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=4))
    assert leaves(gpt2) == {"c_attn", "c_proj", "c_fc"}
    falcon = FalconForCausalLM(FalconConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    assert leaves(falcon) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_a_projection_between_trunk_and_head_is_in_the_decoder() -> None:
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=32,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            word_embed_proj_dim=16,
        )
    )
    assert {"project_in", "project_out"} < leaves(opt)


def test_a_vision_tower_is_left_alone() -> None:
    names = spelt_out(lora(), vision_model()).target_modules or ()
    assert names and all(".language_model." in name for name in names)


@pytest.mark.parametrize(
    "base",
    [
        experts,
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **OF_EXPERTS)),
        lambda: PhimoeForCausalLM(PhimoeConfig(**SMALL, num_local_experts=4)),
    ],
    ids=["mixtral", "qwen3_moe", "phimoe"],
)
def test_routed_experts_and_routers_are_left_alone(base: Any) -> None:
    """PEFT's own reading of all-linear adapts both, in a way that no role slice can reach."""
    model = base()
    assert leaves(model) == ATTENTION
    shared = SharedBase(model, {"policy": lora(), "value": lora()})
    adapted = {name for name, module in shared.named_modules() if isinstance(module, BaseTunerLayer)}
    assert {name.rpartition(".")[2] for name in adapted} == ATTENTION
    assert not [name for name, p in shared.named_parameters() if "lora_" in name and "mlp" in name]


def test_dense_layers_that_peft_would_take_for_experts_are_left_alone() -> None:
    """Qwen3-MoE's dense layers are called gate_proj and so on, which to PEFT are the fused experts of all layers."""
    options = {**SMALL, "num_hidden_layers": 2, "mlp_only_layers": [0]}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, **OF_EXPERTS))
    assert any("mlp.gate_proj" in name for name, _ in base.named_modules())
    assert leaves(base) == ATTENTION
    SharedBase(base, {"policy": lora()})


def test_linear_layers_inside_a_list_of_experts_are_left_alone() -> None:
    base = tiny_llama()
    base.model.layers[0].mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(32, 32)])})
    names = spelt_out(lora(), base).target_modules or ()
    assert names and not any("experts" in name for name in names)


class Reader(nn.Module):
    """Calls some of its layers, and reads the weights of others past whatever is put around them."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.clamped, self.listed_and_called = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.ModuleList([nn.Linear(4, 4)]),
        )
        self.read, self.listed, self.called_in_eval = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x.to(self.called.weight.dtype)) + self.listed_and_called[0](x)
        self.clamped.weight.data.clamp_(-1, 1)
        x = nn.functional.linear(self.clamped(x), self.read.weight)
        x = nn.functional.linear(x, self.listed[0].weight)  # type: ignore[arg-type]
        return x @ self.called_in_eval.weight.float() if self.training else self.called_in_eval(x)


def tiny_with_reader() -> PreTrainedModel:
    base = tiny_llama()
    base.model.layers[0].reader = Reader()
    return base


def test_layers_whose_weight_the_model_reads_are_left_alone_and_refused_by_name() -> None:
    base = tiny_with_reader()
    called = {name.removeprefix("model.layers.0.") for name in spelt_out(lora(), base).target_modules or ()}
    assert {name for name in called if "reader" in name} == {
        f"reader.{name}" for name in ("called", "clamped", "listed_and_called.0")
    }
    for name in ("reader.read", "reader.listed.0", "reader.called_in_eval"):
        with pytest.raises(ModelError, match=f"layers.0.{name}: the model reads this layer's weight itself"):
            SharedBase(tiny_with_reader(), {"policy": lora(target_modules=["q_proj", name])})


def config_of(model_type: str, **sizes: Any) -> Any:
    return CONFIG_MAPPING[model_type](**sizes)


def test_of_gemma3n_and_mamba_it_leaves_out_what_is_read_and_of_bloom_nothing() -> None:
    gemma3n = AutoModelForCausalLM.from_config(config_of("gemma3n_text", **GEMMA3N))
    linears = {name.rpartition(".")[2] for name, m in gemma3n.named_modules() if isinstance(m, nn.Linear)}
    assert linears - leaves(gemma3n) == {"lm_head", "correction_coefs"}
    mamba = AutoModelForCausalLM.from_config(config_of("mamba", vocab_size=32, hidden_size=32, num_hidden_layers=1))
    assert leaves(mamba) == {"in_proj"}
    bloom = AutoModelForCausalLM.from_config(config_of("bloom", vocab_size=32, hidden_size=32, n_layer=1, n_head=4))
    assert leaves(bloom) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_what_runs_without_gradient_is_left_alone_and_refused_by_name() -> None:
    """The indexer of DeepSeek-V3.2 chooses tokens, and a choice has no gradient."""
    config = config_of("deepseek_v32", **{**TINY, **EXPERTS, **LATENT, **ROUTED, **INDEXED})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    attention = {name.rpartition(".")[2] for name, m in base.named_modules() if "attn" in name and is_plain(m)}
    assert attention - leaves(base) == {"wq_b", "wk", "weights_proj"}
    with pytest.raises(ModelError, match=r"indexer\.wq_b: the model runs this layer without gradient.*exclude_modules"):
        SharedBase(base, {"policy": lora(target_modules=["q_b_proj", "wq_b"])})


def test_what_a_decoder_sees_and_hears_with_is_left_alone() -> None:
    base = tiny_llama()
    base.model.embed_tokens_extend = nn.ModuleDict({"image_embed": nn.Linear(4, 4), "audio_embed": nn.Linear(4, 4)})
    base.model.layers[0].imaged = nn.Linear(4, 4)
    assert leaves(base) == leaves(tiny_llama()) | {"imaged"}


def test_excluded_modules_stay_excluded() -> None:
    base = tiny_llama()
    shared = SharedBase(base, {"policy": lora(exclude_modules=["down_proj", "up_proj"])})
    adapted = {name.rpartition(".")[2] for name, m in shared.named_modules() if isinstance(m, LoraLinear)}
    assert adapted == ATTENTION | {"gate_proj"}


def test_names_given_by_hand_and_the_given_settings_stay_as_they_are() -> None:
    base, given, everything = tiny_llama(), lora(target_modules=["q_proj"]), lora()
    assert set(spelt_out(given, base).target_modules or ()) == {"q_proj"}
    SharedBase(base, {"policy": everything, "value": everything})
    assert everything.target_modules == "all-linear"


def test_no_plain_linear_layer_is_an_error() -> None:
    class Quantised(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.round())

    base = tiny_llama()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            base.set_submodule(name, Quantised(module.in_features, module.out_features))
    with pytest.raises(ModelError, match="LlamaForCausalLM has no plain linear layer"):
        spelt_out(lora(), base)


# ---- refusals --------------------------------------------------------------------------------------------------------


@for_each(
    "message, options",
    [
        ("model.layers.0.self_attn.q_proj: .* switch off DoRA", {"use_dora": True}),
        ("model.layers.0.self_attn.q_proj: .* lora_bias", {"lora_bias": True}),
        ("model.layers.0.self_attn.q_proj: LoRA dropout .* lora_dropout=0", {"lora_dropout": 0.1}),
        ("model.embed_tokens: .*, not Embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("lm_head: .* output layer", {"target_modules": ["q_proj", "lm_head"]}),
        ("the policy adapter .*modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("the policy adapter .*trainable_token_indices", {"trainable_token_indices": [1, 2]}),
        ("the policy adapter has bias='all'", {"bias": "all"}),
        ("the policy adapter has bias='lora_only'", {"bias": "lora_only"}),
        ("the policy adapter has init_lora_weights='pissa'", {"init_lora_weights": "pissa"}),
        ("the policy adapter has init_lora_weights='olora'", {"init_lora_weights": "olora"}),
    ],
)
@for_each("role", ["policy", "value"])
def test_an_adapter_that_cannot_be_routed_is_refused_by_name(message: str, options: dict[str, Any], role: str) -> None:
    adapters: dict[str, LoraConfig] = {"policy": lora(), "value": lora(), role: lora(**options)}
    with pytest.raises(ModelError, match=message.replace("policy", role)):
        SharedBase(tiny_llama(), adapters)


def test_a_refused_start_leaves_the_base_as_it_was() -> None:
    """PiSSA takes the principal part out of the base's weights when PEFT meets it, so it must not."""
    base = tiny_llama()
    with pytest.raises(ModelError):
        SharedBase(base, {"policy": lora(), "reference": lora(init_lora_weights="pissa")})
    for name, parameter in tiny_llama().named_parameters():
        assert torch.equal(base.get_parameter(name), parameter), name


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_start_that_leaves_the_base_alone_is_accepted(start: Any) -> None:
    base = tiny_llama()
    SharedBase(base, {"policy": lora(r=2, init_lora_weights=start)})
    assert torch.equal(
        base.model.layers[0].self_attn.q_proj.base_layer.weight, tiny_llama().model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize(
    ("base", "options", "layer"),
    [
        (experts, {"target_modules": ["q_proj", "w1", "w2", "w3"]}, "MixtralExperts"),
        (experts, {"target_modules": ["q_proj", "gate"]}, "MixtralTopKRouter"),
        (
            lambda: PhimoeForCausalLM(PhimoeConfig(**SMALL, num_local_experts=4)),
            {"target_modules": ["router"]},
            "PhimoeTopKRouter",
        ),
    ],
)
def test_experts_and_routers_named_by_hand_are_refused(base: Any, options: dict[str, Any], layer: str) -> None:
    with pytest.raises(ModelError, match=rf"mlp.*not {re.escape(layer)}.*exclude_modules"):
        SharedBase(base(), {"policy": lora(**options)})


def qwen3_moe() -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **OF_EXPERTS))


@pytest.mark.parametrize("base", [experts, qwen3_moe])
def test_experts_asked_for_by_the_name_of_a_matrix_are_refused_with_the_reason(base: Any) -> None:
    for name in ("gate_up_proj", "experts.down_proj"):
        with pytest.raises(ModelError) as caught:
            refuse_unknown(base(), "model.target_modules", ["q_proj", name])
        matrix = f"model.layers.0.mlp.experts.{name.rpartition('.')[2]}"
        assert str(caught.value) == (
            f"model.target_modules names '{name}', which is {matrix}, one of 1 such matrices of routed experts (one "
            "product takes the tokens of all roles to an expert); all-linear adapts the linear layers around them"
        )


@pytest.mark.parametrize("base", [experts, qwen3_moe])
def test_a_start_says_what_of_a_mixture_of_experts_is_adapted(base: Any) -> None:
    said = str(beside_experts(SharedBase(base(), {"policy": lora(), "value": lora()})))
    assert said == (
        "adapters are on k_proj, o_proj, q_proj, v_proj; the 2 matrices of routed experts, "
        "model.layers.0.mlp.experts.gate_up_proj the first, stay the base's: one product takes the tokens of all roles "
        "to an expert"
    )


def test_of_a_dense_model_a_start_says_nothing_about_experts() -> None:
    assert beside_experts(SharedBase(tiny_llama(), {"policy": lora()})) is None
    assert beside_experts(experts()) is None


def test_linear_experts_named_by_hand_are_refused() -> None:
    """A token count that happens to divide by the rows would go unnoticed."""
    base = tiny_llama()
    base.model.layers[0].mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(32, 32)])})
    with pytest.raises(ModelError, match=r"experts\.0: role slices adapt .* outside routed experts"):
        SharedBase(base, {"policy": lora(target_modules=["q_proj", "experts.0"])})
