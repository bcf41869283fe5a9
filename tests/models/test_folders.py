"""Which files of weights a local folder must have: those that transformers would read, in its own order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.folders import check_model_folder, check_weights_are_here
from rlhf_toolkit.models.loading import load_tokenizer, refuse_larger
from tests.distributed.test_quantised_base import ALONE, base_on
from tests.support.builders import tiny_tokenizer
from tests.support.offenders import for_each
from tests.support.tiny import tiny_llama

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OLD_SHARDS = ("pytorch_model-00001-of-00002.bin",)
INDEX, OLD_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SOUND = {
    "one file": {"model.safetensors"},
    "shards": {INDEX, *SHARDS},
    "old ones": {"pytorch_model.bin"},
    "old shards": {OLD_INDEX, *OLD_SHARDS},
    "shards beside an old index whose files were not fetched": {INDEX, *SHARDS, OLD_INDEX},
    "one file beside a stale index": {"model.safetensors", INDEX},
    "a file of another name": {"other.safetensors"},
}
BROKEN = {
    "no weights": (set(), "has no model.safetensors, nor other weights"),
    "a shard is missing": ({INDEX, SHARDS[0]}, f"lacks {SHARDS[1]}, one of 1 files that {INDEX} names"),
    "all old shards are missing": ({OLD_INDEX}, f"lacks {OLD_SHARDS[0]}, one of 1 files that {OLD_INDEX} names"),
}


def folder_of(folder: Path, names: set[str]) -> str:
    folder.mkdir()
    named = {"transformers_weights": "other.safetensors"} if "other.safetensors" in names else {}
    (folder / "config.json").write_text(json.dumps(named))
    for name in names:
        shards = SHARDS if name == INDEX else OLD_SHARDS
        index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
        (folder / name).write_text(json.dumps(index) if name.endswith(".json") else "")
    return str(folder)


def test_a_folder_that_transformers_reads_is_complete(tmp_path: Path) -> None:
    for number, names in enumerate(SOUND.values()):
        check_weights_are_here(folder_of(tmp_path / str(number), names))
    check_weights_are_here("a/hub-name")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for number, (names, words) in enumerate(BROKEN.values()):
        with pytest.raises(ModelError) as raised:
            check_weights_are_here(folder_of(tmp_path / str(number), names))
        assert words in str(raised.value)


HOSTILE = {
    "a text a thousand times longer, twice": (
        "tokenizer.json",
        {"normalizer": {"normalizers": 2 * [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}]}},
        "may make a text",
    ),
    "the same in a decoder": (
        "tokenizer.json",
        {"decoder": {"decoders": 5 * [{"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}]}},
        "may make a text",
    ),
    "compiled code of the hub's": ("config.json", {"_attn_implementation": "owner/kernel"}, "code of the hub's"),
    "the same for a part": ("config.json", {"attn_implementation": {"text_config": "a/b"}}, "code of the hub's"),
    "labels without end": ("config.json", {"num_labels": 10**9}, "num_labels=1000000000"),
    "no layers": ("config.json", {"num_hidden_layers": -1}, "num_hidden_layers=-1"),
}


@for_each("name", HOSTILE)
def test_a_setting_that_harms_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    file, content, words = HOSTILE[name]
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words):
        check_model_folder(str(tmp_path))


def test_a_tokenizer_of_sentence_pieces_is_none_of_these(tmp_path: Path) -> None:
    steps = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"normalizer": {"type": "Sequence", "normalizers": steps}}))
    check_model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"attn_implementation": "sdpa", "num_nextn_predict_layers": 0}))
    check_model_folder(str(tmp_path))


@for_each("side", ["vocab_size", "hidden_size", "intermediate_size"])
def test_a_config_of_a_far_larger_model_is_refused(tmp_path: Path, side: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100_000)
    sizes: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    refuse_larger(str(tmp_path), LlamaConfig(**sizes))
    with pytest.raises(ModelError, match=f"{side}="):
        refuse_larger(str(tmp_path), LlamaConfig(**{**sizes, side: 10**8 if side != "hidden_size" else 2**17}))


def test_of_a_run_folder_the_adapter_is_to_be_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    (tmp_path / "debug.log").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match=f"{tmp_path} is a run folder: name what it has trained, such as .*/policy"):
        check_model_folder(str(tmp_path))


def test_weights_that_are_no_weights_are_named(tmp_path: Path) -> None:
    """Whole numbers, which would be taken as they are; a link to itself; a length of texts that is a word."""
    whole, looped, worded = (tmp_path / name for name in ("whole", "looped", "worded"))
    for folder in (whole, looped, worded):
        model = tiny_llama()
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    weights = load_file(whole / "model.safetensors")
    last = sorted(weights)[-1]
    save_file({**weights, last: weights[last].to(torch.int64)}, whole / "model.safetensors", {"format": "pt"})
    (looped / "model.safetensors").unlink()
    (looped / "model.safetensors").symlink_to("model.safetensors")
    settings = json.loads((worded / "tokenizer_config.json").read_text())
    (worded / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": "seven"}))
    for folder, words in ((whole, rf"holds '{last}' as I64.*fetch"), (looped, "cannot load the model")):
        with pytest.raises(ModelError, match=words) as caught:
            base_on(str(folder), ALONE, "none")
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"model_max_length='seven' in its tokenizer_config\.json, which is no number"):
        load_tokenizer(str(worded))
