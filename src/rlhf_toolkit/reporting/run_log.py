"""The primary record of a run: JSON lines in the run folder. Only the true rank 0 writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_toolkit.files import appended
from rlhf_toolkit.reporting.records import Record, kind_of_record, read_records

Sink = Callable[[Record, list[Record]], None]


class RunLog(TrainerCallback):
    """Hands each record to its sinks (the JSONL files, W&B) and keeps what the summary needs.

    Args:
        folder: the run folder.
        updates_per_rollout: optimizer steps of one rollout, to count rollouts from Trainer's steps.
        samples: gives the newest sample responses, by kind (``train`` or ``eval``).
        sinks: further places for records, such as W&B.
        axis: what is counted: rollouts of PPO, or the steps of a supervised run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        updates_per_rollout: int,
        samples: Callable[[str], Sequence[Record]],
        sinks: tuple[Sink, ...] = (),
        axis: str = "rollout",
    ) -> None:
        self.folder, self.updates_per_rollout, self.samples, self.sinks = folder, updates_per_rollout, samples, sinks
        self.axis = axis

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Record | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a record that is ours; Trainer's closing record (train_runtime and the like) is not."""
        kind = kind_of_record(logs or {})
        if kind is None or not state.is_world_process_zero:
            return
        ours = {name: value for name, value in (logs or {}).items() if "/" in name}  # not Trainer's own, such as epoch
        record = {"kind": kind, self.axis: state.global_step // self.updates_per_rollout, **ours}
        samples = [{"kind": kind, self.axis: record[self.axis], **sample} for sample in self.samples(kind)]
        _append(self.folder / "log.jsonl", [record])
        _append(self.folder / "samples.jsonl", samples)
        for sink in self.sinks:
            sink(record, samples)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether ``log.jsonl`` has no evaluation of after ``step`` optimizer steps. Raises CheckpointError."""
        place = step // self.updates_per_rollout
        return all(record[self.axis] != place for record in read_records(self.folder, "eval", self.axis))


def _append(path: Path, records: list[Record]) -> None:
    with appended(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
