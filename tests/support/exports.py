"""Model and adapter folders of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.support.builders import tiny_tokenizer
from tests.support.roles import lora
from tests.support.tiny import WORDS, tiny_llama


def tiny_gpt2() -> PreTrainedModel:
    """Conv1D layers, tied embeddings."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    )


def write_base(
    folder: Path,
    model: PreTrainedModel | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **tokenizer: Any,
) -> Path:
    """A model folder; ``shard`` is the largest size of a file."""
    written: Any = model or tiny_llama()
    written.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer(words=WORDS, **{"pad": "</s>", "chat_template": None, **tokenizer}).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, *, seed: int = 1, config: LoraConfig | None = None, **options: Any) -> Path:
    """An adapter on ``base`` that says something, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    get_peft_model(model, config or lora(**options)).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def peft_model(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Base and adapter in PEFT's own hands."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).to(dtype).eval()
