"""Whether a run may use a folder, as far as it shows at once: ``rlhf train`` asks before torch is imported, the start
of a run once more."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.run_claims import RUN_FILE, came_to_nothing

LEAST_FREE_BYTES = 256 * 2**20


def require_usable(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether the folder, which is made where it is missing, holds a run. Raises CheckpointError where it cannot be
    written, has no room, holds something else than a run or, without ``resume`` or ``overwrite``, another one that has
    come to something, or where there is nothing to ``resume``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    require_room(folder)
    holds_run = (folder / RUN_FILE).exists()
    if not holds_run and any(folder.iterdir()):
        raise CheckpointError(
            f"run.output_dir={folder} holds files but no {RUN_FILE}, so it is not a run folder; choose another"
        )
    if resume and not holds_run:
        raise CheckpointError(f"--resume, but run.output_dir={folder} holds no run; start without --resume")
    if holds_run and not (resume or overwrite or came_to_nothing(folder)):
        raise CheckpointError(
            f"run.output_dir={folder} holds another run; continue it with --resume, replace it with --overwrite, "
            "or choose another folder"
        )
    return holds_run


def require_room(folder: Path) -> None:
    """Raise CheckpointError where no file can be made in the folder, or in the nearest one above it that is there, or
    where the disk has too little room. Nothing stays behind."""
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place) as probe:  # a new file, of a name that nobody can foresee
            probe.write(b"x")
    except OSError as error:
        raise _not_writable(folder, error) from error
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE_BYTES:
        raise CheckpointError(
            f"run.output_dir={folder} has {free / 2**20:.0f} MiB of free space, a run needs at least "
            f"{LEAST_FREE_BYTES // 2**20}; make room or choose another disk"
        )


def _not_writable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"run.output_dir={folder} cannot be written: {error.strerror}; choose a folder you may write to"
    )
