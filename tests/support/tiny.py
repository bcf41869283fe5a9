"""A whole experiment in miniature: a model folder, prompts, a reward and the settings that tie them together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tests.support.builders import tiny_tokenizer

WORDS = ("<user>", "<assistant>", *(f"w{i}" for i in range(28)))
REWARD = '''
"""Rewards of the tests."""


def low_words(prompts, responses, **columns):
    """The share of words below w14, a reward that a tiny model can learn."""
    shares = []
    for response in responses:
        words = [int(word[1:]) for word in response.split() if word.startswith("w")]
        shares.append(sum(w < 14 for w in words) / max(len(words), 1))
    return shares
'''


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_llama(**options: Any) -> PreTrainedModel:
    """Two layers, hidden size 32, grouped key and value heads, a vocabulary of 32; the same weights every time."""
    torch.manual_seed(0)
    settings = {
        **SIZES,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options}))


RECURRENT: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def tiny_recurrent(**options: Any) -> PreTrainedModel:
    """A gated delta net before and one after attention. The padding token is not zero, as in a checkpoint and unlike in
    a fresh model, where no state would show that padding has reached it."""
    torch.manual_seed(0)
    settings = {**RECURRENT, "eos_token_id": 1, "pad_token_id": 1, "bos_token_id": None, **options}
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**settings))
    embedding: Any = model.get_input_embeddings()
    embedding.weight.data[1].normal_(std=0.1)
    return model


def write_task(
    folder: Path, *, prompts: int = 24, model: PreTrainedModel | None = None, **tokenizer: Any
) -> dict[str, Any]:
    """Write model, tokenizer, prompts of uneven lengths and reward to ``folder``; return the sections of an experiment
    on them."""
    (model or tiny_llama()).save_pretrained(folder / "model")
    tiny_tokenizer(words=WORDS, **{"pad": "</s>", "chat_template": None, **tokenizer}).save_pretrained(folder / "model")
    rows = [{"prompt": " ".join(f"w{(i * 7 + j) % 28}" for j in range(1 + i % 5))} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (folder / "reward.py").write_text(REWARD)
    return {
        "model": {
            "name": str(folder / "model"),
            "dtype": "float32",
            "lora_rank": 4,
            "lora_alpha": 8,
            "value_head_std": 0.1,
        },
        "data": {"train": str(folder / "prompts.jsonl"), "chat_template": False, "max_prompt_tokens": 8},
        "reward": {"function": f"{folder}/reward.py:low_words"},
        "rollout": {"prompts_per_rollout": 8, "max_new_tokens": 6},
        "ppo": {"num_rollouts": 3, "kl_coef": 0.05},
        "update": {"micro_batch_tokens": 64, "policy_lr": 1e-2, "value_lr": 1e-2, "value_head_lr": 1e-2},
        "run": {"output_dir": str(folder / "run"), "wandb": "off", "save_every": 0},
    }


def merged(experiment: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``experiment`` with dotted ``changes`` such as ``{"ppo.kl_coef": 0.1}``."""
    result = {section: dict(values) for section, values in experiment.items()}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        result.setdefault(section, {})[key] = value
    return result


def write_experiment(path: Path, experiment: dict[str, Any]) -> Path:
    """Write the YAML file a recipe reads."""
    path.write_text(yaml.safe_dump(experiment))
    return path
