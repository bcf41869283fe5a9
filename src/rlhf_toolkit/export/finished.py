"""What a run has left in its folder, read for a report or a card. Of a finished run nothing here needs torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_toolkit.errors import DISK_FULL, CheckpointError, RLHFError, described
from rlhf_toolkit.files import MOST_BYTES_OF_JSON, WANDB_LOGS, link_outside, special_file
from rlhf_toolkit.reporting.seal import require_seal
from rlhf_toolkit.run_claims import RUN_FILE

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class FinishedRun:
    """A run folder: the experiment's settings, section -> name -> value, the summary and each adapter's settings, by
    its folder. Of a run that has not ended they are those of its newest checkpoint, and folders begin with ``prefix``.
    """

    folder: Path
    settings: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    prefix: str = ""

    @property
    def is_whole_model(self) -> bool:
        """Whether the run trained all weights: ``policy/`` is a model, and there is no adapter."""
        return not self.adapters and (self.folder / f"{self.prefix}policy/config.json").is_file()


def read_run(folder: Path) -> FinishedRun:
    """Read a run: a finished one, or what there is up to the newest checkpoint. Raises CheckpointError where the folder
    holds neither, a link to something outside, or files that are not as the run left them."""
    if not (folder / RUN_FILE).is_file():
        raise CheckpointError(f"{folder} has no {RUN_FILE}, so it is not a run folder; give a run's run.output_dir")
    link = link_outside(folder, passing_over=WANDB_LOGS)
    if link is not None:
        raise CheckpointError(f"{link} is a link to something outside of the run folder; put the file itself there")
    odd = special_file(folder)
    if odd is not None:
        raise CheckpointError(f"{odd} is a pipe, a socket or a device, not a file; remove it")
    settings = read_json(folder / RUN_FILE)
    if not all(isinstance(section, dict) for section in settings.values()):
        raise CheckpointError(f"{folder / RUN_FILE} holds no settings; restore that file")
    if os.path.lexists(folder / "summary.json"):  # whatever it is, it is no run that has not ended
        summary, prefix = read_json(folder / "summary.json"), ""
        require_seal(folder, summary)
    else:
        from rlhf_toolkit.export.unfinished import newest_checkpoint, summary_so_far  # with torch, which takes seconds

        checkpoint = newest_checkpoint(folder)
        prefix = f"{checkpoint.folder.name}/"
        with readable(folder):
            summary = summary_so_far(folder, settings, checkpoint)
    configs = sorted((folder / prefix).glob(f"*/{ADAPTER_CONFIG}"))
    return FinishedRun(
        folder, settings, summary, {f"{prefix}{path.parent.name}": read_json(path) for path in configs}, prefix
    )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Around all that is made of a run folder's files: they may hold anything, and where that is not what a run writes,
    a name is missing or a number is text, it is one line. The toolkit's own errors and a full disk pass."""
    try:
        yield
    except RLHFError:
        raise
    except Exception as error:
        if DISK_FULL in str(error):
            raise
        raise CheckpointError(
            f"{folder} holds something else in run.json, summary.json, an adapter's config or a log than a run writes "
            f"there ({described(error)}); restore these files"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
    try:
        if path.stat().st_size > MOST_BYTES_OF_JSON:
            raise ValueError(f"it has more than {MOST_BYTES_OF_JSON} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({described(error)}); restore that file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; restore that file")
    return value
