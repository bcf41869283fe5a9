"""A run that has not ended, or not yet: what its log and its newest sound checkpoint say, as far as a summary would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_toolkit.checkpoint_files import Checkpoint, newest_sound
from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.export.card_kinds import name_of_kind
from rlhf_toolkit.reporting.records import ppo_curves, read_records, supervised_curves
from rlhf_toolkit.reporting.report import CHECKPOINT, UNFINISHED


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest sound checkpoint of a run without a summary. Raises CheckpointError where it has none."""
    try:
        return newest_sound(folder)[0]
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} has no summary.json, which is written when training ends, and no sound checkpoint; let the run "
            "end (--resume continues)"
        ) from error


def summary_so_far(folder: Path, settings: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``summary.json`` would say of the run up to ``checkpoint``."""
    name, state = name_of_kind(settings), checkpoint.state
    axis = "rollout" if name == "ppo" else "step"
    ppo = settings.get("ppo", {})
    updates = int(ppo["num_ppo_epochs"]) * int(ppo["mini_batches"]) if name == "ppo" else 1
    done = checkpoint.step // updates
    records = [each for each in read_records(folder, "train", axis) if each[axis] <= done]
    evaluations = [each for each in read_records(folder, "eval", axis) if each[axis] <= done]
    curves = ppo_curves(records) if name == "ppo" else supervised_curves(records, name)
    of = f" of {ppo['num_rollouts']}" if name == "ppo" else ""
    return {
        **curves,
        CHECKPOINT: checkpoint.folder.name,
        UNFINISHED: f"the run has not ended: this is {checkpoint.folder.name}, after {axis} {done}{of}",
        "evaluations": evaluations,
        "seconds": sum(record.get("timing_s/step", 0.0) for record in records),
        "world_size": state["ranks"],
        "device": state["device"],
        "versions": state["versions"],
    }
