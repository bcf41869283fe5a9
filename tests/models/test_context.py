"""Sequences longer than a model's positions: refused where reading would fail, a warning where it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from rlhf_toolkit.errors import ConfigError, ModelError
from rlhf_toolkit.models.context import TABLES, check_context, longest_context
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.offenders import for_each
from tests.support.tiny import merged, write_task

LIMIT = 16
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), LIMIT),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff"), 32),
    "vocab_size": 50,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_types": [[["global"], 1]],
}
GO_ON = ("llama", "gpt_neox", "phi", "bloom", "xglm")


def tiny_config(kind: str) -> PretrainedConfig:
    usual = CONFIG_MAPPING[kind]()
    return CONFIG_MAPPING[kind](**{name: value for name, value in SIZES.items() if hasattr(usual, name)})


@for_each("kind", [*TABLES, *GO_ON])
def test_what_fails_beyond_its_positions_is_refused_and_what_goes_on_is_not(kind: str) -> None:
    """The oracle is the model itself, which reads one token more than its config says."""
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.ones(1, LIMIT + 1, dtype=torch.long)
    known = {"what": "a row", "way_out": "cut it"}
    if kind in GO_ON:
        assert model(input_ids=tokens).logits.isfinite().all()
        assert ("beyond them nothing was trained" in (check_context("m", config, LIMIT + 1, **known) or "")) == (
            longest_context(config) is not None
        )
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens)
        with pytest.raises(ConfigError, match=f"a row has {LIMIT + 1} tokens, but m was made for at most {LIMIT}, whe"):
            check_context("m", config, LIMIT + 1, **known)
    assert model(input_ids=tokens[:, :LIMIT]).logits.isfinite().all()
    assert check_context("m", config, LIMIT, **known) is None


def test_a_run_says_it_before_any_weights_are_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path)
    sizes: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 8}
    changes = {"rollout.max_new_tokens": 12}
    LlamaConfig(
        **sizes, **{name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    ).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ModelError, match="cannot load the model"
    ):  # the old weights do not fit: that comes after the warning
        prepare(experiment_from_dict(merged(task, changes)))
    assert "beyond them nothing was trained; lower rollout.max_new_tokens or data.max" in capsys.readouterr().out
    GPT2Config(**sizes).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"the longest prompt \(\d+ tokens\) with its response .*=12\) has \d+ tokens"
    ):
        prepare(
            experiment_from_dict(merged({**task, "run": {**task["run"], "output_dir": str(tmp_path / "b")}}, changes))
        )
