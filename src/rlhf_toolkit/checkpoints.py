"""The run folder and what makes a checkpoint whole.

Trainer writes adapters, heads, optimizer, scheduler and random states; ``manifest.json`` is written last and holds the
rest: the KL coefficient, the W&B run, the experiment, a fingerprint of the base, the number of ranks and the ZeRO
stage. A checkpoint without it was interrupted and does not count.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rlhf_toolkit.distributed.collectives import agreement, all_gather, barrier, from_main, rank
from rlhf_toolkit.distributed.zero3 import full_shape, own_part
from rlhf_toolkit.errors import CheckpointError, described, shortened
from rlhf_toolkit.files import WANDB_LOGS, is_plain_name, link_outside, write_text

T = TypeVar("T")
MANIFEST, RUN_FILE = "manifest.json", "run.json"
LATEST = "latest"
"""DeepSpeed's file in a checkpoint: the name of the folder in it that holds the optimizer."""
UNKNOWN = "unknown"
LEAST_FREE_BYTES = 256 * 2**20
FREE_TO_CHANGE = (
    "run.",
    "alarms.",
    "data.evaluation",
    "ppo.num_rollouts",
)  # prefixes: how long a run is and who watches it
NEVER_FREE = ("run.seed",)
CHUNK = 2**18  # elements of a parameter that are widened to int64 at a time
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class ManifestWriter(TrainerCallback):
    """Completes each checkpoint with its manifest. ``state`` gives what only the run knows."""

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self.state = state

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the manifest, to a temporary name that is then renamed, after every rank has written its part."""
        barrier()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_json(folder / MANIFEST, {"step": state.global_step, **self.state()})
        barrier()


def open_run_folder(folder: Path, experiment: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Look whether a run may use the folder; return the checkpoint to resume from, or None for a fresh start.

    What the folder holds stays until ``claim_run_folder``, so that a mistake found in between costs nobody a run.
    Raises CheckpointError: the folder cannot be written, has no room, belongs to another run, holds nothing to resume,
    or is to be resumed and holds a link to something outside.
    """
    _require_room(folder)
    holds_run = (folder / RUN_FILE).exists()
    if not holds_run and any(folder.iterdir()):
        raise CheckpointError(
            f"run.output_dir={folder} holds files but no {RUN_FILE}, so it is not a run folder; choose another"
        )
    if resume:
        if not holds_run:
            raise CheckpointError(f"--resume, but run.output_dir={folder} holds no run; start without --resume")
        link = link_outside(folder, passing_over=WANDB_LOGS)
        if link is not None:
            raise CheckpointError(
                f"{link} is a link to something outside of run.output_dir={folder}, which a run would write to; put "
                "what it leads to in its place, or remove it"
            )
        _require_same(folder, experiment)
        return last_checkpoint(folder)
    if holds_run and not overwrite:
        raise CheckpointError(
            f"run.output_dir={folder} holds another run; continue it with --resume, replace it with --overwrite, "
            "or choose another folder"
        )
    return None


def claim_run_folder(folder: Path, experiment: dict[str, Any]) -> None:
    """Clear the folder for a fresh start and write down whose it is. The folder itself stays: it may be a mount.

    The settings become text before anything is removed.
    """
    text = _as_text(experiment)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_text(folder / RUN_FILE, text)


def last_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint. Raises CheckpointError where there is none, and where its file ``latest`` names
    no folder in it."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MANIFEST}")]
    complete = {int(number): path for path in found if (number := path.name.rpartition("-")[2]).isdecimal()}
    if not complete:
        raise CheckpointError(
            f"{folder} has no complete checkpoint to resume from; set run.save_every, or start again with --overwrite"
        )
    newest = complete[max(complete)]
    tag = newest / LATEST
    if tag.is_file() and not is_plain_name(tag.read_text(errors="replace").strip()):
        raise CheckpointError(f"{tag} does not name a folder in {newest}; restore that file, or start with --overwrite")
    return newest


def read_manifest(checkpoint: Path, *, fingerprint: str, world_size: int, zero_stage: int | None) -> dict[str, Any]:
    """The manifest of a checkpoint that fits this base, this number of ranks and this way of starting them; otherwise
    CheckpointError. ``zero_stage`` is None without DeepSpeed, which keeps the optimizer's state in files of its own."""
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    if manifest["base"] != fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained on another base (fingerprint {manifest['base']}, now {fingerprint}); use "
            "that one"
        )
    if manifest["world_size"] != world_size:
        raise CheckpointError(
            f"{checkpoint} was written by {manifest['world_size']} ranks and cannot be resumed on {world_size}: "
            f"each rank holds a part of the optimizer; start {manifest['world_size']} processes"
        )
    if manifest.get("zero_stage", UNKNOWN) != zero_stage:
        before, now = (
            "by a version that did not note the ZeRO stage"
            if stage == UNKNOWN
            else "without DeepSpeed"
            if stage is None
            else f"under ZeRO stage {shortened(stage)}"
            for stage in (manifest.get("zero_stage", UNKNOWN), zero_stage)
        )
        raise CheckpointError(
            f"{checkpoint} was written {before} and cannot be resumed {now}: the optimizer would start afresh, since "
            "its state is kept in another form; start with the launch config that the run began with"
        )
    return manifest


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


def on_main(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 only and hand its result, or its error, to every rank."""
    result: T | None = None
    with agreement("the work that only it does"):
        if rank() == 0:
            result = action()
    return cast(T, from_main(result))


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _require_room(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # a new file, of a name that nobody can foresee
            probe.write(b"x")
    except OSError as error:
        raise CheckpointError(
            f"run.output_dir={folder} cannot be written: {error.strerror}; choose a folder you may write to"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise CheckpointError(
            f"run.output_dir={folder} has {free / 2**20:.0f} MiB of free space, a run needs at least "
            f"{LEAST_FREE_BYTES // 2**20}; make room or choose another disk"
        )


def _require_same(folder: Path, experiment: dict[str, Any]) -> None:
    """Raise CheckpointError unless the folder's settings are those of ``experiment``, but for how long a run is and who
    watches it."""
    path = folder / RUN_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({described(error)}); restore it, or start with --overwrite"
        ) from error
    if not isinstance(before, dict) or not all(isinstance(section, dict) for section in before.values()):
        raise CheckpointError(f"{path} holds no settings; restore it, or start with --overwrite")
    for section, settings in experiment.items():
        for key, value in settings.items():
            name, old = f"{section}.{key}", before.get(section, {}).get(key)
            free = name.startswith(FREE_TO_CHANGE) and name not in NEVER_FREE
            if old != value and not free:
                raise CheckpointError(
                    f"{folder} was started with {name}={old!r}, now {name}={value!r}; resume with the same settings"
                )
