"""What a checkpoint is on the disk: whole or not there, and any change of any file is seen."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf_toolkit import checkpoint_files
from rlhf_toolkit.checkpoint_files import (
    Contents,
    complete,
    files_below,
    load_tensors,
    newest_sound,
    prune,
    read,
    remove_leftovers,
    steps_in,
    temporary,
)
from rlhf_toolkit.errors import CheckpointError

MOMENTS = {"exp_avg.a": torch.arange(6.0).view(2, 3), "exp_avg.b": torch.tensor([float("nan"), 1.0])}
STATE = {"progress": {"kl": 0.1, "text": "ü", "odd": float("inf")}}


def written(folder: Path, step: int = 4) -> Path:
    place = temporary(folder, step) / "policy"
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text("{}")
    return complete(folder, Contents(step, STATE, {"optimizer.safetensors": MOMENTS}))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    place = written(tmp_path)
    found = read(place, 4)
    assert (found.folder, found.step, found.state) == (tmp_path / "checkpoint-4", 4, STATE)
    tensors = load_tensors(place, "optimizer.safetensors")
    assert torch.equal(tensors["exp_avg.a"], MOMENTS["exp_avg.a"]) and tensors["exp_avg.b"].isnan()[0]
    assert load_tensors(place, "experience.safetensors") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_every_change_of_every_file_is_seen(tmp_path: Path) -> None:
    """A bit flipped, cut by a byte, longer by one, missing, another's, empty, a link: in every file of a checkpoint."""
    sound, draw = written(tmp_path / "run"), random.Random(0)
    broken = tmp_path / "broken" / "checkpoint-4"
    for path in files_below(sound):
        content, name = path.read_bytes(), path.relative_to(sound)
        place = draw.randrange(len(content))
        flipped = [
            bytes([*content[:at], content[at] ^ 1 << bit, *content[at + 1 :]]) for at, bit in ((place, 3), (0, 0))
        ]
        for change in (*flipped, content[:-1], content + b" ", content + b"\0", b"", b"{}\n", None):
            shutil.rmtree(broken.parent, ignore_errors=True)
            shutil.copytree(sound, broken)
            (broken / name).unlink()
            if change is not None:
                (broken / name).write_bytes(change)
            if change == content:
                continue
            with pytest.raises(CheckpointError) as caught:
                read(broken, 4)
            assert "\n" not in str(caught.value) and str(broken) in str(caught.value)


def test_what_does_not_belong_there_is_seen(tmp_path: Path) -> None:
    place = written(tmp_path)
    for name in ("optimizer.pt", "policy/adapter_model.bin", "rng_state.pth", "experience.safetensors"):
        (place / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match="does not belong to the checkpoint"):
            read(place, 4)
        (place / name).unlink()
    (place / "policy/adapter_config.json").rename(tmp_path / "elsewhere.json")
    (place / "policy/adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="lacks its file"):
        read(place, 4)


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a//b.json", "optimizer.pt", "x.bin"])
def test_a_manifest_names_nothing_outside_and_no_pickle(tmp_path: Path, name: str) -> None:
    place = written(tmp_path)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (place / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(CheckpointError):
        read(place, 4)


def test_other_formats_are_named(tmp_path: Path) -> None:
    place = written(tmp_path)
    for manifest, words in [({"step": 4}, "of format 1, of an earlier version"), ({"format": 3}, "of format 3; this")]:
        (place / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        with pytest.raises(CheckpointError, match=words):
            read(place, 4)
    with pytest.raises(CheckpointError, match="is not the manifest of step 8"):
        read(written(tmp_path, 4), 8)


def test_the_newest_sound_one_and_why_newer_ones_are_not(tmp_path: Path) -> None:
    for step in (4, 8, 12, 100):
        written(tmp_path, step)
    (tmp_path / "checkpoint-100" / "manifest.json").unlink()
    (tmp_path / "checkpoint-12" / "optimizer.safetensors").write_bytes(b"x")
    (tmp_path / "checkpoint-x").mkdir()
    found, passed_over = newest_sound(tmp_path)
    assert found.step == 8 and ["interrupted" in passed_over[0], "is cut" in passed_over[1]] == [True, True]
    shutil.rmtree(tmp_path / "checkpoint-8")
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be resumed from: .*interrupted \(1 others neither\)"):
        newest_sound(tmp_path)


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    (written(tmp_path) / "state.json").write_text("")
    assert read(written(tmp_path), 4).state == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        written(tmp_path, step)
    prune(tmp_path, newest=8, keep=2, best=2)
    assert steps_in(tmp_path) == [10, 8, 6, 2]
    temporary(tmp_path, 12).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f"checkpoint-{step}" for step in (10, 2, 6, 8)]


def test_a_disk_that_keeps_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoint_files, "save_file", lambda tensors, path: save_file({k: v + 1 for k, v in tensors.items()}, path)
    )
    with pytest.raises(CheckpointError, match="does not hold what was written"):
        written(tmp_path)
    assert steps_in(tmp_path) == []
