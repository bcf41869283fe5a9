"""Every causal language model of the installed transformers, tiny, in every role: ``python -m tests.sweep`` writes
docs/models.md. Each is tried in a process of its own, two at a time, with a limit of time."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_toolkit.errors import ModelError, RLHFError
from rlhf_toolkit.models.loading import load_base, load_model_config
from rlhf_toolkit.models.shared_base import refuse_architecture
from rlhf_toolkit.trainers.first_gradients import said
from tests.models import test_architectures as roles
from tests.models.test_architectures import PROMPT_LENGTHS, WORKS, Built, Case, Sizes, build
from tests.support.roles import rows_of, sequences_and_mask

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SECONDS, AT_A_TIME, LONGEST = 60, 2, 220
WORKING, REFUSED, UNTRIED, WRONG = "works", "refused", "not tried", "wrong"
SMALL: Sizes = {
    **{**roles.TINY, **roles.GPT, "d_model": 32, "n_layers": 2, "n_heads": 4, "num_layers": 2, "num_heads": 4},
    **{"head_dim": 8, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "ffn_dim": 48},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "n_inner": 48, "n_ctx": 64},
    **{"embedding_size": 32, "rotary_dim": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_topk": 2},
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_k": 2},
    **{"num_experts_per_token": 2, "shared_expert_intermediate_size": 24, "sliding_window": 4, "top_k_experts": 2},
    **{"moe_num_experts": 4, "moe_top_k": 2, "first_k_dense_replace": 1, "num_dense_layers": 1, **roles.LATENT},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "index_n_heads": 32, "index_head_dim": 8},
    **{"index_topk": 3, "kv_channels": 8, "attention_head_size": 8, "n_positions": 64, "moe_num_shared_experts": 1},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "mlp_hidden_size": 48, "expert_ffn_hidden_size": 24},
    **{"ffn_hidden_size": 48, "zero_expert_num": 0, "type_vocab_size": 1},
}
"""Sizes by the names that configs give them."""
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
BYTES = {"vocab_size": 40, "hidden_size_global": 32, **LAYERS}
OWN: dict[str, Sizes] = {
    "blt": {
        **{"patcher_config": BYTES, "encoder_config": BYTES, "decoder_config": BYTES, "global_config": LAYERS},
        **{"encoder_hash_byte_group_vocab": 40, "encoder_hash_byte_group_size": [3]},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "ctrl": {"tie_word_embeddings": False, "initializer_range": 0.2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}},
    },
    "dots3_note": {
        "vision_config": {**LAYERS, "mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {**LAYERS, "adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    "gemma4_assistant": {
        "text_config": {
            **{**roles.TINY, **roles.WINDOW_AND_FULL, "model_type": "gemma4_text", "head_dim": 8, "sliding_window": 4},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4},
        },
        **{"backbone_hidden_size": 32, "num_centroids": 4, "centroid_intermediate_top_k": 2},
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "inkling2_text": {"unpadded_vocab_size": 38},
    "inkling2_loop_text": {"unpadded_vocab_size": 38},
    "jetmoe": {"initializer_range": 0.1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {
        **{
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_block_size": 2,
            "index_topk_blocks": 2,
            "index_n_heads": 2,
        },
    },
    "moshi": {"sliding_window": 64},
    "moss_transcribe_diarize": {"audio_config": {**LAYERS, "num_mel_bins": 8, "max_source_positions": 8}},
    "phi4_multimodal": {
        "vision_config": {**LAYERS, "num_hidden_layers": 2, "image_size": 28, "crop_size": 28},
        "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 4},
    },
    "qwen3_5_moe": {"text_config": {**roles.DELTA, **roles.SHARED_EXPERTS}},
}
"""What a config needs besides, or instead."""


def decoder_only(model_type: str) -> bool:
    """Whether the architecture is one: no encoder-decoder, no encoder that may be told to be a decoder."""
    kind: Any = CONFIG_MAPPING[model_type]
    return not kind.is_encoder_decoder and getattr(kind, "is_decoder", True) is not False


def small(config: Any) -> Sizes:
    """What ``SMALL`` has of the sizes in ``config``, and the same for the config of its text. Latent attention has as
    many heads of keys as of queries, and calls ``head_dim`` what it rotates."""
    names = {*vars(config), *config.attribute_map}
    latent = {"num_key_value_heads": 4, "head_dim": roles.LATENT["qk_rope_head_dim"]} if "kv_lora_rank" in names else {}
    sizes = {
        name: size
        for name, size in {**SMALL, **latent}.items()
        if name in names and config.attribute_map.get(name) not in names
    }
    text = getattr(config, "text_config", None)
    if text is not None:
        sizes["text_config"] = small(text)
    return sizes


def cases(model_type: str) -> Iterator[Case]:
    """Tiny models of the type: the one that the tests name, or with sizes found by name, with either attention."""
    named = [case for case in WORKS.values() if case.model_type == model_type]
    if named:
        yield named[0]
        return
    own = OWN.get(model_type, {})
    try:
        default = CONFIG_MAPPING[model_type]()
    except Exception:  # not a config of its own architecture without any setting
        default = CONFIG_MAPPING[model_type](**own)
    sizes = {**small(default), **own}
    for attention in ("sdpa", "eager"):
        yield Case(model_type, sizes, attention)


def reach(built: Built) -> None:
    """Raise what a run says at its first update where a trained tensor gets no gradient."""
    ids, mask = sequences_and_mask(PROMPT_LENGTHS, (6, 2, 4, 5, 3), vocabulary=36, pad_id=0)
    out = built.shared.train()(rows_of(ids, mask), roles=("policy", "value"))
    (out.policy_logprobs.sum() + out.token_values.square().sum()).backward()
    missing = [name for name, p in built.shared.named_parameters() if p.requires_grad and p.grad is None]
    built.shared.zero_grad()
    if missing:
        raise ModelError(said(missing))


TRIALS: tuple[tuple[str, Callable[[Built], None]], ...] = (
    ("roles", roles.test_every_role_says_what_its_model_says),
    ("gradients", reach),
    ("slots", roles.test_decoding_left_padded_prompts_is_argmax_of_each_alone),
    ("training path", roles.test_the_training_path_agrees_with_the_rollout),
)


def tried(model_type: str) -> tuple[str, str]:
    """What came of the architecture, and the line that says why or the attention that it ran with."""
    answer = UNTRIED, ""
    try:
        candidates = list(cases(model_type))
    except Exception as error:
        return UNTRIED, one_line(error)
    for case in candidates:
        answer = stillborn(case) or alive(case)
        if answer[0] != UNTRIED and "set it to eager" not in answer[1]:
            break
    return answer


def stillborn(case: Case) -> tuple[str, str] | None:
    """What a run says of a model that transformers itself cannot run on text; None where it can."""
    alone: Any = None
    try:
        config = CONFIG_MAPPING[case.model_type](**case.sizes)
        alone = AutoModelForCausalLM.from_config(config, attn_implementation=case.attention).eval()
        alone(input_ids=torch.tensor([[3, 4, 5, 6, 7]]), use_cache=False)
        return None
    except Exception as error:
        answer = UNTRIED, one_line(error)
    try:
        refuse_architecture(roles.on_paper(case.model_type) if alone is None else alone)
    except RLHFError as error:
        return REFUSED, one_line(error)
    except ImportError:
        return answer
    except AttributeError:  # of default size neither: no checkpoint of the kind can be loaded
        return REFUSED, said_at_loading(case)
    except Exception:
        return answer
    return answer


def said_at_loading(case: Case) -> str:
    """The line that a run ends with where transformers makes no model of the config."""
    with TemporaryDirectory() as folder:
        CONFIG_MAPPING[case.model_type](**case.sizes).save_pretrained(folder)
        save_file({"weight": torch.zeros(1)}, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        try:
            load_base(folder, load_model_config(folder), roles.HERE, dtype=torch.float32, attention=case.attention)
        except RLHFError as error:
            return one_line(error).replace(folder, "MODEL")
    raise AssertionError(f"{case.model_type} loads after all")


def alive(case: Case) -> tuple[str, str]:
    """What comes of a model that runs alone, in all that a run does with it."""
    with TemporaryDirectory() as folder:
        step = "loading"
        try:
            built = build(case, Path(folder))
            for step, trial in TRIALS:  # noqa: B007 (named where it fails)
                trial(built)
        except RLHFError as error:
            return REFUSED, one_line(error).replace(folder, "MODEL")
        except StopIteration:
            return UNTRIED, "its tiny model says the same tokens after every prompt"
        except Exception as error:
            return WRONG, f"{step}: {one_line(error)}"
        return WORKING, case.attention


def one_line(error: BaseException) -> str:
    line = " ".join(f"{'' if isinstance(error, RLHFError) else type(error).__name__ + ': '}{error}".split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def in_process(model_type: str, folder: Path) -> int:
    """Try the architecture in a fork; what came of it stands in ``folder``."""
    child = os.fork()
    if child:
        return child
    signal.alarm(SECONDS)  # its default action ends the process
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    warnings.simplefilter("ignore")
    try:
        answer = tried(model_type)
    except BaseException as error:  # what is above it on the stack is the parent's
        answer = WRONG, one_line(error)
    (folder / model_type).write_text(json.dumps(answer))
    os._exit(0)


def sweep(model_types: list[str]) -> dict[str, tuple[str, str]]:
    """What came of each architecture."""
    found: dict[str, tuple[str, str]] = {}
    running: dict[int, tuple[str, float]] = {}
    left = list(model_types)
    with TemporaryDirectory() as folder:
        while left or running:
            while left and len(running) < AT_A_TIME:
                model_type = left.pop(0)
                running[in_process(model_type, Path(folder))] = model_type, time.monotonic()
            ended, status = os.wait()
            model_type, began = running.pop(ended)
            answer = Path(folder, model_type)
            ending = WRONG, f"ended with status {status} after {time.monotonic() - began:.0f} s"
            found[model_type] = tuple(json.loads(answer.read_text())) if answer.exists() else ending
            print(model_type, *found[model_type], sep=" | ", flush=True)
    return found


def page(found: dict[str, tuple[str, str]], others: list[str]) -> str:
    """docs/models.md."""
    counts = {kind: sum(result == kind for result, _ in found.values()) for kind in (WORKING, REFUSED, UNTRIED, WRONG)}
    rows = "\n".join(
        f"| `{model_type}` | {result} | {line.replace('|', '/').replace('<', '&lt;')} |"
        for model_type, (result, line) in sorted(found.items())
    )
    return f"""# Models

