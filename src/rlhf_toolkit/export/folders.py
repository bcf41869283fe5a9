"""Finds the folder on this disk that a command line names: of a model, of an adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from rlhf_toolkit.errors import ModelError, shortened
from rlhf_toolkit.export.finished import ADAPTER_CONFIG, read_json
from rlhf_toolkit.export.own_tokenizer import GENERATION_CONFIG, TOKENIZER_FILES
from rlhf_toolkit.models.folders import check_model_folder
from rlhf_toolkit.run_claims import RUN_FILE

ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEADS = ("value_head.safetensors", "reward_head.safetensors")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")
"""What is fetched of a model of the hub: weights, configs, tokenizer; not the copies for other frameworks."""

REVISION = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


def model_folder(name: str) -> Path:
    """The folder of a model: ``name`` itself where it is one, else its files of the hub, fetched or from the cache;
    ``NAME@REVISION`` is a branch, tag or commit there.

    Raises ModelError where it is neither.
    """
    return _located(name, "a model", MODEL_FILES)


def base_name(name: str, adapters: Sequence[Path]) -> str:
    """``name`` of a base as the folders of ``adapters`` were trained on it: with the revision that PEFT's settings
    there name, where ``name`` is the hub's and has none. Raises ModelError where they name several."""
    if "@" in name or Path(name).expanduser().is_dir():
        return name
    named = {read_json(folder / ADAPTER_CONFIG).get("revision") for folder in adapters} - {None, ""}
    if len(named) > 1:
        raise ModelError(
            f"the adapters were trained on {len(named)} revisions of {name} ({shortened(sorted(map(str, named)))}); "
            f"say which one to use, as {name}@REVISION"
        )
    return f"{name}@{named.pop()}" if named else name


def adapter_folder(name: str) -> Path:
    """The folder of a PEFT adapter for a language model, with the tokenizer that may lie beside it; a name of the hub
    is fetched as ``model_folder`` does.

    Raises ModelError where it is none, a whole model among these, and for an adapter that belongs to a scalar head.
    """
    folder = _located(name, "an adapter", ("adapter_*", *HEADS, GENERATION_CONFIG, *TOKENIZER_FILES))
    if not (folder / ADAPTER_CONFIG).is_file():
        whole = [place for place in (folder, folder / "policy") if (place / "config.json").is_file()]
        if whole:
            raise ModelError(
                f"{name} is no adapter: {whole[0]} holds a whole model, as sft.full trains it, and has nothing to be "
                "merged or to be put on a base; use it as a base itself"
            )
        inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"it has {', '.join(f'{name}/{found}' for found in inside)}" if inside else "give a PEFT adapter"
        raise ModelError(f"{name} has no {ADAPTER_CONFIG}; {hint}")
    for head in HEADS:
        if (folder / head).exists():
            raise ModelError(
                f"{name} holds {head}: its adapter works for that scalar head and says nothing as a language model; "
                "give the policy's folder"
            )
    return folder


def trained_quantised(adapter: Path) -> str | None:
    """A line for those who put this adapter on a base of full precision although its run trained it on a quantised
    one; None where its run did not, or where the adapter lies in no run folder that says so."""
    for folder in (adapter.parent, adapter.parent.parent):  # of a checkpoint too
        if (folder / RUN_FILE).is_file():
            model = read_json(folder / RUN_FILE).get("model")
            kind = str(model.get("quantization", "none")) if isinstance(model, dict) else "none"
            if kind == "none":
                return None
            return (
                f"{adapter} was trained on its base in {shortened(kind, 20)} and is put on weights of full precision "
                "here: what the two say differs a little"
            )
    return None


def is_path(name: str) -> bool:
    """Whether a name can only be a folder; those of the hub have one slash at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def revision_of(name: str) -> tuple[str, str | None]:
    """``NAME@REVISION`` as a name of the hub and a branch, tag or commit; a folder and a name without have none. Raises
    ModelError where what stands behind the @ cannot be one."""
    repository, at, revision = name.partition("@")
    if not at or is_path(repository) or Path(name).expanduser().exists():
        return name, None
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise ModelError(f"{shortened(name)} names no revision behind the @; give a branch, a tag or a commit")
    return repository, revision


def _located(name: str, what: str, patterns: tuple[str, ...]) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(name)
        return folder
    repository, revision = revision_of(name)
    if folder.exists() or is_path(repository):
        raise ModelError(f"{name} is no folder; give the folder of {what}, or its name on the hub")
    try:
        fetched = Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:  # hub errors are OSErrors: no such name, no access, no network
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is no folder here and the hub does not give it: {first}; give the folder of {what}, or its name "
            "on the hub"
        ) from error
    check_model_folder(str(fetched))
    return fetched
