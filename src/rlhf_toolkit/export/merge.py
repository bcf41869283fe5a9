"""``rlhf merge``: a LoRA adapter added to its base for good, on a CPU, one tensor in memory at a time.

    M = round(W + scale * B A)    summed in float32 and rounded once, to the base's dtype

What comes out is a model folder as the base's: same files, same names, same dtypes. Which stored tensor an adapted
layer is follows from the model itself, built without memory, and from transformers' own renaming of stored names.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from rlhf_toolkit.data.tokenizers import stop_token_ids
from rlhf_toolkit.errors import CheckpointError, ModelError, RLHFError, described, nearest
from rlhf_toolkit.export.folders import adapter_folder, base_name, model_folder, trained_quantised
from rlhf_toolkit.export.lora_weights import LoraWeights, read_lora
from rlhf_toolkit.export.own_tokenizer import GENERATION_CONFIG, own_tokenizer, tokenizer_files
from rlhf_toolkit.export.shards import FLOATING, INDEX, Shard, Stored, read_headers, rewrite
from rlhf_toolkit.models.loading import generation_eos_of, load_tokenizer

CONFIG = "config.json"
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf", ".onnx", ".index.json")
"""Endings of weights, in whatever format: they are the base's."""


@dataclass
class Merged:
    """What was done: the folder, the adapted layers, the base with its revision, whether the tokenizer is the
    adapter's, the base's files that were left out, and what rounding took.

    ``rounding`` is the norm of what rounding changed, over the norm of what the adapter adds, over all adapted layers:
    at 1 the merged model is as far from the trained one as the base is. ``note`` says where the adapter was trained on
    the base in fewer bits.
    """

    folder: Path
    layers: list[str]
    dtype: torch.dtype
    bytes: int
    base: str
    own_tokenizer: bool
    left_out: list[str] = field(default_factory=list)
    rounding: float = 0.0
    note: str | None = None


def merge(
    base: str,
    adapter: str,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write to ``out`` the model that ``adapter`` makes of ``base``; both are folders or names of the hub.

    Files are written beside ``out`` and renamed at the end: ``out`` is whole or not there. ``dtype`` replaces that of
    every stored number with a point. All other small files are the base's, the tokenizer too, unless one lies beside
    the adapter. A base of the hub is of the revision that the adapter names.

    Raises ModelError: the adapter is no plain LoRA, belongs to another base, or touches tied embeddings. Raises
    CheckpointError: ``out`` exists, or the disk has no room.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists; choose a new folder, or remove it first")
    lora = adapter_folder(adapter)
    base = base_name(base, [lora])
    source = model_folder(base)
    shards, weights = read_headers(source), read_lora(lora)
    model = empty_model(source, trust_remote_code=trust_remote_code)
    adapted = stored_updates(model, weights, shards, adapter=adapter, base=base)
    tokenizer, stops = own_tokenizer(lora, model.config, trust_remote_code=trust_remote_code)
    size = sum(tensor.cast(dtype).bytes for shard in shards.values() for tensor in shard.values())
    first = next(tensor for shard in shards.values() for name, tensor in shard.items() if name in adapted)
    word, note = dtype or FLOATING[first.dtype], trained_quantised(lora)
    merged = Merged(out, sorted(weights), word, size, base, tokenizer is not None, note=note)
    with _made_whole(out, size) as folder:
        sums = _Sums(adapted, dtype)
        for file, shard in shards.items():
            rewrite(source / file, folder / file, shard, sums.of, dtype=dtype)
        merged.rounding = sums.rounding
        merged.left_out = _copy_the_rest(source, folder, dtype, size)
        if merged.own_tokenizer:
            _take_tokenizer(lora, folder)
        name_stop_tokens(folder, model.config, also=stops, trust_remote_code=trust_remote_code)
    return merged


def empty_model(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of ``folder`` without weights: its modules, names and shapes. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"{folder} is quantised; merge into the model it was made from")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except RLHFError:
        raise
    except Exception as error:  # a config may hold anything, and its class do anything with it
        raise ModelError(
            f"{folder} has no config of a causal language model ({described(error)}); give the base the adapter was "
            "trained on"
        ) from error


def stored_updates(
    model: PreTrainedModel, weights: Mapping[str, LoraWeights], shards: Mapping[str, Shard], *, adapter: str, base: str
) -> dict[str, Callable[[], Tensor]]:
    """Stored name -> what the adapter adds to that tensor, in its own orientation: GPT-2 stores (in, out).

    Raises ModelError, by the layer's name, for a layer that the base lacks, that has another shape, that is tied to
    another, or that is stored in another form than it is used in.
    """
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    stored = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    keys = names_in_memory(model, stored)
    require_shapes(model, stored, keys, base)
    updates: dict[str, Callable[[], Tensor]] = {}
    modules = dict(model.named_modules())
    for layer, lora in weights.items():
        if layer not in modules:
            raise ModelError(
                f"{adapter} adapts {layer}, which {base} has not{nearest(layer, modules)}; the adapter belongs to "
                "another base"
            )
        module = modules[layer]
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(
                f"{adapter} adapts {layer}, a {type(module).__name__}; only linear layers can be merged here"
            )
        if f"{layer}.weight" in tied:
            raise ModelError(
                f"{adapter} adapts {layer}, which {base} ties to another layer: the sum would change both; use the "
                "adapter unmerged, or train without that layer"
            )
        turned = isinstance(module, Conv1D)
        shape = tuple(module.weight.shape[::-1] if turned else module.weight.shape)
        if shape != lora.shape:
            raise ModelError(
                f"{adapter} has {layer} with {_by(lora.shape)} (out x in), {base} has {_by(shape)}; the adapter "
                "belongs to another base"
            )
        key = keys.get(f"{layer}.weight")
        if key is None or stored[key].shape != tuple(module.weight.shape) or stored[key].dtype not in FLOATING:
            raise ModelError(
                f"{base} does not store {layer} as the matrix it is used as; merge in memory with PEFT's "
                "merge_and_unload"
            )
        updates[key] = lora.turned_update if turned else lora.update
    return updates


def names_in_memory(model: PreTrainedModel, stored: Mapping[str, Any]) -> dict[str, str]:
    """Name in the model -> stored name, for what transformers loads unchanged but for its name.

    Tensors that it splits, joins or transposes while loading are left out.
    """
    conversions, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    prefix, names = model.base_model_prefix, {}
    for key in stored:
        name, converted = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, converted = rename_source_key(key, [], [], prefix, known)
        if name in known and converted is None:
            names[name] = key
    return names


def require_shapes(model: PreTrainedModel, stored: Mapping[str, Stored], keys: Mapping[str, str], base: str) -> None:
    """Raise ModelError for a stored tensor that has another shape than the model's, or whole numbers for the model's
    fractions: it would be copied as it is, and no adapter looks at it."""
    for name, tensor in model.state_dict().items():
        found = stored[keys[name]] if name in keys else None
        if found is None:
            continue
        if found.shape != tuple(tensor.shape) or (tensor.is_floating_point() and found.dtype not in FLOATING):
            raise ModelError(
                f"{base} stores {keys[name]} as {found.dtype} {_by(found.shape)}, where its config asks for "
                f"{tensor.dtype} {_by(tuple(tensor.shape))}; fetch the model again"
            )


# ---- one tensor ------------------------------------------------------------------------------------------------------


class _Sums:
    """Each tensor with what the adapter adds to it, and what rounding those sums cost."""

    def __init__(self, adapted: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype | None) -> None:
        self.adapted, self.dtype = adapted, dtype
        self.lost = self.added = 0.0  # sums of squares of what rounding changed and of what the adapter adds

    def of(self, name: str, weight: Tensor) -> Tensor:
        """The stored tensor ``name`` after merging, in the dtype it will be stored in."""
        wanted = self.dtype if self.dtype is not None and weight.is_floating_point() else weight.dtype
        if not weight.isfinite().all():
            raise ModelError(f"{name} of the base holds NaN or infinity; fetch the model again")
        if name not in self.adapted:
            return _rounded(name, weight, wanted)
        update = self.adapted[name]()
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32)) + update
        if not exact.isfinite().all():
            raise ModelError(f"{name} with the adapter's part holds NaN or infinity; check the base and the adapter")
        merged = _rounded(name, exact, wanted)
        self.added += float(update.double().square().sum())
        self.lost += float((merged.double() - exact).square().sum())
        return merged

    @property
    def rounding(self) -> float:
        """``Merged.rounding``."""
        return math.sqrt(self.lost / self.added) if self.added else 0.0


