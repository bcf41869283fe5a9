"""What a model folder or an adapter may name and link to: files of its own, and nothing beyond them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from rlhf_toolkit.errors import ModelError, described, shortened
from rlhf_toolkit.files import MOST_BYTES_OF_JSON, is_plain_name, link_outside, special_file
from rlhf_toolkit.models.adapter_files import check_adapter_config
from rlhf_toolkit.run_claims import RUN_FILE

WHOLE_NUMBERS = ("I", "U", "BOOL")
"""How safetensors' names of dtypes begin that hold no fractions."""
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS_FILES = ("model.safetensors", INDEX_FILES[0], "pytorch_model.bin", INDEX_FILES[1])
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json")
NAMES_A_FILE = ("transformers_weights", "fast_tokenizer_files")
"""Settings of ``CONFIGS`` whose value transformers opens in the folder: a name, or a list of them."""
KERNELS = ("attn_implementation", "attn_implementation_internal", "experts_implementation")
"""Settings of a config that transformers takes for a repository of compiled code where they hold a slash."""
TOKENIZER = "tokenizer.json"
REPLACING = ("content", "replacement", "prepend")
MOST_GROWTH = 10_000
"""How many times longer a tokenizer may make a text before it cuts it."""
COUNTS = re.compile(r"layer|block|expert|n_head|num_.*heads|depth|num_labels")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
MOST_LAYERS, MOST_EXPERTS = 4096, 2**15
"""No model has so many layers, heads or labels, or experts: a dense Doge names 16,384 of them."""
CLASS = re.compile(r"([\w.-]+(/[\w.-]+)?--)?[A-Za-z_]\w*\.[A-Za-z_]\w*")
"""``modeling_x.Class``, or with ``owner/name--`` before it, as ``auto_map`` says where remote code is."""


def check_model_folder(name: str) -> None:
    """Raise ModelError where the local folder ``name`` links to something outside or names a file that is not its own.

    Looked at are the indices of weights, ``auto_map``, and the configs' settings that are file names. Links into the
    hub's cache are the hub's own. A ``name`` of the hub has nothing to be looked at before it is fetched.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    link = link_outside(folder, Path(constants.HF_HUB_CACHE))
    if link is not None:
        way_out = "put the file itself there"
        if (folder / RUN_FILE).is_file():  # W&B has links there
            way_out = f"{folder} is a run folder: name what it has trained, such as {folder / 'policy'}"
        raise ModelError(f"{link} is a link to something outside of its folder; {way_out}")
    odd = special_file(folder)
    if odd is not None:
        raise ModelError(f"{odd} is a pipe, a socket or a device, not a file; remove it")
    if (folder / TOKENIZER).is_file():
        check_growth(folder / TOKENIZER)
    for index in INDEX_FILES:
        if (folder / index).is_file():
            weight_map(folder / index)
    for path in (folder / config for config in CONFIGS if (folder / config).is_file()):
        found = _object(path)
        for key in NAMES_A_FILE:
            for file in _each(found.get(key)):
                if not is_plain_name(file):
                    raise _foreign(path, key, file)
        for code in _each(found.get("auto_map")):
            if not isinstance(code, str) or not CLASS.fullmatch(code) or ".." in code:
                raise _foreign(path, "auto_map", code)
        _check_counts(path, found)
        for key, value in found.items():
            if key.removeprefix("_") in KERNELS and any("/" in str(each) for each in _each(value)):
                raise ModelError(f"{path} has {key}={shortened(value)}, code of the hub's; remove it")
        if path.name == "adapter_config.json":
            check_adapter_config(folder, found)


def commit_of(name: str, revision: str) -> str | None:
    """The commit of the hub that ``revision`` of the model ``name`` was when its config was fetched; None for a folder,
    or where that is not in the cache."""
    if Path(name).expanduser().is_dir():
        return None
    try:
        found = try_to_load_from_cache(name, CONFIGS[0], revision=revision)
    except HFValidationError:  # of a model that a program has given, whatever that came from
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def check_weights_are_here(name: str) -> None:
    """Raise ModelError where the local folder ``name`` has no weights, or lacks a file that its index of them names."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    config = _object(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = [name for name in _each(config.get(NAMES_A_FILE[0])) if isinstance(name, str)]
    # In transformers' own order: what it finds first it loads, whatever else lies there.
    first = next((name for name in (*named, *WEIGHTS_FILES) if (folder / name).is_file()), None)
    if first is None:
        raise ModelError(f"{folder} has no {(*named, *WEIGHTS_FILES)[0]}, nor other weights; fetch the model again")
    files = sorted(set(weight_map(folder / first).values())) if first.endswith(".index.json") else []
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, one of {len(missing)} files that {first} names; fetch it again")


def check_floating_point(name: str) -> None:
    """Raise ModelError where a file of the local folder ``name`` holds a weight in whole numbers, which transformers
    would take for what it asks for. A file that cannot be read is told by whoever loads it."""
    for path in sorted(Path(name).expanduser().glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys() if key.endswith(".weight")}  # noqa: SIM118
        except (SafetensorError, OSError):
            continue
        for key, dtype in dtypes.items():
            if dtype.startswith(WHOLE_NUMBERS):
                raise ModelError(
                    f"{path} holds {shortened(key)} as {dtype}, and its config knows of no quantisation; fetch the "
                    "model again"
                )


def weight_map(index: Path) -> Mapping[str, str]:
    """Tensor -> file, as an index of weights says. Raises ModelError where the index is broken or names a file of
    another folder."""
    files = _object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{index} holds no weight_map; fetch the model again")
    for tensor, file in files.items():
        if not is_plain_name(file):
            raise _foreign(index, f"weight_map.{tensor}", file)
    return files


def check_growth(path: Path) -> None:
    """Raise ModelError where the steps of a tokenizer.json, one after another, replace a letter by a longer text so
    often that no memory would hold what becomes of a prompt, or of a response that is decoded."""
    found = _object(path)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth, waiting = 1, [found.get(part)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                longest = max((len(value[key]) for key in REPLACING if isinstance(value.get(key), str)), default=1)
                growth *= max(1, longest if value.get("type") != "Precompiled" else 20)
            waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            if growth > MOST_GROWTH:
                raise ModelError(f"{path} has a {part} that may make a text {MOST_GROWTH} times longer; repair it")


def _check_counts(path: Path, config: Mapping[str, Any]) -> None:
    """A model is built layer by layer before its weights are looked at: a number of them must be one."""
    waiting: list[Mapping[str, Any]] = [config]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            most = MOST_EXPERTS if "expert" in key else MOST_LAYERS
            if isinstance(value, int) and COUNTS.search(key) and value > most:
                raise ModelError(f"{path} has {key}={shortened(value)}, above {most}; repair it")
            elif key in LAYERS and isinstance(value, int) and value < 1:
                raise ModelError(f"{path} has {key}={shortened(value)}, which is no number of layers; repair it")


def _each(value: Any) -> Iterator[Any]:
    """A value, or those in a list or dict of them; None is nothing."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _each(item)
    elif value is not None:
        yield value


def _foreign(path: Path, key: str, value: Any) -> ModelError:
    return ModelError(f"{path} has {key}={shortened(value)}, which is no name of a file in that folder; repair it")


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES_OF_JSON:
            raise ValueError(f"it has more than {MOST_BYTES_OF_JSON} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({described(error)}); fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object; fetch the model again")
    return value
