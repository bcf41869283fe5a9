"""A sound base and a sound adapter in miniature, made once, and what strangers do to folders."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.strangers.ground import here
from tests.support.exports import write_adapter, write_base

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """``change`` spoils a folder; ``way`` is what is done with it then. ``refuse``: it must not be taken."""

    name: str
    way: str
    change: Change
    refuse: bool = True


@functools.cache
def sound() -> Path:
    """A folder with ``base`` and ``adapter``. Nobody writes to it."""
    folder = Path(tempfile.mkdtemp(prefix="strangers-sound-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # children end without it
    write_base(folder / "base", shard="20KB", chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
    write_adapter(folder / "adapter", folder / "base")
    return folder


def copied(*names: str) -> None:
    """Copies of those folders in the case's own."""
    for name in names:
        shutil.copytree(sound() / name, name)


def setting(file: str, **changes: Any) -> Change:
    """``file`` with these values in its JSON; text that is of kind ``Raw`` stands there as it is."""

    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        raw = {key: value for key, value in changes.items() if isinstance(value, Raw)}
        text = json.dumps({**config, **changes, **{key: f"@{key}@" for key in raw}})
        for key, value in raw.items():
            text = text.replace(f'"@{key}@"', value)
        (folder / file).write_text(here().filled(text))

    return change


class Raw(str):
    """JSON as it stands."""


def text(file: str, content: str | bytes) -> Change:
    """``file`` with that content."""

    def change(folder: Path) -> None:
        data = here().filled(content).encode() if isinstance(content, str) else content
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(data)

    return change


def gone(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def link(file: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(here().filled(target), folder / file)

    return change


def pipe(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return change


def a_folder(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return change


def hostile_pickle(file: str) -> Change:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (here().filled("{COMMAND}"),)

    def change(folder: Path) -> None:
        (folder / file).write_bytes(pickle.dumps(Payload()))

    return change


def tensors(file: str, of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """``file`` with its tensors after ``of``."""

    def change(folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in of(load_file(folder / file)).items()}, folder / file, {"format": "pt"})

    return change


def header(file: str, of: Callable[[dict[str, Any]], Any]) -> Change:
    """``file`` with the JSON of its header after ``of``."""

    def change(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        changed = json.dumps(of(json.loads(raw[8 : 8 + size]))).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + size :])

    return change


def every(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """All entries of a header but its metadata with those values."""
    return lambda found: {k: (v if k == "__metadata__" else {**v, **value}) for k, v in found.items()}


def cut(file: str, share: float) -> Change:
    def change(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        (folder / file).write_bytes(raw[: int(len(raw) * share)])

    return change


def flipped(file: str, seed: int, *, first: bool = False) -> Change:
    """``file`` with one byte changed; with ``first`` one of its first 200."""

    def change(folder: Path) -> None:
        chance, raw = random.Random(seed), bytearray((folder / file).read_bytes())
        raw[chance.randrange(min(200, len(raw)) if first else len(raw))] ^= 1 << chance.randrange(8)
        (folder / file).write_bytes(bytes(raw))

    return change


VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**30,
        0.5,
        -0.0,
        1e308,
        Raw("NaN"),
        Raw("Infinity"),
        Raw("-Infinity"),
    ),
    *("", "x", "a" * 100000, "../../x", "/etc/passwd", "{OUTSIDE}/victim", "{URL}/x", "\x1b[2J\n", "\u202e", "\ud800"),
    *([], {}, [[]], [None], [1], ["x"], {"a": 1}, {"": ""}, {"a": None}, [["x"] * 3], Raw("1e999")),
    *(Raw("[" * 100000 + "]" * 100000), Raw("9" * 5000), ["q_proj"] * 1000, {"__class__": "x"}, "q_proj", ["\x1b[31m"]),
)


def file_cases(files: list[str], ways: tuple[str, ...], chance: random.Random, count: int) -> list[Case]:
    """Files cut, flipped, missing, folders, pipes, links; ``count`` of them."""
    found = []
    for number in range(count):
        file, way = chance.choice(files), chance.choice(ways)
        kind = chance.choice(
            ["cut", "flip", "flip in the header", "gone", "folder", "pipe", "link", "text", "null", "own"]
        )
        share = chance.random()
        change: Change = {
            "cut": cut(file, share),
            "flip": flipped(file, number),
            "flip in the header": flipped(file, number, first=True),
            "gone": gone(file),
            "folder": a_folder(file),
            "pipe": pipe(file),
            "link": link(
                file, chance.choice(["{OUTSIDE}/victim", "{OUTSIDE}", file, "/dev/zero", "../../x", "/etc/passwd"])
            ),
            "text": text(file, chance.choice(["", "{", "[]", "3", "null", '"x"', "\0" * 50, "[" * 100000, "{}" * 3])),
            "null": text(file, bytes(chance.randrange(256) for _ in range(300))),
            "own": text(file, '{"a": {"a": {"a": [1, 2, 3]}}}'),
        }[kind]
        found.append(Case(f"{number}: {way}: {file} {kind}", way, change, refuse=kind in ("pipe",)))
    return found
