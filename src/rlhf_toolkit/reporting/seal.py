"""Whether a finished run's files are those it wrote: ``summary.json`` has their hashes, and one of itself.

A report and a card are made of these files. Where a disk or a hand has changed a number in them, nothing else shows it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_toolkit.errors import CheckpointError

FILES = ("run.json", "log.jsonl", "samples.jsonl")
SUMMARY, SEAL = "summary.json", "sha256"


def sealed(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """``summary`` with the hashes of the run's ``FILES``, as they are now, and of itself under ``SEAL``."""
    return {**summary, SEAL: {**{name: _of_file(folder / name) for name in FILES}, SUMMARY: _of(summary)}}


def require_seal(folder: Path, summary: dict[str, Any]) -> None:
    """Raise CheckpointError, by the name of the file, where one is not as it was when ``sealed`` made ``summary``. One
    without hashes, of an older version, is taken as it is."""
    if SEAL not in summary:
        return
    found = {**{name: _of_file(folder / name) for name in FILES}}
    found[SUMMARY] = _of({name: value for name, value in summary.items() if name != SEAL})
    for name, digest in found.items():
        if not isinstance(summary[SEAL], dict) or summary[SEAL].get(name) != digest:
            raise CheckpointError(
                f"{folder / name} is not as it was when the run ended; restore that file, or let the run end once more "
                "(--resume)"
            )


def _of_file(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of(summary: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()
