"""Architecture by architecture: the roles say what the model itself would say, and decoding is greedy argmax of it.

The oracle is transformers' own forward pass of a plain PEFT model on whole sequences: no cache, no padding, no slices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_toolkit.data.layout import join, response_positions, unpack
from rlhf_toolkit.distributed.topology import Launch, Topology
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.attention import PACKABLE, packing_obstacle
from rlhf_toolkit.models.loading import OWN_ATTENTION, load_base, load_model_config
from rlhf_toolkit.models.recurrent import TESTED
from rlhf_toolkit.models.shared_base import SharedBase, refuse_architecture
from rlhf_toolkit.rollout.decoding import Sampling, decode
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.support.builders import tiny_tokenizer
from tests.support.roles import packed_rows, plain_peft, rows_of, sequences_and_mask, tiny_shared

Sizes = dict[str, Any]
TOKENS: Sizes = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TINY: Sizes = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT: Sizes = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS: Sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: Sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
ROUTED: Sizes = {
    **{"num_key_value_heads": 4, "head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "first_k_dense_replace": 1,
}
INDEXED: Sizes = {"index_n_heads": 32, "index_head_dim": 8, "index_topk": 3}
"""An indexer of so many heads that no two tokens have the same score, as they would where all heads say nothing."""
VISION: Sizes = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def without(sizes: Sizes, *names: str) -> Sizes:
    return {name: value for name, value in sizes.items() if name not in names}


@dataclass(frozen=True)
class Case:
    """A config type of transformers, its sizes, and the attention it can run with."""

    model_type: str
    sizes: Sizes
    attention: str = "sdpa"


WINDOW_AND_FULL: Sizes = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER: Sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40, "num_kv_shared_layers": 2}
GEMMA4: Sizes = {
    **{**TINY, **WINDOW_AND_FULL, **PER_LAYER, "head_dim": 8, "global_head_dim": 16, "sliding_window": 4},
    **{"use_double_wide_mlp": True, "final_logit_softcapping": 0.9},
}
GEMMA3N: Sizes = {
    **{**TINY, **WINDOW_AND_FULL, **PER_LAYER, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.9},
    **{"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
}
GEMMA2 = {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.9, "attn_logit_softcapping": 1.0}
WORKS = {
    "llama": Case("llama", TINY),
    "llama tied": Case("llama", {**TINY, "tie_word_embeddings": True}),
    "qwen2": Case("qwen2", TINY),
    "qwen3": Case("qwen3", {**TINY, "head_dim": 8}),
    "mistral, window 4": Case("mistral", {**TINY, "sliding_window": 4}),
    "gemma2": Case("gemma2", {**TINY, **GEMMA2}, "eager"),
    "gemma3 text": Case("gemma3_text", {**TINY, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2}),
    "gemma3 with vision": Case(
        "gemma3",
        {
            "text_config": {**TINY, "head_dim": 8, "sliding_window": 4},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 39,
        },
    ),
    "gemma3n, shared keys": Case("gemma3n_text", GEMMA3N),
    "gemma4, shared keys": Case("gemma4_text", GEMMA4),
    "gemma4, shared keys without windows": Case(
        "gemma4_text", {**GEMMA4, "num_kv_shared_layers": 3, "layer_types": ["full_attention"] * 4}
    ),
    "gpt2": Case("gpt2", GPT),
    "gpt_neox": Case("gpt_neox", {**without(TINY, "num_key_value_heads"), "rotary_pct": 0.5, "hidden_dropout": 0.3}),
    "gptj": Case("gptj", {**GPT, "rotary_dim": 4}, "eager"),
    "opt": Case("opt", {**TINY, "ffn_dim": 48, "dropout": 0.3}),
    "opt, projected": Case("opt", {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": Case("bloom", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "eager"),
    "falcon, rotary": Case("falcon", {**TINY, "multi_query": True}),
    "falcon, alibi": Case("falcon", {**TINY, "alibi": True, "multi_query": False}, "eager"),
    "mpt": Case("mpt", {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "logit_scale": 3.0}, "eager"),
    "phi": Case("phi", {**TINY, "partial_rotary_factor": 0.5, "resid_pdrop": 0.3}),
    "phi3": Case("phi3", {**TINY, "sliding_window": 4}),
    "stablelm": Case("stablelm", {**TINY, "use_qkv_bias": True}),
    "starcoder2": Case("starcoder2", {**TINY, "sliding_window": 4}),
    "olmo2": Case("olmo2", TINY),
    "smollm3": Case("smollm3", {**TINY, "no_rope_layers": [1, 0]}),
    "glm4": Case("glm4", {**TINY, "head_dim": 8}),
    "cohere": Case("cohere", {**TINY, "logit_scale": 3.0}),
    "cohere2": Case("cohere2", {**TINY, "logit_scale": 3.0, "sliding_window": 4}),
    "granite": Case("granite", {**TINY, "logits_scaling": 0.3, "residual_multiplier": 0.5}),
    "hyperclovax": Case("hyperclovax", {**TINY, "logits_scaling": 3.0}),
    "lfm2": Case("lfm2", {**TINY, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "mixtral": Case("mixtral", {**TINY, "num_local_experts": 4, "router_jitter_noise": 0.3}),
    "qwen2_moe": Case("qwen2_moe", {**TINY, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": Case("qwen3_moe", {**TINY, **EXPERTS, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0]}),
    "olmoe": Case("olmoe", {**TINY, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": Case("phimoe", {**TINY, "num_local_experts": 4, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3}),
    "granitemoe": Case("granitemoe", {**TINY, "num_local_experts": 4, "logits_scaling": 0.3}),
    "gpt_oss": Case("gpt_oss", {**TINY, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4}, "eager"),
    "deepseek_v3": Case("deepseek_v3", {**TINY, **EXPERTS, **LATENT, **ROUTED}),
    "deepseek_v2": Case("deepseek_v2", {**TINY, **EXPERTS, **LATENT, **ROUTED}),
    "deepseek_v32, three tokens of all": Case("deepseek_v32", {**TINY, **EXPERTS, **LATENT, **ROUTED, **INDEXED}),
    "doge": Case("doge", TINY),
}
DELTA: Sizes = {
    **TINY,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED_EXPERTS: Sizes = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}
CHANNELS: Sizes = {
    **DELTA,
    **EXPERTS,
    **without(LATENT, "q_lora_rank"),
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA: Sizes = {
    **TINY,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
}
MIXED: Sizes = {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48}
BLOCKS: Sizes = {
    **without(TINY, "num_hidden_layers"),
    "head_dim": 8,
    "ssm_state_size": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba"],
}
SHARED_BLOCKS: Sizes = {
    **TINY,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "layers_block_type": ["hybrid", "mamba", "hybrid"],
    "mamba_d_state": 4,
}
SCANS: Sizes = {**TOKENS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
RECURRENT = {
    "qwen3_5": Case("qwen3_5_text", DELTA),
    "qwen3_5 with experts": Case("qwen3_5_moe_text", {**DELTA, **SHARED_EXPERTS}),
    "qwen3_5 with vision": Case(
        "qwen3_5",
        {
            "text_config": DELTA,
            "vision_config": {**without(VISION, "num_hidden_layers"), "depth": 1, "out_hidden_size": 32},
            "image_token_id": 39,
        },
    ),
    "qwen3_next": Case("qwen3_next", {**DELTA, **SHARED_EXPERTS}),
    "olmo_hybrid": Case("olmo_hybrid", DELTA),
    "kimi_linear": Case("kimi_linear", {**CHANNELS, "linear_head_dim": 8, "linear_num_heads": 4}),
    "bailing_hybrid": Case("bailing_hybrid", CHANNELS),
    "lara_mini": Case("lara_mini", {**DELTA, **SHARED_EXPERTS, "sliding_window": 4}),
    "bamba": Case("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "granitemoehybrid": Case("granitemoehybrid", {**MAMBA, **MIXED, "num_local_experts": 4}),
    "granitemoehybrid, dense": Case("granitemoehybrid", {**MAMBA, **MIXED, "num_local_experts": 0}),
    "falcon_h1": Case("falcon_h1", {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    "nemotron_h": Case("nemotron_h", BLOCKS),
    "jamba": Case("jamba", {**TINY, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}),
    "zamba": Case("zamba", {**SHARED_BLOCKS, "attention_hidden_size": 64, "attention_head_dim": 16}),
    "zamba2": Case("zamba2", {**SHARED_BLOCKS, "n_mamba_heads": 8, "chunk_size": 4}),
    "mamba": Case("mamba", SCANS, "eager"),
    "mamba2": Case("mamba2", {**SCANS, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}, "eager"),
    "falcon_mamba": Case("falcon_mamba", SCANS, "eager"),
}
WORKS |= RECURRENT
# Softcaps and sinks, position biases, a convolution; GPT-J and Falcon attend in ways of their own, and StableLM's
# decoder does not hand arguments down to its layers; masks that choose what a token or a head attends to.
PADDED = (
    *("deepseek_v2", "deepseek_v32, three tokens of all", "doge"),
    *("gemma3n, shared keys", "gemma4, shared keys", "gemma4, shared keys without windows"),
    *("gemma2", "gptj", "bloom", "falcon, rotary", "falcon, alibi", "mpt", "stablelm", "lfm2", "gpt_oss", *RECURRENT),
)
PADDED_ONLY = [WORKS[name] for name in PADDED]
HERE = Topology(Launch.from_environment({}), rank=0, world_size=1, device=torch.device("cpu"))
PROMPT_LENGTHS = (2, 7, 4, 3, 1)
NEW_TOKENS = 8


@dataclass(frozen=True)
class Built:
    """One architecture: the roles on it, and the oracle that plain PEFT is."""

    shared: SharedBase
    policy: PeftModel
    reference: PreTrainedModel


def build(case: Case, folder: Path) -> Built:
    """Save a model as a hub would serve it and load it as a run does, dropout and noise in its config included."""
    config: PretrainedConfig = CONFIG_MAPPING[case.model_type](**case.sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=case.attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # larger than a fresh model's: attention and routing that matter
        elif not parameter.any():  # biases, and scales that would switch parts of the model off
            parameter.data.normal_(std=0.1)
        elif bool((parameter == parameter.flatten()[0]).all()):  # norms and scales that a checkpoint has learned
            parameter.data.mul_(1 + 0.2 * torch.randn_like(parameter))
    model.get_input_embeddings().weight.data[0].normal_(std=0.1)  # a checkpoint's padding token is not zero
    model.save_pretrained(folder)
    bases = [
        load_base(str(folder), load_model_config(str(folder)), HERE, dtype=torch.float32, attention=case.attention)
        for _ in range(3)
    ]
    shared = tiny_shared(bases[0])
    return Built(shared, plain_peft(shared, "policy", bases[1]), bases[2].eval())


@pytest.fixture(scope="module", params=list(WORKS.values()), ids=list(WORKS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(request.param, tmp_path_factory.mktemp("model"))


def own_logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the response tokens, from the model's own logits of each sequence without its padding."""
    parts = []
    for row, positions in zip(ids, mask, strict=True):
        end = int(positions.nonzero().max()) + 1
        with torch.no_grad():
            logp = model(input_ids=row[None, :end], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        parts.append(logp[torch.arange(end - 1), row[1:end]][positions[1:end]])
    return torch.cat(parts)


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_every_role_says_what_its_model_says(built: Built) -> None:
    ids, mask = sequences_and_mask(PROMPT_LENGTHS, (6, 2, 4, 5, 3), vocabulary=36, pad_id=0)
    policy, reference = own_logprobs(built.policy, ids, mask), own_logprobs(built.reference, ids, mask)
    assert (policy - reference).abs().mean() > 1e-3
    for mode in (False, True):
        with torch.no_grad():
            out = built.shared.train(mode)(rows_of(ids, mask), roles=("value", "reference", "policy"))
        close(out.policy_logprobs, policy)
        close(out.reference_logprobs, reference)


def test_packed_rows_say_what_the_model_says(built: Built, request: pytest.FixtureRequest) -> None:
    """Prompts begin alike, so that most rows go through a shared segment longer than any window."""
    obstacle = packing_obstacle(built.shared.causal_lm)
    assert (obstacle is None) == (request.node.callspec.params["built"] not in PADDED_ONLY), obstacle
    if obstacle is not None:
        return
    ids, mask = sequences_and_mask((12, 17, 12, 13, 1), (6, 2, 4, 5, 3), vocabulary=36, pad_id=0)
    ids[1:4, :12] = ids[0, :12]
    policy, reference = own_logprobs(built.policy, ids, mask), own_logprobs(built.reference, ids, mask)
    layout = packed_rows(ids, mask)
    assert layout.tokens.shape == (1, int(mask.sum()) + 12 + 5 + 1 + 1)
    for mode in (False, True):
        with torch.no_grad():
            out = built.shared.train(mode)(layout, roles=("value", "reference", "policy"))
        close(out.policy_logprobs, policy)
        close(out.reference_logprobs, reference)


def test_every_architecture_that_packs_is_tested() -> None:
    assert {case.model_type for name, case in WORKS.items() if case not in PADDED_ONLY} == PACKABLE


def test_every_architecture_with_states_is_tested() -> None:
    assert {case.model_type for case in RECURRENT.values()} - {"qwen3_5"} == TESTED


def test_every_trained_parameter_gets_a_gradient(built: Built) -> None:
    ids, mask = sequences_and_mask(PROMPT_LENGTHS, (6, 2, 4, 5, 3), vocabulary=36, pad_id=0)
    out = built.shared.train()(rows_of(ids, mask), roles=("policy", "value"))
    (out.policy_logprobs.sum() + out.token_values.square().sum()).backward()
    trained = [(name, p.grad) for name, p in built.shared.named_parameters() if p.requires_grad]
    built.shared.zero_grad()
    assert [name for name, gradient in trained if gradient is None or not bool(gradient.any())] == []


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(3, 36, (n,), generator=generator).tolist()) for n in PROMPT_LENGTHS]


