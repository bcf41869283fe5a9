"""DeepSpeed's compiled op for CPU collectives: built once, by one process at a time, never blocked by a build that was
killed.

PyTorch's build takes a lock file that a killed process leaves behind; the next start then waits for it for ever. The
toolkit builds in a folder of its own under a lock that dies with its process, so a lock file found there is always
stale.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from rlhf_toolkit.errors import TopologyError


def build_cpu_collectives() -> None:
    """Build and load the op before the process group needs it. Takes a minute the first time, a second afterwards."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise TopologyError(
            "DeepSpeed on a CPU builds a small C++ op at first start, but there is no c++ compiler; install g++"
        )
    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "toolkit.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        for stale in folder.glob("*/lock"):
            stale.unlink()
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None:
            builder.load(verbose=False)


def build_folder() -> Path:
    """A folder for this environment and this torch; the user's TORCH_EXTENSIONS_DIR is its parent where it is set.

    The build refers to headers of its environment, so another environment in the same folder would build it anew.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_toolkit" / "torch_extensions"
    parent = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache))
    name = f"rlhf_toolkit_torch{torch.__version__}_{zlib.crc32(sys.prefix.encode()):08x}"
    folder = parent if parent.name == name else parent / name  # a child process inherits what is set below
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


if __name__ == "__main__":
    build_cpu_collectives()
