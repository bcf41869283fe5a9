"""A merged folder against PEFT's own merge and against base and adapter unmerged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter, namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from rlhf_toolkit.errors import CheckpointError, ModelError, RLHFError
from rlhf_toolkit.export import merge as merging
from rlhf_toolkit.export import shards
from rlhf_toolkit.export.merge import merge
from rlhf_toolkit.export.shards import INDEX
from rlhf_toolkit.export.verify import verify
from rlhf_toolkit.models.loading import generation_eos_of, load_tokenizer
from tests.models.test_architectures import RECURRENT
from tests.support.exports import peft_model, tiny_gpt2, write_adapter, write_base
from tests.support.offenders import for_each
from tests.support.roles import lora
from tests.support.tiny import tiny_llama

IDS = torch.tensor([[3, 9, 27, 4, 5, 6, 31, 2], [8, 8, 1, 7, 20, 21, 22, 23]])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"v_proj": 11, "^model.layers.0.mlp.down_proj": 1},
    },
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"o_proj": 3}},
    "two layers": {"target_modules": ["q_proj", "down_proj"]},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "the output layer": {"target_modules": ["lm_head", "v_proj"]},
}
ADAPTED = ("in_proj_qkv", "out_proj", "q_proj", "up_proj")


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---- the sum ---------------------------------------------------------------------------------------------------------


@for_each("named", [None, 7, [7, 9]])
def test_the_merged_model_stops_where_training_ends_a_response(tmp_path: Path, named: int | list[int] | None) -> None:
    """The tokenizer's eos is another token than those that the base's generation config names."""
    base = write_base(tmp_path / "base")
    eos = load_tokenizer(str(base)).eos_token_id
    path = base / "generation_config.json"
    path.unlink(missing_ok=True)
    if named is not None:
        path.write_text(json.dumps({"eos_token_id": named, "top_k": 5}))
    merge(str(base), str(write_adapter(tmp_path / "policy", base)), tmp_path / "out")
    known = generation_eos_of(str(base), AutoConfig.from_pretrained(base))
    found = loaded(tmp_path / "out").generation_config
    assert set(found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]) == {
        eos,
        *(known if isinstance(known, list) else [known]),
    }
    assert named is None or found.top_k == 5


@for_each("name", SETTINGS)
def test_merged_is_pefts_own_merge_and_speaks_as_base_and_adapter(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "policy", base, **SETTINGS[name])
    merge(str(base), str(adapter), tmp_path / "out")
    unmerged = logits(peft_model(base, adapter))
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), unmerged, rtol=1e-4, atol=1e-5)
    assert (unmerged - logits(loaded(base))).abs().max() > 5e-3  # the adapter says something
    exact = peft_model(base, adapter, torch.float64).merge_and_unload().state_dict()
    for key, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), exact[key], rtol=1e-6, atol=1e-7)


def test_gpt2_stores_its_matrices_the_other_way_round(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tiny_gpt2())
    adapter = write_adapter(tmp_path / "policy", base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merge(str(base), str(adapter), tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(peft_model(base, adapter)), rtol=1e-4, atol=1e-5
    )


@for_each("name", ["qwen3_5", "qwen3_5 with vision"])
def test_a_model_with_states_and_the_text_part_of_one_that_can_see(tmp_path: Path, name: str) -> None:
    """What a vision tower has stored stays as it is; the adapter has the names of the text model alone."""
    case = RECURRENT[name]
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if name.endswith("vision") else AutoModelForCausalLM
    base = write_base(tmp_path / "base", kind.from_config(CONFIG_MAPPING[case.model_type](**case.sizes)))
    adapter = write_adapter(tmp_path / "policy", base, target_modules=list(ADAPTED))
    merge(str(base), str(adapter), tmp_path / "out")
    unmerged = logits(peft_model(base, adapter))
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), unmerged, rtol=1e-4, atol=1e-5)
    assert (unmerged - logits(loaded(base))).abs().max() > 1e-3
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and any("visual" in key for key in before) == name.endswith("vision")
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed and all(key.rsplit(".", 2)[1] in ADAPTED for key in changed)


def test_names_stored_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """GPT-2 of the hub stores h.0.attn..., the model calls it transformer.h.0.attn..."""
    base = write_base(tmp_path / "base", tiny_gpt2())
    path = base / "model.safetensors"
    bare = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "policy", base, target_modules=["c_fc"], fan_in_fan_out=True)
    merge(str(base), str(adapter), tmp_path / "out")
    assert set(tensors(tmp_path / "out")) == set(bare)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(peft_model(base, adapter)), rtol=1e-4, atol=1e-5
    )


def test_a_bfloat16_base_is_summed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "policy", base, target_modules=["q_proj"])
    done = merge(str(base), str(adapter), tmp_path / "out")
    before, after, parts = tensors(base), tensors(tmp_path / "out"), tensors(adapter)
    assert set(before) == set(after) and done.dtype == torch.bfloat16
    lost = added = 0.0
    for key, weight in before.items():
        if "q_proj" not in key:
            assert torch.equal(after[key], weight) and after[key].dtype == weight.dtype
            continue
        a, b = (parts[f"base_model.model.{key[:-7]}.lora_{part}.weight"] for part in "AB")
        exact = weight.float() + 6 / 3 * (b @ a)
        assert torch.equal(after[key], exact.bfloat16())
        assert not torch.equal(after[key], weight + (2 * (b @ a)).bfloat16())  # rounded twice would differ
        lost += float((exact.bfloat16().double() - exact.double()).square().sum())
        added += float((2.0 * b.double() @ a.double()).square().sum())
    assert done.rounding == pytest.approx((lost / added) ** 0.5, rel=1e-3) and done.rounding > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_dtype_is_rounded_to_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "policy", base, target_modules=["q_proj"])
    merge(str(base), str(adapter), tmp_path / "out", dtype=dtype)
    merge(str(base), str(adapter), tmp_path / "exact", dtype=torch.float32)
    exact, rounded = tensors(tmp_path / "exact"), tensors(tmp_path / "out")
    assert all(torch.equal(rounded[key], exact[key].to(dtype)) for key in exact)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype)[6:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


# ---- shards ----------------------------------------------------------------------------------------------------------


class Watched:
    """safe_open, with every read of a tensor counted and the largest amount of tensors alive at one time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: Counter[tuple[str, str]] = Counter()
        self.alive = self.most_alive = 0
        monkeypatch.setattr(shards, "safe_open", self.open)

    def open(self, path: Path, **options: Any) -> Any:
        watcher = self

        class File:
            def __enter__(self) -> Any:
                self.file = safe_open(path, **options).__enter__()
                return self

            def __exit__(self, *trace: object) -> None:
                return None

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def get_tensor(self, name: str) -> Tensor:
                watcher.reads[Path(path).name, name] += 1
                return watcher.followed(self.file.get_tensor(name))

        return File()

    def followed(self, tensor: Tensor) -> Tensor:
        import weakref

        size = tensor.nbytes
        self.alive += size
        self.most_alive = max(self.most_alive, self.alive)

        def gone() -> None:
            self.alive -= size

        weakref.finalize(tensor, gone)
        return tensor