What `python -m tests.sweep` found with transformers {transformers.__version__}, of {len(found)} decoder-only
architectures that `AutoModelForCausalLM` knows:
**{counts[WORKING]} work, {counts[REFUSED]} are refused** with one line, {counts[UNTRIED]} could not be tried, since the
script made no tiny model that it can judge, and {counts[WRONG]} went wrong.

Each was built tiny, with random weights, in float32 on a CPU. It *works* where policy, value and reference on the
shared base say what plain PEFT and the bare model say, each alone; where a gradient comes to all that is trained; where
decoding in slots, padded on the left, is greedy decoding of each prompt alone; and where the training path gives the
rollout's log-probs. The last column is the attention that this was tried with, the line a run ends with, or what went
wrong at which step: such a model is neither tested nor refused yet.

| `model_type` | Result | Attention, or why not |
| --- | --- | --- |
{rows}

Not decoder-only, so not tried ({len(others)}): {", ".join(f"`{model_type}`" for model_type in others)}.
"""


def main() -> None:
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    chosen = sys.argv[1:]
    decoders = [model_type for model_type in chosen or every if decoder_only(model_type)]
    found = sweep(decoders)
    if not chosen:
        PAGE.write_text(page(found, [model_type for model_type in every if model_type not in decoders]))


if __name__ == "__main__":
    main()
