"""What can be wrong with a file: cut, flipped, exchanged, hostile. Each has a name and is done to a path."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]
CANARY = "RLHF_TESTS_CANARY"
"""The environment's name of a file that a pickle makes where somebody loads it."""
DEEP = 100_000
HUGE_DIGITS = 6_000
"""Python reads no integer of more than 4,300 digits."""


@dataclass(frozen=True)
class Named:
    """A damage and what it is called in a table."""

    name: str
    damage: Damage


class Payload:
    """Unpickled, it leaves the canary."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"import os; open(os.environ[{CANARY!r}], 'w').write('executed')",)


def pickled() -> bytes:
    """A pickle that does something when it is loaded."""
    return pickle.dumps(Payload())


def torch_archive() -> bytes:
    """The same in the archive that ``torch.save`` writes."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"state": Payload()}, buffer)
    return buffer.getvalue()


# ---- any file --------------------------------------------------------------------------------------------------------


def _edited(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def _flipped(share: float) -> Damage:
    """One bit, at that share of the file."""

    def change(data: bytes) -> bytes:
        place = min(int(len(data) * share), len(data) - 1)
        return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

    return _edited(change)


def _removed(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    """To the very same content outside of the folder."""
    outside = Path(os.environ["RLHF_TESTS_OUTSIDE"]) / f"linked_{path.name}"
    shutil.copyfile(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _pipe(path: Path) -> None:
    """Whoever opens it to read waits for somebody who writes."""
    path.unlink()
    os.mkfifo(path)


SILENT_FLIPS = tuple(Named(f"flipped at {share:.0%}", _flipped(share)) for share in (0.02, 0.35, 0.5, 0.8, 1.0))
"""Only who has a hash of the file can see them."""
ANY: tuple[Named, ...] = (
    Named("empty", _edited(lambda data: b"")),
    Named("first byte only", _edited(lambda data: data[:1])),
    Named("cut to a tenth", _edited(lambda data: data[: len(data) // 10])),
    Named("cut to half", _edited(lambda data: data[: len(data) // 2])),
    Named("last byte cut", _edited(lambda data: data[:-1])),
    Named("flipped first byte", _flipped(0.0)),
    Named("zeros", _edited(lambda data: bytes(len(data)))),
    Named("removed", _removed),
    Named("a folder", _folder),
    Named("a link outside", _link),
    Named("a link to itself", _loop),
    Named("a pipe", _pipe),
    Named("a pickle", lambda path: _write(path, pickled())),
    Named("torch's pickle", lambda path: _write(path, torch_archive())),
)
BASIC = tuple(named for named in ANY if named.name in ("empty", "cut to half", "removed", "a pickle", "a folder"))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _with_values(kind: type, value: Any) -> Damage:
    """Every value of ``kind``, at any depth, becomes ``value``."""

    def change(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: change(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [change(inner) for inner in node]
        return value if type(node) is kind else node

    return lambda path: _write(path, json.dumps(change(json.loads(path.read_text()))).encode())


def _with_text_values(kind: type, text: str) -> Damage:
    """The same where json.dumps would not write ``text``."""

    def damage(path: Path) -> None:
        _with_values(kind, "@@")(path)
        path.write_text(path.read_text().replace('"@@"', text))

    return damage


def _each_key(value: Any) -> Damage:
    """Every top-level key holds ``value``."""
    return lambda path: _write(path, json.dumps(dict.fromkeys(json.loads(path.read_text()), value)).encode())


def _text(text: str) -> Damage:
    return lambda path: _write(path, text.encode())


JSON: tuple[Named, ...] = (
    Named("deep lists", _text("[" * DEEP + "]" * DEEP)),
    Named("deep objects", _text('{"a":' * DEEP + "1" + "}" * DEEP)),
    Named("a list", _text("[1, 2]")),
    Named("a string", _text('"text"')),
    Named("null", _text("null")),
    Named("an empty object", _text("{}")),
    Named("a huge integer", _text('{"step": ' + "9" * HUGE_DIGITS + "}")),
    Named("not UTF-8", _edited(lambda data: b'{"\xff\xfe": 1, ' + data[1:])),
    Named("infinite numbers", _with_text_values(int, "1e999")),
    Named("NaN for floats", _with_text_values(float, "NaN")),
    Named("negative integers", _with_values(int, -7)),
    Named("vast integers", _with_values(int, 10**15)),
    Named("strings for integers", _with_values(int, "seven")),
    Named("integers for strings", _with_values(str, 7)),
    Named("paths for strings", _with_values(str, "../../outside/x")),
    Named("absolute paths", _with_values(str, "/etc/passwd")),
    Named("null for every key", _each_key(None)),
    Named("lists for every key", _each_key([{"x": [1]}])),
    Named("objects for every key", _each_key({"x": {"y": 1}})),
    Named("control characters", _with_values(str, "\x1b[2J\x00\n" * 3)),
)


def missing_keys(path: Path) -> Iterator[Named]:
    """A damage for each key of the JSON object in ``path``: without it."""
    for key in json.loads(path.read_text()):

        def damage(target: Path, key: str = key) -> None:
            value = json.loads(target.read_text())
            del value[key]
            target.write_text(json.dumps(value))

        yield Named(f"without {key}", damage)


def newer_format(path: Path) -> None:
    """Every number under a key that speaks of a format is one that nobody has written yet."""
    value = json.loads(path.read_text())
    keys = [key for key in value if "format" in key.lower()] or ["format"]
    path.write_text(json.dumps({**value, **dict.fromkeys(keys, 10**6)}))


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The file with another header before the same bytes of tensors."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        changed = change(json.loads(data[8 : 8 + length]))
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def _tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    """The file written anew with other tensors: nothing of its form is wrong."""

    def damage(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path)

    return damage


def _entries(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _of_first(**changes: Any) -> Damage:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        first = _entries(header)[0]
        return {**header, first: {**header[first], **changes}}

    return _header(change)


def _first_tensor(change: Callable[[Any], Any]) -> Damage:
    def changed(tensors: dict[str, Any]) -> dict[str, Any]:
        first = sorted(tensors)[0]
        return {**tensors, first: change(tensors[first])}

    return _tensors(changed)


SAFETENSORS: tuple[Named, ...] = (
    Named("a vast header", _edited(lambda data: struct.pack("<Q", 2**62) + data[8:])),
    Named("a header of no length", _edited(lambda data: struct.pack("<Q", 0) + data[8:])),
    Named(
        "a header one longer", _edited(lambda data: struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + 1) + data[8:])
    ),
    Named("a deep header", _header(lambda header: b"[" * DEEP + b"]" * DEEP)),
    Named("a header that is a list", _header(lambda header: [1])),
    Named("an empty header", _header(lambda header: {})),
    Named("an unknown dtype", _of_first(dtype="Q7")),
    Named("a vast shape", _of_first(shape=[2**40, 2**30])),
    Named("a negative shape", _of_first(shape=[-1, 4])),
    Named("offsets beyond the end", _of_first(data_offsets=[0, 2**40])),
    Named("offsets backwards", _of_first(data_offsets=[64, 0])),
    Named("a tensor missing", _tensors(lambda tensors: dict(sorted(tensors.items())[1:]))),
    Named("no tensors", _tensors(lambda tensors: {})),
    Named("one tensor more", _tensors(lambda tensors: {**tensors, "../../x": next(iter(tensors.values())) * 2})),
    Named("tensors renamed", _tensors(lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()})),
    Named("another shape", _first_tensor(lambda tensor: tensor.new_ones((3, 5)))),
    Named("a scalar", _first_tensor(lambda tensor: tensor.new_ones(()))),
    Named("whole numbers", _first_tensor(lambda tensor: tensor.to(dtype=__import__("torch").int64))),
    Named("NaN in it", _first_tensor(lambda tensor: tensor * float("nan"))),
)


def damages_of(path: Path) -> tuple[Named, ...]:
    """Everything that fits the kind of file that ``path`` is; flips are left to who has hashes."""
    if path.suffix == ".json":
        return (*ANY, *JSON)
    return (*ANY, *SAFETENSORS) if path.suffix == ".safetensors" else ANY
