"""Gather the wheels that the GPU exam's machine lacks, so that it needs no network there.

    python bench/gpu_wheels.py [FOLDER]      # by default .gpu_wheels, which git ignores; about a minute

The machine to plan for is Linux on x86-64 with Python 3.12, torch, transformers, accelerate and numpy, and without
DeepSpeed, PEFT in our version, datasets and TRL. ``bench/gpu_exam.py --wheels FOLDER`` installs what is here. Each
name is one file: nothing is resolved, and what the machine has already is not replaced unless it is named here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".gpu_wheels"
LARGEST_MIB = 60
BUILT = ("deepspeed==0.19.8",)  # published as source only; its operators are not built
WHEELS = {  # name and version -> who needs it
    "hjson==3.1.0": "deepspeed",
    "py-cpuinfo==9.0.0": "deepspeed",
    "msgpack": "deepspeed",
    "einops": "deepspeed",
    "ninja": "deepspeed names it; torch's own extensions are built with it",
    "pydantic==2.14.4": "deepspeed",
    "pydantic-core==2.50.5": "pydantic, exactly this one",
    "annotated-types": "pydantic",
    "typing-inspection": "pydantic",
    "typing-extensions>=4.16": "pydantic",
    "peft==0.21.2": "the toolkit",
    "datasets==5.2.0": "the toolkit",
    "dill<0.4.2": "datasets",
    "multiprocess<0.70.20": "datasets",
    "xxhash": "datasets",
    "psutil": "the toolkit",
    "bitsandbytes==0.50.2": "quantised bases and moments in 8 bits; holds kernels for every CUDA, 41 MiB",
    "trl==1.12.0": "section trl: the last version with PPO",
    "vaderSentiment": "section trl: the reward",
}
PLATFORM = ["--python-version", "3.12", "--implementation", "cp"] + [
    word
    for glibc in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
    for word in ("--platform", f"{glibc}_x86_64")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: %(default)s")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):  # two versions of one package would stop the installation
        old.unlink()
    download(folder)
    build(folder)
    wheels = sorted(folder.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{total:6.2f} MiB  in {len(wheels)} wheels, {folder}")
    if len(wheels) != len(WHEELS) + len(BUILT) or total > LARGEST_MIB:
        sys.exit(f"expected {len(WHEELS) + len(BUILT)} wheels of at most {LARGEST_MIB} MiB together")


def download(folder: Path) -> None:
    """Wheels for the exam's machine, whatever this one is."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *PLATFORM]
    subprocess.run([*command, "--dest", str(folder), *WHEELS], check=True)


def build(folder: Path) -> None:
    """Pure Python, so that what is built here fits there. In a folder without this project: DeepSpeed's build looks
    around."""
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder.resolve())]
        subprocess.run([*command, *BUILT], check=True, cwd=elsewhere, env={**environment(), "DS_BUILD_OPS": "0"})
    if not list(folder.glob("deepspeed-*-py3-none-any.whl")):
        sys.exit(f"DeepSpeed's wheel in {folder} is not pure Python: {[w.name for w in folder.glob('deepspeed*')]}")


def environment() -> dict[str, str]:
    """This process's, without what would make DeepSpeed's build import another accelerator."""
    return {**os.environ, "DS_ACCELERATOR": "cpu"}


if __name__ == "__main__":
    main()