def _rounded(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    result = exact.to(dtype)
    if dtype != exact.dtype and not torch.equal(result.isfinite(), exact.isfinite()):
        raise ModelError(f"{name} has numbers beyond the range of {str(dtype)[6:]}; use --dtype bfloat16 or float32")
    return result


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# ---- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def _made_whole(out: Path, size: int) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` at the end, or is removed."""
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    made = False
    try:
        folder.mkdir(parents=True)
        made = True
        free = shutil.disk_usage(folder).free
        if free < size:
            raise CheckpointError(
                f"{out} would take {size / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} left; make room or "
                "choose another disk"
            )
        yield folder
        folder.rename(out)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        way_out = "make room or choose another disk" if full else "choose a folder you may write to"
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}; {way_out}") from error
    finally:
        if made:
            shutil.rmtree(folder, ignore_errors=True)


def _copy_the_rest(source: Path, folder: Path, dtype: torch.dtype | None, size: int) -> list[str]:
    """Index, config and everything small; returns the names that were left out: other weights, folders, the card."""
    left_out = []
    for path in sorted(source.iterdir()):
        ours = (folder / path.name).exists() or path.name == INDEX
        if path.name == CONFIG and dtype is not None:
            _write(folder / CONFIG, _with_dtype(json.loads(path.read_text(encoding="utf-8")), str(dtype)[6:]))
        elif path.is_file() and not path.name.endswith(NOT_COPIED) and path.name.lower() != "readme.md":
            shutil.copyfile(path, folder / path.name)
        elif not ours:
            left_out.append(path.name)
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        told = index.get("metadata")
        told = told if isinstance(told, dict) else {}
        _write(folder / INDEX, {**index, "metadata": {**told, "total_size": size}})
    return left_out


def _take_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer of ``source`` in the place of that in ``folder``."""
    for path in tokenizer_files(folder):
        path.unlink()
    for path in tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)


def name_stop_tokens(
    folder: Path, config: PretrainedConfig, *, also: Sequence[int] = (), trust_remote_code: bool
) -> None:
    """Have the generation config of a model's ``folder`` name every token that ends a response.

    That is the tokenizer's eos, with which training ends each, and ``also`` those, beside what the config names itself:
    ``generate`` knows no others and would never stop.
    """
    if not tokenizer_files(folder):
        return
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    named = generation_eos_of(str(folder), config)
    already = {named} if isinstance(named, int) else set(named or ())
    if {tokenizer.eos_token_id, *also} - {None} <= already:
        return
    path = folder / GENERATION_CONFIG
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    else:
        content = GenerationConfig.from_model_config(config).to_diff_dict()
    _write(path, {**content, "eos_token_id": list(stop_token_ids(tokenizer, named, also=also))})


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config, and the parts it has, with their word for the dtype replaced."""
    inner = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in inner.items()}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