def test_shards_are_read_once_and_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    adapter = write_adapter(tmp_path / "policy", base)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    stored = tensors(base)
    assert len(files) > 3
    watched = Watched(monkeypatch)
    merge(str(base), str(adapter), tmp_path / "out")
    assert {name for _, name in watched.reads} == set(stored) and set(watched.reads.values()) == {1}
    assert watched.most_alive <= 2 * max(tensor.nbytes for tensor in stored.values())  # the next is read, then one goes
    assert watched.most_alive < sum(tensor.nbytes for tensor in stored.values()) / 4
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    index, old = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path / "out", base))
    assert index == old
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(peft_model(base, adapter)), rtol=1e-4, atol=1e-5
    )


def test_the_index_counts_the_bytes_of_another_dtype(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    merge(str(base), str(write_adapter(tmp_path / "policy", base)), tmp_path / "out", dtype=torch.float16)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())


def test_a_file_written_tensor_by_tensor_is_what_safetensors_reads(tmp_path: Path) -> None:
    """All kinds of numbers, odd sizes, a scalar and an empty tensor, through the writer unchanged."""
    torch.manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    content = {f"f{i}": torch.randn(3, 5, dtype=kind) for i, kind in enumerate(kinds)}
    content |= {"i": torch.arange(7), "b": torch.tensor([True, False, True]), "u": torch.arange(5, dtype=torch.uint8)}
    content |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "half": torch.arange(3, dtype=torch.int16)}
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "ü"})
    (shard,) = shards.read_headers(tmp_path).values()
    shards.rewrite(tmp_path / "model.safetensors", tmp_path / "copy.safetensors", shard, lambda _, tensor: tensor)
    copied = load_file(tmp_path / "copy.safetensors")
    assert set(copied) == set(content)
    for name, tensor in content.items():
        assert torch.equal(copied[name], tensor) and copied[name].dtype == tensor.dtype
    with safe_open(tmp_path / "copy.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}


# ---- everything beside weights ---------------------------------------------------------------------------------------


def test_small_files_are_copied_and_the_rest_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template="{{ messages }}")
    (base / "pytorch_model.bin").write_text("weights of the base")
    (base / "README.md").write_text("card of the base")
    (base / "LICENSE").write_text("licence")
    (base / "onnx").mkdir()
    done = merge(str(base), str(write_adapter(tmp_path / "policy", base)), tmp_path / "out")
    assert done.left_out == ["README.md", "onnx", "pytorch_model.bin"]
    copied = {path.name for path in (tmp_path / "out").iterdir()} - {"model.safetensors"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"} <= copied
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "policy", "out"}  # nothing beside it


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, base: Path, adapter: Path, kind: type[RLHFError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        merge(str(base), str(adapter), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


def test_an_adapter_of_a_wider_base_names_the_layer(tmp_path: Path) -> None:
    base, wide = write_base(tmp_path / "base"), write_base(tmp_path / "wide", tiny_llama(intermediate_size=64))
    message = refused(tmp_path, base, write_adapter(tmp_path / "policy", wide))
    assert "model.layers.0.mlp.down_proj with 32 x 64 (out x in)" in message and "32 x 48" in message


def test_an_adapter_of_a_deeper_base_names_the_layer(tmp_path: Path) -> None:
    base, deep = write_base(tmp_path / "base"), write_base(tmp_path / "deep", tiny_llama(num_hidden_layers=3))
    message = refused(tmp_path, base, write_adapter(tmp_path / "policy", deep))
    assert "adapts model.layers.2.mlp.down_proj, which" in message and "another base" in message


def test_the_output_layer_of_tied_embeddings_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tiny_llama(tie_word_embeddings=True))
    assert "adapts lm_head, which" in refused(
        tmp_path, base, write_adapter(tmp_path / "policy", base, target_modules=["lm_head"])
    )


def test_other_layers_of_a_model_with_tied_embeddings_are_merged(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tiny_llama(tie_word_embeddings=True))
    adapter = write_adapter(tmp_path / "policy", base)
    merge(str(base), str(adapter), tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(peft_model(base, adapter)), rtol=1e-4, atol=1e-5
    )


REFUSED: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "use_dora": {"use_dora": True},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "bias": {"bias": "all"},
    "trainable_token_indices": {"trainable_token_indices": [3]},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "lora_embedding_A": {"target_modules": ["embed_tokens"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3]},
}