def argmax_decode(model: Any, prompt: tuple[int, ...], stop_id: int | None) -> tuple[list[int], list[float]]:
    """Token by token from whole forward passes of one sequence."""
    response: list[int] = []
    logprobs: list[float] = []
    while len(response) < NEW_TOKENS and stop_id not in response:
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *response]])
            logp = model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
        response.append(int(logp.argmax()))
        logprobs.append(logp.max().item())
    return response, logprobs


def rolled_out(shared: SharedBase, stop_ids: tuple[int, ...]) -> Rollout:
    batch = PromptBatch(tuple(Prompt(i, "", ids, {}) for i, ids in enumerate(prompts())), (0,) * len(PROMPT_LENGTHS))
    sampling = Sampling(max_new_tokens=NEW_TOKENS, stop_ids=stop_ids, pad_id=0, greedy=True)
    with torch.no_grad():
        return decode(shared.eval(), tiny_tokenizer(), batch, sampling, stream=())


def test_decoding_left_padded_prompts_is_argmax_of_each_alone(built: Built) -> None:
    """The stop token is one that some rows reach early, so that rows leave the batch and its cache on the way."""
    straight = [argmax_decode(built.policy, prompt, None)[0] for prompt in prompts()]
    tokens = [token for response in straight for token in response]
    stop = next(token for token in tokens if any(token not in response for response in straight))
    rollout = rolled_out(built.shared, (stop,))
    for row, prompt in enumerate(prompts()):
        response, logprobs = argmax_decode(built.policy, prompt, stop)
        assert rollout.responses[row, : len(response)].tolist() == response
        assert int(rollout.lengths[row]) == len(response)
        close(rollout.rollout_logprobs[row, : len(response)], torch.tensor(logprobs))
        assert bool(rollout.finished[row]) == (stop in response)


