"""A cache of the hub with repositories in several revisions, and no network: who asks for which is noted."""

from __future__ import annotations

import builtins
import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants


class Hub:
    """``asked`` are the revisions that have been looked up, as ``owner/name@revision``: each call that fetches a file
    of a repository looks one up, ``main`` where it names none."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked = folder, set[str]()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        real = builtins.open

        def noting(file: Any, *args: Any, **options: Any) -> Any:
            path = Path(file) if isinstance(file, (str, Path)) else Path()
            if path.parent.name == "refs" and path.is_relative_to(folder):
                owner, name = path.parts[-3].split("--")[1:]
                self.asked.add(f"{owner}/{name}@{path.name}")
            return real(file, *args, **options)

        monkeypatch.setattr(builtins, "open", noting)
        monkeypatch.setattr(io, "open", noting)

    def add(self, name: str, revision: str, files: Path) -> str:
        """Have ``name`` hold ``files`` at ``revision``; returns its commit."""
        commit = hashlib.sha1(f"{name} {revision} {files}".encode()).hexdigest()
        place = self.folder / f"models--{name.replace('/', '--')}"
        shutil.copytree(files, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        return commit

    def taken(self) -> set[str]:
        """What has been asked for since the last call."""
        found, self.asked = self.asked, set()
        return found