@for_each("name", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    assert name in refused(tmp_path, base, write_adapter(tmp_path / "policy", base, **REFUSED[name]))


def test_a_start_that_changes_the_base_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    assert "init_lora_weights='pissa'" in refused(
        tmp_path, base, write_adapter(tmp_path / "policy", base, config=lora(init_lora_weights="pissa"))
    )


def test_a_setting_of_a_newer_peft_is_refused(tmp_path: Path) -> None:
    """PEFT itself drops what it does not know with a warning."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "policy", base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_tomorrows_lora": True, "other": None}))
    assert "use_tomorrows_lora=True, which this version of PEFT does not know" in refused(tmp_path, base, adapter)


def test_experts_that_transformers_stores_otherwise_are_refused(tmp_path: Path) -> None:
    """Mixtral's experts are one tensor in memory and many on disk; its attention merges."""
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    base = write_base(tmp_path / "base", MixtralForCausalLM(config))
    adapter = write_adapter(tmp_path / "policy", base, target_modules=["q_proj", "v_proj"])
    merge(str(base), str(adapter), tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(peft_model(base, adapter)), rtol=1e-4, atol=1e-5
    )
    shutil.rmtree(tmp_path / "out")
    experts = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    assert "target_parameters" in refused(tmp_path, base, write_adapter(tmp_path / "experts", base, config=experts))


def change_adapter(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = adapter / "adapter_model.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path)


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "half a pair": (lambda t: (t.pop(min(t)), None)[1], "has only lora_B of model.layers.0.mlp.down_proj"),
    "NaN": (lambda t: (t[min(t)].fill_(float("nan")), None)[1], "NaN or infinity"),
    "another rank": (
        lambda t: t.update({min(t): torch.zeros(4, 48)}),
        "of ranks (4, 3) in model.layers.0.mlp.down_proj",
    ),
    "empty": (lambda t: t.clear(), "nothing to merge"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapters_are_refused(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "policy", base)
    change_adapter(adapter, BROKEN[name][0])
    assert BROKEN[name][1] in refused(tmp_path, base, adapter)


def test_an_embedding_saved_with_the_adapter_is_refused(tmp_path: Path) -> None:
    """PEFT saves the base's own output layer beside its adapter unless it is told not to."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "policy", base, target_modules=["lm_head"])
    name = "base_model.model.lm_head.base_layer.weight"
    change_adapter(adapter, lambda t: t.update({name: torch.zeros(32, 32)}))
    assert f"{name}, which is no LoRA matrix" in refused(tmp_path, base, adapter)


def test_an_adapter_with_a_scalar_head_and_a_run_folder_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "run/value", base)
    assert f"it has {tmp_path}/run/value" in refused(tmp_path, base, tmp_path / "run")
    save_file({"weight": torch.zeros(32)}, adapter / "value_head.safetensors")
    assert "value_head.safetensors" in refused(tmp_path, base, adapter)


def test_bases_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    adapter = write_adapter(tmp_path / "policy", base)
    assert "is no folder; give the folder of a model" in refused(tmp_path, tmp_path / "none", adapter)
    first = min(base.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-8])
    assert f"{first} cannot be read" in refused(tmp_path, base, adapter)
    first.unlink()
    assert f"{first} cannot be read" in refused(tmp_path, base, adapter)
    (base / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor" in refused(tmp_path, base, adapter)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "policy", base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    assert "is quantised" in refused(tmp_path, base, adapter)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[3] = 1e6
    base = write_base(tmp_path / "base", model, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "policy", base)
    with pytest.raises(ModelError, match=r"model\.norm\.weight has numbers beyond the range of float16"):
        merge(str(base), str(adapter), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists; choose a new folder"):
        merge(str(base), "none", tmp_path / "out")


@pytest.mark.parametrize("when", ["at the start", "half way"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    adapter = write_adapter(tmp_path / "policy", base)
    if when == "at the start":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    else:
        real, calls = shards.rewrite, []

        def rewrite(*args: Any, **options: Any) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*args, **options)

        monkeypatch.setattr(merging, "rewrite", rewrite)
    message = refused(tmp_path, base, adapter, CheckpointError)
    assert "make room or choose another disk" in message
    assert {path.name for path in tmp_path.iterdir()} == {"base", "policy"}


def test_a_name_of_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real call, without its network: the cache is asked, and a miss says so."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "policy", base)
    message = refused(tmp_path, Path("somebody/some-model"), adapter)
    assert "somebody/some-model is no folder here and the hub does not give it" in message
    asked: list[Any] = []

    def fetch(*args: Any, **options: Any) -> Path:
        asked.append((args, options))
        return base

    monkeypatch.setattr("rlhf_toolkit.export.folders.snapshot_download", fetch)
    merge("somebody/some-model", str(adapter), tmp_path / "out")
    assert asked[0][0] == ("somebody/some-model",) and "*.safetensors" in asked[0][1]["allow_patterns"]


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_accepts_a_merged_model_and_refuses_others(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", dtype=dtype)
    adapter = write_adapter(tmp_path / "policy", base)
    merge(str(base), str(adapter), tmp_path / "out")
    found = verify(str(base), str(adapter), tmp_path / "out", dtype=dtype, sequences=2)
    assert 0 < found.difference <= found.tolerance < found.moved
    other = write_adapter(tmp_path / "other", base, seed=2)
    for wrong in (other, write_adapter(tmp_path / "stronger", base, lora_alpha=12)):
        with pytest.raises(ModelError, match="more than rounding to"):
            verify(str(base), str(wrong), tmp_path / "out", dtype=dtype, sequences=2)


def weaken(adapter: dict[str, Tensor]) -> None:
    for name, tensor in adapter.items():
        if "lora_B" in name:
            tensor.mul_(1e-4)


def test_verify_says_where_rounding_lost_the_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "policy", base)
    change_adapter(adapter, weaken)
    done = merge(str(base), str(adapter), tmp_path / "out")
    assert done.rounding > 0.5
    with pytest.raises(ModelError, match="rounding to bfloat16 lost the adapter; merge with --dtype float32"):
        verify(str(base), str(adapter), tmp_path / "out", dtype=torch.bfloat16, sequences=2)
    merge(str(base), str(adapter), tmp_path / "exact", dtype=torch.float32)
    verify(str(base), str(adapter), tmp_path / "exact", dtype=torch.float32, sequences=2)


# ---- names and links of a stranger's folder --------------------------------------------------------------------------


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value))


def map_first_weight_to(file: object, value: dict[str, Any]) -> None:
    value["weight_map"].update({min(value["weight_map"]): file})


def update_with(settings: Any, value: dict[str, Any]) -> None:
    value.update(settings)


def test_no_name_of_a_base_leads_out_of_its_folder(tmp_path: Path) -> None:
    """Each would be read, or written beside or into, wherever it leads."""
    base = write_base(tmp_path / "base", shard="20KB")
    adapter, victim, index = write_adapter(tmp_path / "adapter", base), tmp_path / "evil.safetensors", base / INDEX
    victim.write_bytes(next(base.glob("*.safetensors")).read_bytes())
    before, sound = victim.read_bytes(), index.read_text()
    accepted: list[Any] = []
    for name in ("../evil.safetensors", str(victim), "a/../../evil.safetensors", "..", ".", "", "a\\b", "a\0", 3, None):
        index.write_text(sound)
        rewrite_json(index, partial(map_first_weight_to, name))
        message = refused(tmp_path, base, adapter)
        accepted += [] if "no name of a file in that folder" in message else [(name, message)]
    for text in ("", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\ud800"):
        index.write_text(text, errors="surrogatepass")
        accepted += [] if str(index) in refused(tmp_path, base, adapter) else [text]
    index.write_text(sound)
    for file, settings in [
        ("config.json", {"auto_map": {"AutoConfig": "../evil.Config"}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "/tmp/evil.Model"}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "a/b--../evil.Model"}}),
        ("config.json", {"transformers_weights": "../evil.safetensors"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["../evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}),
    ]:
        old = (base / file).read_text()
        rewrite_json(base / file, partial(update_with, settings))
        accepted += [] if "no name of a file in that folder" in refused(tmp_path, base, adapter) else [settings]
        with pytest.raises(ModelError, match="no name of a file in that folder"):
            load_tokenizer(str(base))
        (base / file).write_text(old)
    assert not accepted and victim.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_no_link_out_of_a_folder_is_followed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter, secret = write_adapter(tmp_path / "adapter", base), tmp_path / "secret"
    secret.write_text("secret")
    for link in (base / "notes.txt", base / "deep", adapter / "adapter_model.bin"):
        link.symlink_to(secret)
        assert f"{link} is a link to something outside" in refused(tmp_path, base, adapter)
        link.unlink()
    (base / "notes.txt").symlink_to("config.json")
    merge(str(base), str(adapter), tmp_path / "merged")
    assert (tmp_path / "merged" / "notes.txt").read_text() == (base / "config.json").read_text()
    assert not (tmp_path / "merged" / "notes.txt").is_symlink()


def test_a_link_in_the_place_of_the_result_is_left_alone(tmp_path: Path) -> None:
    base, out, kept = write_base(tmp_path / "base"), tmp_path / "out", tmp_path / "kept"
    adapter = write_adapter(tmp_path / "adapter", base)
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists; choose a new folder"):
        merge(str(base), str(adapter), out)
    out.unlink()
    kept.mkdir()
    (kept / "file").touch()
    partial = tmp_path / f".out.partial-{os.getpid()}"
    kept.rename(partial)  # foreseen by somebody: neither used nor removed
    with pytest.raises(CheckpointError, match="cannot be written"):
        merge(str(base), str(adapter), out)
    assert (partial / "file").exists()