def test_the_training_path_agrees_with_the_rollout(built: Built) -> None:
    rollout = rolled_out(built.shared, (5, 6, 7))
    ids = join(prompts(), rollout.responses, rollout.lengths, pad_id=0)
    positions = response_positions(torch.tensor(PROMPT_LENGTHS), rollout.lengths, ids.shape[1])
    with torch.no_grad():
        out = built.shared.train()(rows_of(ids, positions), roles=("policy", "value"))
    width = rollout.responses.shape[1]
    close(unpack(out.policy_logprobs, rollout.lengths, width), rollout.rollout_logprobs)


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "t5": "is an encoder-decoder",
    "bart": r"cross-attention \(model\.decoder\.layers\.0\.encoder_attn\)",
    "whisper": "cross-attention",
    "bert": r"layers \(cls\) besides",
    "roberta": r"layers \(lm_head\) besides",
    "modernbert-decoder": r"layers \(lm_head\) besides",
    "electra": r"layers \(generator_predictions\) besides",
    "llama4_text": r"layers \(model\) besides",
    "rwkv": "a state of its own kind",
    "xlstm": "a cache of its own kind",
    "recurrent_gemma": "keeps its state in its layers",
    "deepseek_v4": "keeps recurrent state, and is not among the architectures that were tested with it: bailing_hybrid",
    "openai-gpt": "no key-value cache",
    "xlnet": "no key-value cache",
    "minimax": "a cache of its own kind",
    "cpmant": "prompt tokens of its own",
    "blt": "bytes in patches",
    "git": "begin with an image",
    "dory": r"output layer \(DoryLMHead\) that does more than a product",
    "inkling_text": "drops part of its logits",
}


