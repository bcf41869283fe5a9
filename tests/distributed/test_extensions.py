"""DeepSpeed's compiled op: a build that was killed leaves a lock file behind, and the next start must not wait for
it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_toolkit.distributed import extensions
from rlhf_toolkit.errors import TopologyError
from tests.support.launch import build_op, run

BUILD = [sys.executable, "-m", "rlhf_toolkit.distributed.extensions"]
OP = "deepspeed_shm_comm"


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """``build_folder`` tells PyTorch by an environment variable."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", ""))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A copy of the folder with the op, as a start that was killed while building would leave it."""
    build_op()
    source = extensions.build_folder()
    copy = tmp_path / source.name
    shutil.copytree(source, copy)
    (copy / OP / "lock").touch()
    (copy / extensions.FINISHED).unlink()
    return copy


@pytest.mark.thorough
def test_a_stale_lock_is_removed_and_nobody_waits(built: Path) -> None:
    run(BUILD, seconds=600, TORCH_EXTENSIONS_DIR=str(built.parent)).succeeded()
    assert not (built / OP / "lock").exists()
    assert (built / OP / f"{OP}.so").exists()
    assert sorted(path.name for path in built.parent.iterdir()) == [built.name]


def test_a_child_process_finds_the_same_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    first = extensions.build_folder()
    assert first.parent == tmp_path
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(first)
    assert extensions.build_folder() == first


def test_another_environment_does_not_build_it_again(built: Path) -> None:
    """Neither does one whose files are all newer than the op, nor one without a compiler: what has been built to its
    end is loaded as it is."""
    (built / extensions.FINISHED).write_bytes((extensions.build_folder() / extensions.FINISHED).read_bytes())
    (built / OP / "build.ninja").write_text("another environment's paths")
    for path in built.rglob("*.o"):
        path.unlink()
    quiet = run(BUILD, seconds=60, TORCH_EXTENSIONS_DIR=str(built.parent), CXX="no-such-compiler").succeeded()
    assert "building" not in quiet.output


@pytest.mark.parametrize("spoilt", [False, True])
def test_what_was_not_built_to_its_end_is_built_again(
    spoilt: bool, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is one whose bytes have changed. What is built, and where it stays, is said."""
    if spoilt:
        (built / extensions.FINISHED).write_bytes((extensions.build_folder() / extensions.FINISHED).read_bytes())
        (built / OP / f"{OP}.so").write_bytes(b"half of it")
    told, loaded = list[str](), list[str]()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(built.parent))
    monkeypatch.setattr(extensions, "say", told.append)
    builder = SimpleNamespace(load=lambda verbose: loaded.append(OP), _loaded_ops={})
    accelerator = SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr(extensions, "get_accelerator", lambda: accelerator)
    extensions.build_cpu_collectives()
    assert loaded == [OP] and builder._loaded_ops == {}
    assert told[0] == (
        f"building DeepSpeed's op for collectives on CPUs with c++, once: about a minute; kept in {built}"
    )
    assert told[1].startswith("built in ")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TopologyError) as caught:
        extensions.build_cpu_collectives()
    assert str(caught.value) == (
        "DeepSpeed on a CPU builds a small C++ op at first start, but there is no c++ compiler; install g++"
    )
