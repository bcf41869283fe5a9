"""Safetensors files read and written one tensor at a time, so that no model ever has to fit in memory.

``safetensors.torch.save_file`` wants all tensors of a file at once. The format needs no such thing: eight bytes with
the header's length, the header in JSON (name -> dtype, shape, place), then the tensors' bytes end to end. Names, dtypes
and shapes are known before any tensor is read, so the header comes first and each tensor follows as it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_toolkit.errors import ModelError, described
from rlhf_toolkit.models.folders import weight_map

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATING.items()}
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
BYTES |= {"I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its dtype in the format's own word, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return prod(self.shape) * BYTES[self.dtype]

    def cast(self, dtype: torch.dtype | None) -> Stored:
        """The same tensor after ``--dtype``: a number with a point becomes ``dtype``, anything else stays."""
        return self if dtype is None or self.dtype not in FLOATING else Stored(NAMES[dtype], self.shape)


Shard = dict[str, Stored]
"""One file: name -> what is stored."""


def read_headers(folder: Path) -> dict[str, Shard]:
    """File name -> its tensors, for every weight file of a model folder, without reading a tensor.

    Raises ModelError: no safetensors, an index that names a file of another folder, a file that is missing or broken, a
    name in two files, a dtype that is no plain number (a quantised model).
    """
    index = folder / INDEX
    if index.is_file():
        places = weight_map(index)
        files = sorted(set(places.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise ModelError(
            f"{folder} has neither {SINGLE} nor {INDEX}; load the model with transformers and save it with "
            "save_pretrained"
        )
    shards = {file: read_header(folder / file) for file in files}
    names = [name for shard in shards.values() for name in shard]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ModelError(f"{folder} has {min(twice)} in more than one file; the files do not belong together")
    if index.is_file() and set(names) != set(places):
        odd = min(set(names) ^ set(places))
        raise ModelError(f"{index} and the files it names do not agree about {odd}; fetch the model again")
    return shards


def rewrite(
    source: Path,
    target: Path,
    shard: Shard,
    change: Callable[[str, Tensor], Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``target`` with every tensor of ``source`` after ``change(name, tensor)``, reading each once.

    ``shard`` is the header of ``source``; ``change`` keeps the shape and returns the stored dtype, or ``dtype`` where
    one is given. At any time one tensor of the file is in memory. Raises OSError where the disk is full.
    """
    stored = {name: tensor.cast(dtype) for name, tensor in shard.items()}
    order = sorted(stored, key=lambda name: (-BYTES[stored[name].dtype], name))  # wide ones first: all stay aligned
    with safe_open(source, framework="pt") as file, target.open("xb") as out:
        out.write(header_bytes({name: stored[name] for name in order}, file.metadata()))
        for name in order:
            tensor = change(name, file.get_tensor(name))
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            if raw.nbytes != stored[name].bytes:
                raise AssertionError(f"{name} became {raw.nbytes} bytes, announced were {stored[name].bytes}")
            out.write(raw.data)


def read_header(path: Path) -> Shard:
    """What one file stores. Raises ModelError where it cannot be read, or stores a quantised number."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shard = {name: Stored(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except Exception as error:  # a header may say anything
        raise ModelError(f"{path} cannot be read ({described(error)}); fetch the model again") from error
    for name, tensor in shard.items():
        if tensor.dtype not in BYTES:
            raise ModelError(f"{path} stores {name} as {tensor.dtype}, a quantised number; merge into a base of floats")
    return shard


def header_bytes(stored: Shard, metadata: Mapping[str, str] | None) -> bytes:
    """The beginning of a file that holds ``stored``, its tensors in this order; padded so that they are aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    place = 0
    for name, tensor in stored.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.bytes],
        }
        place += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
