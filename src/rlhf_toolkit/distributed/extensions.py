"""DeepSpeed's compiled op for CPU collectives: built once, by one process at a time, never blocked by a build that was
killed.

PyTorch's build takes a lock file that a killed process leaves behind; the next start then waits for it for ever. The
toolkit builds in a folder of its own under a lock that dies with its process, so a lock file found there is always
stale.

PyTorch asks ninja at every start, and ninja goes by dates and paths: in an environment that was installed again, or in
another one, everything looks newer, and the same op would be built again. What the op is made of names its folder here,
and one that has been built to its end is loaded as it is, from whatever environment.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops

from rlhf_toolkit.errors import TopologyError
from rlhf_toolkit.texts import say

OP = "deepspeed_shm_comm"
FINISHED = "finished"
"""The file that says, by its hash, that an op was built to its end."""


def build_cpu_collectives() -> None:
    """Load the op before the process group needs it; where it is not there yet, build it, which takes a minute, and say
    so. Raises TopologyError where it has to be built and there is no compiler."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "toolkit.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        if installed_ops.get(OP, False) or not _loaded(builder, folder):
            _build(builder, folder)


def _loaded(builder: Any, folder: Path) -> bool:
    """Load the op from ``folder`` and tell DeepSpeed; whether one was there that has been built to its end."""
    made, finished = folder / OP / f"{OP}.so", folder / FINISHED
    if not (made.is_file() and finished.is_file()) or finished.read_text() != _hash(made):
        return False
    spec = importlib.util.spec_from_file_location(OP, made)
    assert spec is not None and spec.loader is not None, "a file whose name ends in .so has a loader"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:  # a home that machines share, which differ in their libraries
        return False
    builder._loaded_ops[OP] = module
    return True


def _build(builder: Any, folder: Path) -> None:
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise TopologyError(
            "DeepSpeed on a CPU builds a small C++ op at first start, but there is no c++ compiler; install g++"
        )
    for stale in folder.glob("*/lock"):
        stale.unlink()
    began = time.perf_counter()
    if not installed_ops.get(OP, False):
        say(f"building DeepSpeed's op for collectives on CPUs with {compiler}, once: about a minute; kept in {folder}")
    builder.load(verbose=False)
    made = folder / OP / f"{OP}.so"
    if made.is_file():
        (folder / FINISHED).write_text(_hash(made))
        say(f"built in {time.perf_counter() - began:.0f} s")


def build_folder() -> Path:
    """A folder for what the op is made of: its sources, this torch, this Python, this kind of machine; the user's
    TORCH_EXTENSIONS_DIR is its parent where it is set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_toolkit" / "torch_extensions"
    parent = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache))
    made_of = hashlib.sha256(
        f"{torch.version.git_version} {sys.implementation.cache_tag} {platform.machine()}".encode()
    )
    for source in sorted((Path(deepspeed.__file__).parent / "ops/csrc/cpu").rglob("*")):
        if source.is_file():
            made_of.update(f"{source.name} {_hash(source)}".encode())
    name = f"rlhf_toolkit_torch{torch.__version__}_{made_of.hexdigest()[:8]}"
    folder = parent if parent.name == name else parent / name  # a child process inherits what is set below
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    build_cpu_collectives()
