"""What a checkpoint is on the disk: a folder of safetensors and JSON, and a manifest with every file's size and hash.

    checkpoint-<optimizer steps>/
        manifest.json                   format, steps, and of every other file its bytes and SHA-256
        state.json                      everything that is no tensor
        optimizer.safetensors           AdamW's moments of every trained parameter, whole
        experience.safetensors          the rollout whose updates are under way, if there is one
        plugins.safetensors             tensors of the user's plugins, if there are any
        policy/, value/, reward/        adapters and heads as a finished run has them

It is written under a temporary name, synced, read again and compared, and only then renamed. Nothing in it is a pickle,
and nothing depends on how many ranks wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_toolkit.errors import CheckpointError, described, shortened
from rlhf_toolkit.files import is_plain_name, write_text

FORMAT = 2
"""Of the checkpoints that this version writes and reads. Those of format 1 were DeepSpeed's and Trainer's own."""
MANIFEST, STATE = "manifest.json", "state.json"
OPTIMIZER, EXPERIENCE, PLUGINS = "optimizer.safetensors", "experience.safetensors", "plugins.safetensors"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
LARGEST_JSON = 2**28
"""Bytes of a JSON file that is still read: the means of some millions of prompts."""
TENSORS = ".safetensors"
KINDS = (TENSORS, ".json", ".md", ".jinja")
"""How names of files in a checkpoint end: none is read as anything else."""


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: its ``folder``, the optimizer ``step`` after which it was written, and its ``state``."""

    folder: Path
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint beside the role folders: ``state`` as JSON, and ``tensors`` by file name."""

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def name_of(step: int) -> str:
    """The folder's name of the checkpoint after ``step`` optimizer steps."""
    return f"checkpoint-{step}"


def temporary(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in the run's ``folder`` until it is whole."""
    return folder / f".{name_of(step)}.tmp"


# ---- writing ---------------------------------------------------------------------------------------------------------


def complete(folder: Path, contents: Contents) -> Path:
    """Make a checkpoint of the temporary folder, which holds the role folders already; return its place.

    Raises CheckpointError where the disk does not hold what was written.
    """
    place, final = temporary(folder, contents.step), folder / name_of(contents.step)
    for file, tensors in contents.tensors.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / file)
    write_text(place / STATE, _as_text(contents.state))
    for path in files_below(place):
        _to_disk(path)
    for file, tensors in contents.tensors.items():
        _require_equal(place / file, tensors)
    found = {str(path.relative_to(place)): _size_and_hash(path) for path in files_below(place)}
    write_text(place / MANIFEST, _as_text({"format": FORMAT, "step": contents.step, "files": found}))
    for path in (place / MANIFEST, *(path for path in place.iterdir() if path.is_dir()), place):
        _to_disk(path)
    read(place, contents.step)
    old = folder / f".{final.name}.old"
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(place, final)
    _to_disk(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was killed in the middle of writing has left under temporary names."""
    for path in folder.glob(".checkpoint-*"):
        if path.is_dir() and not path.is_symlink() and path.suffix in (".tmp", ".old"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, *, newest: int, keep: int, best: int | None) -> None:
    """Remove checkpoints but the ``keep`` last ones up to step ``newest`` and that of step ``best``.

    A later one is of a run that went back to ``newest``, and will be replaced.
    """
    before = [step for step in steps_in(folder) if step <= newest]
    for step in before[keep:]:
        if step != best:
            path = folder / name_of(step)
            (path / MANIFEST).unlink(missing_ok=True)  # at once it counts no more
            shutil.rmtree(path, ignore_errors=True)


def _require_equal(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the file holds these tensors, bit by bit: NaN equals itself here."""
    again = load_file(path)
    same = again.keys() == tensors.keys()
    for name, tensor in tensors.items() if same else ():
        here, there = (each.detach().cpu().contiguous().flatten() for each in (tensor, again[name]))
        same = same and here.dtype == there.dtype and torch.equal(here.view(torch.uint8), there.view(torch.uint8))
    if not same:
        raise CheckpointError(f"{path} does not hold what was written to it; the disk may be failing, use another")


def _to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# ---- reading ---------------------------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """The steps after which there are checkpoints in a run's folder, sound ones and others, the last one first."""
    found = [NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_sound(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint in a run's folder that is sound, and a line about each newer one, why it is passed over.

    Raises CheckpointError where there is none.
    """
    passed_over: list[str] = []
    for step in steps_in(folder):
        try:
            return read(folder / name_of(step), step), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    if not passed_over:
        raise CheckpointError(
            f"{folder} has no checkpoint to resume from; set run.save_every, or start again with --overwrite"
        )
    more = f" ({len(passed_over) - 1} others neither)" if len(passed_over) > 1 else ""
    raise CheckpointError(f"no checkpoint can be resumed from: {passed_over[0]}{more}; start again with --overwrite")


def read(place: Path, step: int) -> Checkpoint:
    """The checkpoint of ``step`` in the folder ``place``, all of whose files are as its manifest says.

    Raises CheckpointError, with the first file that is not.
    """
    manifest = _read_json(place / MANIFEST)
    if "format" not in manifest:
        raise CheckpointError(f"{place} is a checkpoint of format 1, of an earlier version; this one reads {FORMAT}")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{place} is a checkpoint of format {shortened(manifest['format'], 40)}; this version reads {FORMAT}"
        )
    files = manifest.get("files")
    if manifest.keys() != {"format", "step", "files"} or not isinstance(files, dict) or manifest["step"] != step:
        raise CheckpointError(f"{place / MANIFEST} is not the manifest of step {step}")
    _require_files(place, files)
    return Checkpoint(place, step, _read_json(place / STATE))


def load_tensors(checkpoint: Path, file: str) -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files; none where it has no such file. Raises CheckpointError."""
    path = checkpoint / file
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({described(error)}); restore it") from error


@contextmanager
def understood(checkpoint: Path | str) -> Iterator[None]:
    """Inside, a checkpoint's contents are taken over. What does not fit is a CheckpointError, whatever it was."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint} does not hold what this run needs ({described(error)}); resume from another checkpoint"
        ) from error


def files_below(place: Path) -> list[Path]:
    """The files in a folder at any depth, by name; links too."""
    return sorted(path for path in place.rglob("*") if not path.is_dir() or path.is_symlink())


def _require_files(place: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        path = place / name
        if not name.endswith(KINDS):
            raise CheckpointError(f"{place / MANIFEST} names {shortened(name)}, which no checkpoint has")
        if not all(map(is_plain_name, name.split("/"))) or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{place} lacks its file {shortened(name)}")
        size = expected.get("bytes") if isinstance(expected, dict) else None
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, not {shortened(size, 40)}: it is cut")
        if _size_and_hash(path) != expected:
            raise CheckpointError(f"{path} is not what was written: its SHA-256 is another")
        try:
            if name.endswith(TENSORS):
                with safe_open(path, framework="pt") as file:
                    file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no file of safetensors ({described(error)})") from error
    for path in files_below(place):
        name = str(path.relative_to(place))
        if name not in files and name != MANIFEST:
            raise CheckpointError(f"{path} does not belong to the checkpoint: its manifest does not know it")
    if STATE not in files:
        raise CheckpointError(f"{place} lacks its file {STATE}")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours, whose text is exactly what we would write."""
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} is a link or larger than {LARGEST_JSON // 2**20} MiB")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: its writing was interrupted") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({described(error)})") from error
    if not isinstance(value, dict) or _as_text(value) != text:
        raise CheckpointError(f"{path} is not what was written")
    return value


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _size_and_hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
