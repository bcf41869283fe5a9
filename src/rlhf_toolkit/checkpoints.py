"""The run folder: whose it is, which checkpoint a run goes on from, and whether that is one of this very run.

What lies in a checkpoint's folder: ``checkpoint_files.py``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_toolkit.checkpoint_files import LARGEST_JSON, Checkpoint, newest_sound, remove_leftovers, understood
from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.distributed.zero3 import full_shape, own_part
from rlhf_toolkit.errors import CheckpointError, described, shortened
from rlhf_toolkit.files import WANDB_LOGS, link_outside, special_file, write_text
from rlhf_toolkit.given import SECTION
from rlhf_toolkit.run_claims import RUN_FILE, came_to_nothing, hold
from rlhf_toolkit.run_folders import require_usable
from rlhf_toolkit.texts import printable, say

CHANGED = {
    "base": "was trained on another base",
    "rows": "was trained on other data: a row of data.train has been edited, added or removed",
    "tokens": "was trained on other tokens: the same data is rendered otherwise now, because the chat template or the "
    "tokenizer has changed, or because the template writes the date",
    "template": "was rendered by another chat template: the file of data.chat_template has been edited",
    "examples": "was trained on other examples: data.train has been edited, or it is rendered otherwise, because the "
    "chat template or the tokenizer has changed or the template writes the date",
    "reference": "has another reference: the adapter of model.policy_adapter has changed",
    "reward_adapter": "was rewarded by another adapter: that of reward.adapter has changed",
    "reward_model": "was rewarded by another model: that of reward.model has changed",
}
"""What a checkpoint is tied to, and what is said where it is another now."""
FREE_TO_CHANGE = (
    "run.",
    "alarms.",
    "data.evaluation",
    "ppo.num_rollouts",
    f"{SECTION}.data.evaluation",
    f"{SECTION}.functions.",
)  # prefixes: how long a run is and who watches it; and the text of a function, as that of a reward's file is
NEVER_FREE = ("run.seed",)
CHUNK = 2**18  # elements of a parameter that are widened to int64 at a time
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def open_run_folder(folder: Path, experiment: dict[str, Any], *, resume: bool, overwrite: bool) -> Checkpoint | None:
    """Look whether a run may use the folder; return the newest sound checkpoint, or None for a fresh start. Newer ones
    that are not sound are named on the terminal.

    What the folder holds stays until ``claim_run_folder``, so that a mistake found in between costs nobody a run.
    Raises CheckpointError: the folder cannot be written, has no room, belongs to another run, holds nothing to resume,
    or is to be resumed and holds a link to something outside.
    """
    require_usable(folder, resume=resume, overwrite=overwrite)
    if resume:
        link = link_outside(folder, passing_over=WANDB_LOGS)
        if link is not None:
            raise CheckpointError(
                f"{link} is a link to something outside of run.output_dir={folder}, which a run would write to; put "
                "what it leads to in its place, or remove it"
            )
        odd = special_file(folder)
        if odd is not None:
            raise CheckpointError(
                f"{odd} is neither a file nor a folder; whoever reads it may wait for ever; remove it"
            )
        require_same_settings(folder, _settings_in(folder / RUN_FILE), experiment)
        found, passed_over = newest_sound(folder)
        for line in passed_over:
            say(f"passed over: {printable(line)}")
        remove_leftovers(folder)
        return found
    return None


def claim_run_folder(folder: Path, experiment: dict[str, Any], *, overwrite: bool) -> None:
    """Clear the folder for a fresh start and write down whose it is. The folder itself stays: it may be a mount.

    The settings become text before anything is removed. Raises CheckpointError where, without ``overwrite``, another
    run has claimed the folder since ``open_run_folder`` looked into it.
    """
    text = _as_text(experiment)
    if not overwrite and (folder / RUN_FILE).exists() and not came_to_nothing(folder):
        raise CheckpointError(
            f"run.output_dir={folder} has been claimed by another run while this one was loading; choose another folder"
        )
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_text(folder / RUN_FILE, text)
    hold(folder)


def require_identity(checkpoint: Checkpoint, settings: dict[str, Any], identity: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the checkpoint is of a run with these ``settings`` and with what ``identity`` names,
    by a fingerprint of each: what its numbers mean only together with."""
    with understood(checkpoint.folder):
        require_same_settings(checkpoint.folder, checkpoint.state["settings"], settings)
        before = dict(checkpoint.state["identity"])
    for what, now in identity.items():
        if before.get(what) != now:
            raise CheckpointError(
                f"{checkpoint.folder} {CHANGED[what]} (fingerprint {shortened(before.get(what), 40)}, now {now!r}); "
                "restore it, or start again with --overwrite"
            )


def base_fingerprint(config: str, frozen: list[tuple[str, nn.Parameter]]) -> str:
    """A short hash of the base's config and of every frozen tensor's name, shape, dtype and ``checksum``. A collective.

    Each rank reads the part that it holds, ``CHUNK`` elements at a time, so that a base that no device could hold whole
    has a fingerprint too. The sum is of integers, and therefore the same however many ranks share it.
    """
    shares = all_gather([checksum(*own_part(parameter)) for _, parameter in frozen])
    digest = hashlib.sha256(config.encode())
    for (name, parameter), parts in zip(frozen, zip(*shares, strict=True), strict=True):
        digest.update(f"{name} {full_shape(parameter)} {parameter.dtype} {sum(parts) % 2**64}".encode())
    return digest.hexdigest()[:16]


def folder_fingerprint(folder: str | Path) -> str:
    """A short hash of the names and bytes of the weights and settings in an adapter's folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".bin") and path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:16]


def fingerprint(values: Iterable[Any]) -> str:
    """A short hash of values as JSON; of what JSON does not know only the type counts."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, default=lambda each: type(each).__name__).encode() + b"\n")
    return digest.hexdigest()[:16]


def checksum(part: Tensor, start: int) -> int:
    """The sum of bits[i] (2 (start + i) + 1) modulo 2^64, with the bits of each element of a flat tensor as an integer.

    Every factor is odd and so has an inverse: a change of any one element changes the sum. The factors tell places
    apart, and the sums of parts add up to that of the whole.
    """
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for begin in range(0, len(part), CHUNK):
        chunk = part[begin : begin + CHUNK].contiguous().view(AS_INTEGERS[part.element_size()]).long()
        first = 2 * (start + begin) + 1
        total += (chunk * torch.arange(first, first + 2 * len(chunk), 2, device=chunk.device)).sum()
    return int(total) % 2**64


def write_json(path: Path, value: Any) -> None:
    """Write so that a reader sees the old file or the new one, never a part; a link at ``path`` is replaced."""
    write_text(path, _as_text(value))


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def require_same_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError, for the first, unless the settings of a folder are those of ``now``, but for how long a
    run is and who watches it."""
    for section, settings in now.items():
        for key, value in settings.items():
            name, old = f"{section}.{key}", before.get(section, {}).get(key)
            free = name.startswith(FREE_TO_CHANGE) and name not in NEVER_FREE
            if old != value and not free:
                raise CheckpointError(
                    f"{folder} was started with {name}={shortened(old)}, now {name}={shortened(value)}; resume with "
                    "the same settings"
                )


def _settings_in(path: Path) -> dict[str, Any]:
    """The settings that a run has written to ``path``. Raises CheckpointError where it holds none."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON // 2**20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({described(error)}); restore it, or start with --overwrite"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
        raise CheckpointError(f"{path} holds no settings; restore it, or start with --overwrite")
    return found
