"""The run folder: who may use it, what it takes to resume, and when a checkpoint counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_toolkit import checkpoints
from rlhf_toolkit.checkpoint_files import Checkpoint, Contents, complete, temporary
from rlhf_toolkit.checkpoints import (
    base_fingerprint,
    checksum,
    claim_run_folder,
    folder_fingerprint,
    open_run_folder,
    require_identity,
    write_json,
)
from rlhf_toolkit.distributed import collectives
from rlhf_toolkit.distributed.collectives import on_main
from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.run_claims import RUN_FILE, release
from rlhf_toolkit.run_folders import LEAST_FREE_BYTES, require_room
from tests.support.allocations import Allocations
from tests.support.offenders import for_each

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"name": "m", "lora_rank": 4},
    "data": {"train": "a.jsonl", "evaluation": None, "evaluation_split": "train"},
    "ppo": {"num_rollouts": 3, "kl_coef": 0.05},
    "run": {"output_dir": "out", "seed": 0, "wandb": "off"},
}


def started(folder: Path) -> Path:
    """A folder in which a run has been started with ``SETTINGS``."""
    open_run_folder(folder, SETTINGS, resume=False, overwrite=False)
    claim_run_folder(folder, SETTINGS, overwrite=True)
    return folder


def checkpoint(folder: Path, number: int, /, **state: Any) -> Path:
    """A checkpoint, complete if it has a ``state``."""
    if not state:
        (folder / f"checkpoint-{number}").mkdir()
        return folder / f"checkpoint-{number}"
    (temporary(folder, number) / "policy").mkdir(parents=True)
    return complete(folder, Contents(number, state, {"optimizer.safetensors": {"a": torch.ones(3)}}))


def resumed(folder: Path, settings: dict[str, Any] = SETTINGS) -> Path:
    """The checkpoint that a run with ``settings`` goes on from."""
    found = open_run_folder(folder, settings, resume=True, overwrite=False)
    assert found is not None
    return found.folder


def refusal(folder: Path, settings: dict[str, Any] = SETTINGS, *, resume: bool = False, overwrite: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_run_folder(folder, settings, resume=resume, overwrite=overwrite)
    return str(caught.value)


def changed(**changes: Any) -> dict[str, Any]:
    """``SETTINGS`` with ``ppo__kl_coef=1`` for ``ppo.kl_coef=1``."""
    settings = {section: dict(values) for section, values in SETTINGS.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings[section][key] = value
    return settings


# ---- a fresh start ---------------------------------------------------------------------------------------------------


def test_a_new_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    assert open_run_folder(folder, SETTINGS, resume=False, overwrite=False) is None
    assert list(folder.iterdir()) == []
    claim_run_folder(folder, SETTINGS, overwrite=True)
    assert json.loads((folder / RUN_FILE).read_text()) == SETTINGS
    assert [path.name for path in folder.iterdir()] == [RUN_FILE]


def test_a_folder_of_another_run(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    assert refusal(folder) == (
        f"run.output_dir={folder} holds another run; continue it with --resume, replace it with --overwrite, or choose "
        "another folder"
    )


EVALUATION, ROLLOUT = '{"kind": "eval", "rollout": 0}\n', '{"kind": "train", "rollout": 1}\n'


@pytest.mark.parametrize(
    ("left", "is_free"),
    [
        ({}, True),
        ({"log.jsonl": EVALUATION, "samples.jsonl": EVALUATION}, True),
        ({"log.jsonl": EVALUATION + ROLLOUT}, False),
        ({"log.jsonl": "{}\n"}, False),
        ({"log.jsonl": "half a li"}, False),
        ({"checkpoint-1/state.json": "{}"}, False),
        ({"policy/adapter_config.json": "{}"}, False),
        ({"thesis.tex": "years of work"}, False),
    ],
)
def test_a_run_that_ended_before_its_first_rollout_leaves_the_folder_free(
    left: dict[str, str], is_free: bool, tmp_path: Path
) -> None:
    folder = started(tmp_path / "run")
    release(folder)  # as at the end of a process, however it ends
    for name, text in left.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if is_free:
        assert open_run_folder(folder, changed(run__seed=1), resume=False, overwrite=False) is None
        claim_run_folder(folder, changed(run__seed=1), overwrite=False)
        assert [path.name for path in folder.iterdir()] == [RUN_FILE]
    else:
        assert "holds another run" in refusal(folder)


def test_a_run_that_goes_on_keeps_its_folder_from_the_first_moment(tmp_path: Path) -> None:
    """Of another process, which is then killed: its lock goes with it."""
    folder = tmp_path / "run"
    text = "import sys, time; from tests.test_checkpoints import started; from pathlib import Path; "
    text += "started(Path(sys.argv[1])); print('claimed', flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", text, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        assert "holds another run" in refusal(folder)
        other.kill()
    assert open_run_folder(folder, SETTINGS, resume=False, overwrite=False) is None


def test_overwriting_a_run_keeps_it_until_the_folder_is_claimed(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    checkpoint(folder, 4, step=4)
    (folder / "log.jsonl").write_text("{}\n")
    assert open_run_folder(folder, SETTINGS, resume=False, overwrite=True) is None
    assert (folder / "log.jsonl").exists()
    claim_run_folder(folder, changed(run__seed=1), overwrite=True)
    assert [path.name for path in folder.iterdir()] == [RUN_FILE]
    assert json.loads((folder / RUN_FILE).read_text())["run"]["seed"] == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_files_that_are_no_run_are_never_touched(tmp_path: Path, resume: bool, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    assert refusal(tmp_path, resume=resume, overwrite=overwrite) == (
        f"run.output_dir={tmp_path} holds files but no run.json, so it is not a run folder; choose another"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_behind_a_link_stays_where_it_is(tmp_path: Path) -> None:
    real, link = started(tmp_path / "disk"), tmp_path / "run"
    link.symlink_to(real)
    (tmp_path / "kept").mkdir()
    (real / "link").symlink_to(tmp_path / "kept")
    open_run_folder(link, SETTINGS, resume=False, overwrite=True)
    claim_run_folder(link, SETTINGS, overwrite=True)
    assert link.is_symlink()
    assert (tmp_path / "kept").exists()
    assert [path.name for path in real.iterdir()] == [RUN_FILE]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder, reason in [(tmp_path / "file" / "run", "Not a directory"), (tmp_path / "file", "File exists")]:
        assert refusal(folder) == (
            f"run.output_dir={folder} cannot be written: {reason}; choose a folder you may write to"
        )

    def read_only(**options: Any) -> Any:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert f"run.output_dir={tmp_path} cannot be written: Read-only file system; " in refusal(tmp_path)


def test_a_folder_may_be_asked_about_without_being_made(tmp_path: Path) -> None:
    require_room(tmp_path / "a/b")
    (tmp_path / "file").touch()
    for folder in (Path("/proc/run"), tmp_path / "file/run", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"run.output_dir={folder} cannot be written: N"):
            require_room(folder)
    assert os.listdir(tmp_path) == ["file"]


def test_looking_at_a_folder_writes_through_no_link(tmp_path: Path) -> None:
    """Whatever a probe, a settings file or its temporary might be called."""
    victim, folder = tmp_path / "victim", started(tmp_path / "run")
    victim.write_text("kept")
    names = [".write-test", "run.tmp", ".run.json.tmp", "log.jsonl", "summary.json", "samples.jsonl"]
    for name in names:
        (folder / name).symlink_to(victim)
    open_run_folder(folder, SETTINGS, resume=False, overwrite=True)
    claim_run_folder(folder, SETTINGS, overwrite=True)
    assert victim.read_text() == "kept" and [path.name for path in folder.iterdir()] == [RUN_FILE]
    (folder / RUN_FILE).unlink()
    (folder / RUN_FILE).symlink_to(victim)
    write_json(folder / RUN_FILE, SETTINGS)
    assert victim.read_text() == "kept" and not (folder / RUN_FILE).is_symlink()


def test_settings_become_text_before_anything_is_removed(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    (folder / "policy").mkdir()
    with pytest.raises(TypeError):
        claim_run_folder(folder, {"reward": {"since": {1, 2}}}, overwrite=True)
    assert (folder / "policy").exists() and json.loads((folder / RUN_FILE).read_text()) == SETTINGS


def test_a_run_with_a_link_to_elsewhere_is_not_resumed(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    checkpoint(folder, 4, step=4)
    (folder / "wandb").mkdir()
    (folder / "wandb" / "latest-run").symlink_to("offline-run-1")  # W&B's own, as the next one is
    (folder / "wandb" / "offline-run-1" / "logs").mkdir(parents=True)
    (folder / "wandb" / "offline-run-1" / "logs" / "debug-core.log").symlink_to(tmp_path / "cache.log")
    assert resumed(folder) == folder / "checkpoint-4"
    for place in (
        "log.jsonl",
        "policy",
        "checkpoint-4/optimizer.safetensors",
        "checkpoint-9",
        "wandb/run-2",
        "wandb/offline-run-1/files",
    ):
        link = folder / place
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path)
        assert f"{link} is a link to something outside of run.output_dir" in refusal(folder, resume=True)
        link.unlink()


@for_each("text", ["", "{", "[]", '{"run": 1}', "\xff", "[" * 100_000])
def test_a_broken_settings_file_is_named(tmp_path: Path, text: str) -> None:
    folder = started(tmp_path / "run")
    (folder / RUN_FILE).write_bytes(text.encode("latin-1"))
    assert refusal(folder, resume=True).startswith(f"{folder / RUN_FILE} ")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, LEAST_FREE_BYTES - 2**20))
    assert refusal(tmp_path) == (
        f"run.output_dir={tmp_path} has 255 MiB of free space, a run needs at least 256; make room or choose another "
        "disk"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, LEAST_FREE_BYTES))
    open_run_folder(tmp_path, SETTINGS, resume=False, overwrite=False)


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_resume_where_no_run_is(tmp_path: Path) -> None:
    assert refusal(tmp_path, resume=True) == (
        f"--resume, but run.output_dir={tmp_path} holds no run; start without --resume"
    )


def test_resume_before_the_first_checkpoint(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    assert refusal(folder, resume=True) == (
        f"{folder} has no checkpoint to resume from; set run.save_every, or start again with --overwrite"
    )
    checkpoint(folder, 4)
    assert refusal(folder, resume=True) == (
        f"no checkpoint can be resumed from: {folder}/checkpoint-4 has no manifest.json: its writing was interrupted; "
        "start again with --overwrite"
    )


def test_resume_takes_the_newest_complete_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = started(tmp_path / "run")
    for step in (8, 100, 20):
        checkpoint(folder, step, step=step)
    checkpoint(folder, 104)
    (checkpoint(folder, 108) / "manifest.json").write_text("{")
    assert resumed(folder) == folder / "checkpoint-100"
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[2].rpartition("/")[2] for line in said] == ["manifest.json", "checkpoint-104"], said


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("ppo.kl_coef", 0.05, 0.1),
        ("model.lora_rank", 4, 8),
        ("data.train", "'a.jsonl'", 7),
        ("run.seed", 0, 1),  # although how a run is watched may change
        ("ppo.gamma", None, 0.9),  # not there when the run was started
    ],
)
def test_resume_with_another_setting(tmp_path: Path, name: str, before: object, now: object) -> None:
    folder = started(tmp_path / "run")
    checkpoint(folder, 4, step=4)
    assert refusal(folder, changed(**{name.replace(".", "__"): now}), resume=True) == (
        f"{folder} was started with {name}={before}, now {name}={now}; resume with the same settings"
    )


def test_resume_may_change_how_long_a_run_is_and_how_it_is_watched(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    checkpoint(folder, 4, step=4)
    settings = changed(ppo__num_rollouts=9, run__wandb="online", data__evaluation="b.jsonl", data__evaluation_split="x")
    assert resumed(folder, settings) == folder / "checkpoint-4"


# ---- what a checkpoint is tied to -----------------------------------------------------------------------------------


def found(settings: dict[str, Any] = SETTINGS, **identity: str) -> Checkpoint:
    return Checkpoint(Path("checkpoint-4"), 4, {"settings": settings, "identity": identity})


def test_a_checkpoint_of_this_run() -> None:
    require_identity(found(base="abc", rows="def"), changed(run__wandb="online"), {"base": "abc"})


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("base", "was trained on another base"),
        ("rows", "was trained on other data: a row of data.train has been edited"),
        ("tokens", "or because the template writes the date"),
        ("reward_model", "was rewarded by another model"),
    ],
)
def test_a_checkpoint_of_something_else_is_named(what: str, words: str) -> None:
    for before in (found(**{what: "abc"}), found()):  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="restore it, or start again with --overwrite") as caught:
            require_identity(before, SETTINGS, {what: "def"})
        assert words in str(caught.value)


def test_a_checkpoint_of_other_settings_or_of_none() -> None:
    with pytest.raises(CheckpointError, match=r"was started with ppo\.kl_coef=0\.1, now ppo\.kl_coef=0\.05"):
        require_identity(found(changed(ppo__kl_coef=0.1)), SETTINGS, {})
    for state in ({}, {"settings": 3, "identity": {}}, {"settings": {}, "identity": 7}):
        with pytest.raises(CheckpointError):
            require_identity(Checkpoint(Path("checkpoint-4"), 4, state), SETTINGS, {})


def test_an_adapters_fingerprint_is_of_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("text")
    before = folder_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("other text")
    (tmp_path / "old.json").mkdir()
    assert folder_fingerprint(tmp_path) == before
    (tmp_path / "adapter_model.safetensors").write_bytes(b"Weights")
    assert folder_fingerprint(tmp_path) != before


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def frozen(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    weights = torch.arange(12, dtype=dtype).reshape(3, 4) / 7
    return [("a", nn.Parameter(weights)), ("b", nn.Parameter(weights.clone()))]


def test_a_fingerprint_says_the_same_of_the_same() -> None:
    assert base_fingerprint("config", frozen()) == base_fingerprint("config", frozen())
    assert len(base_fingerprint("config", frozen())) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_changes_with_a_weight(dtype: torch.dtype) -> None:
    before, parameters = base_fingerprint("config", frozen(dtype)), frozen(dtype)
    weight = parameters[1][1].data[2, 3]
    weight.copy_(torch.nextafter(weight, torch.tensor(9.0, dtype=dtype)))
    assert base_fingerprint("config", parameters) != before


def test_a_fingerprint_knows_places_and_dtypes() -> None:
    """The same numbers in another order, another shape or another dtype are another base."""
    numbers = torch.arange(12.0)
    variants = [numbers, numbers.flip(0), numbers.view(3, 4), numbers.view(3, 4).t(), numbers.half(), numbers.double()]
    assert len({base_fingerprint("config", [("a", nn.Parameter(variant))]) for variant in variants}) == len(variants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_the_checksum_of_parts_is_that_of_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Python's own integers, in chunks of any size."""
    whole = torch.randn(37, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = whole.element_size()
    signed = size > 1
    data = whole.view(torch.uint8).tolist()
    bits = [int.from_bytes(bytes(data[i : i + size]), "little", signed=signed) for i in range(0, len(data), size)]
    expected = sum(b * (2 * i + 1) for i, b in enumerate(bits)) % 2**64
    for chunk in (1, 5, 100):
        monkeypatch.setattr(checkpoints, "CHUNK", chunk)
        parts = [checksum(whole[:10], 0), checksum(whole[10:30], 10), checksum(whole[30:], 30)]
        assert sum(parts) % 2**64 == checksum(whole, 0) == expected


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_fingerprint_is_of_the_parts_of_all_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, alone = [parameter.detach().flatten() for _, parameter in frozen()], base_fingerprint("config", frozen())
    bounds = [12 * number // ranks for number in range(ranks + 1)]
    shares = [[checksum(tensor[start:stop], start) for tensor in whole] for start, stop in pairwise(bounds)]
    monkeypatch.setattr(checkpoints, "all_gather", lambda own: shares)
    assert base_fingerprint("config", frozen()) == alone
    shares[-1][0] += 1
    assert base_fingerprint("config", frozen()) != alone


def test_a_fingerprint_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that is made on the way is larger than a chunk, whatever the size of a matrix."""
    monkeypatch.setattr(checkpoints, "CHUNK", 64)
    with Allocations() as made:
        base_fingerprint("config", [("a", nn.Parameter(torch.zeros(100, 100, dtype=torch.bfloat16)))])
    assert max(each.elements for each in made.seen if "zeros" not in each.operation) <= 64


def test_a_fingerprint_changes_with_names_and_config() -> None:
    before = base_fingerprint("config", frozen())
    assert base_fingerprint("other", frozen()) != before
    assert base_fingerprint("config", [(f"x.{name}", p) for name, p in frozen()]) != before


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}
    assert [other.name for other in tmp_path.iterdir()] == ["run.json"]


def test_what_only_rank_0_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_main(lambda: 7) == 7
    with pytest.raises(CheckpointError, match=r"^no$"):
        on_main(lambda: (_ for _ in ()).throw(CheckpointError("no")))
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    assert on_main(lambda: pytest.fail("rank 1 is not to do it")) is None