def on_paper(model_type: str) -> PreTrainedModel:
    """A model of the architecture's default size, without weights."""
    kind: Any = CONFIG_MAPPING[model_type]
    few = {name: 2 for name in ("num_hidden_layers", "n_layer", "decoder_layers", "num_layers") if hasattr(kind, name)}
    config = kind() if model_type in ("recurrent_gemma", "deepseek_v4", "xlstm") else kind(**few)
    with torch.device("meta"):
        if config.is_encoder_decoder and model_type == "t5":
            from transformers import T5ForConditionalGeneration

            return T5ForConditionalGeneration(config)
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_what_cannot_play_roles_is_refused_by_name(model_type: str, reason: str) -> None:
    model = on_paper(model_type)
    with pytest.raises(ModelError, match=f"^{type(model).__name__} .*{reason}"):
        refuse_architecture(model)


def test_what_decoding_in_slots_cannot_cache_is_refused_before_anything_is_loaded_on_it() -> None:
    sizes = {**TINY, "layer_types": ["full_attention", "minimax_m3_sparse"]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["minimax_m3_vl_text"](**sizes))
    with pytest.raises(ModelError, match="decoding in slots does not know cache layers of kind MiniMaxM3VLSparse"):
        refuse_architecture(model)


def test_a_model_that_asks_for_the_name_of_its_attention_hears_transformers_own() -> None:
    """DeepSeek-V3.2 and the like fold their sparse mask in where it is called sdpa or eager. Gemma 4 asks for it when
    it leaves out tokens that nobody's logits are wanted of, which no pass here does."""
    asks = re.compile(r"_attn_implementation *(?:==|in|not in) *\(?[^)\n]*\"sdpa\"")
    folder = Path(transformers.__file__).parent / "models"
    asking = {path.parent.name for path in folder.glob("*/modeling_*.py") if asks.search(path.read_text())}
    decoders = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kinds = {kind for kind in decoders if str(model_type_to_module_name(kind)) in asking}
    assert {kind for kind in kinds if not kind.startswith("gemma4")} == set(OWN_ATTENTION)


def test_a_model_without_a_language_model_head_is_refused() -> None:
    from transformers import LlamaConfig, LlamaModel

    with pytest.raises(ModelError, match="LlamaModel has no language-model head; load it with AutoModelForCausalLM"):
        refuse_architecture(LlamaModel(LlamaConfig(**TINY)))


def test_attention_that_a_model_cannot_run_is_refused_with_a_way_out(tmp_path: Path) -> None:
    case = WORKS["gemma2"]
    config = CONFIG_MAPPING[case.model_type](**case.sizes)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"gemma2 does not run with model\.attention=sdpa .*; set it to eager"):
        load_base(str(tmp_path), load_model_config(str(tmp_path)), HERE, dtype=torch.float32, attention="sdpa")
