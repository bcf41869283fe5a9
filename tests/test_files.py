"""Names and links from strangers: nothing is read or written beyond its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_toolkit.files import appended, created, is_plain_name, leads_outside, link_outside, write_text


def test_a_plain_name_leads_nowhere_else() -> None:
    plain = ["model.safetensors", "model-00001-of-00002.safetensors", "a b", "...", "..a", ".hidden", "é", "xx:y"]
    other = [
        "",
        ".",
        "..",
        "../a",
        "a/b",
        "/a",
        "a/",
        "a\\b",
        "..\\a",
        "C:a",
        "C:\\a",
        "a\0",
        "a\nb",
        "\x1b[2J",
        "\x7f",
    ]
    strange = [*other, "x" * 256, "é" * 200, None, 3, b"a", ["a"], True]
    assert [name for name in plain if not is_plain_name(name)] == []
    assert [name for name in strange if is_plain_name(name)] == []


def test_links_that_lead_outside(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    (folder / "deep" / "deeper").mkdir(parents=True)
    secret.write_text("s")
    (folder / "file").write_text("f")
    (folder / "inside").symlink_to("file")
    (folder / "deep" / "up").symlink_to("../file")
    assert link_outside(folder) is None
    for target in ("../secret", str(secret), "/nowhere/at/all", "..", "../folder-2", "deep/../../secret"):
        link = folder / "deep" / "deeper" / "link"
        link.symlink_to(os.path.join("../..", target) if not target.startswith("/") else target)
        assert link_outside(folder) == link, target
        assert not leads_outside(link, folder, tmp_path) or target.startswith("/nowhere")
        link.unlink()
    (folder / "loop").symlink_to("loop")
    assert link_outside(folder) is None  # leads nowhere


def test_the_hubs_cache_is_one_folder(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").touch()
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    assert link_outside(snapshot) is None
    (snapshot / "other").symlink_to("../../../other")
    assert link_outside(snapshot) == snapshot / "other"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim, dangling = tmp_path / "victim", tmp_path / "not there"
    victim.write_text("kept")
    for target in (victim, dangling):
        for write in (lambda path: write_text(path, "new"), lambda path: created(path).close()):
            path = tmp_path / "link"
            path.symlink_to(target)
            write(path)
            assert not path.is_symlink() and path.is_file()
            path.unlink()
        path.symlink_to(target)
        with pytest.raises(OSError):
            appended(path)
        path.unlink()
    assert victim.read_text() == "kept" and not dangling.exists()
    for line in ("a\n", "b\n"):
        with appended(tmp_path / "log") as file:
            file.write(line)
    assert (tmp_path / "log").read_text() == "a\nb\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "victim"]
