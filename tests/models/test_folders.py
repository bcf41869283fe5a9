"""Which files of weights a local folder must have: those that transformers would read, in its own order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.folders import check_weights_are_here

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
