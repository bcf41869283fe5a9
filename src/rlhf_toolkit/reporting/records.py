"""The records in a run folder: read, mended where a kill has cut them, and summed up at the end.

``log.jsonl`` has one object for each rollout (``kind`` train) and each evaluation (``kind`` eval), ``samples.jsonl``
sample responses; ``summary.json`` is written when training ends. Nothing here needs torch: ``rlhf report`` is quick.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import rlhf_toolkit
from rlhf_toolkit.errors import CheckpointError, described
from rlhf_toolkit.files import write_text
from rlhf_toolkit.reporting.seal import SEAL, SUMMARY, require_seal, sealed
from rlhf_toolkit.texts import say

Record = dict[str, Any]

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "wandb")
TRAIN, EVAL = "train", "eval"
TRAINED = ("policy", "reward")
"""Folders of what a run leaves, one of which every run has."""


def read_records(folder: Path, kind: str, axis: str = "rollout") -> list[Record]:
    """The records of one kind in ``log.jsonl``, a later one of the same rollout (after a resume) replacing the
    earlier. Raises CheckpointError where a line of that file is no record."""
    records = [record for record in _lines(folder / "log.jsonl") if record["kind"] == kind]
    return [*{record[axis]: record for record in records}.values()]


def history(folder: Path, *, axis: str, until: int) -> list[tuple[Record, list[Record]]]:
    """The records up to rollout or step ``until``, each with its samples; of two of the same the later one."""
    records, samples = _lines(folder / "log.jsonl"), _lines(folder / "samples.jsonl")
    newest = {(each["kind"], each[axis]): each for each in records if each[axis] <= until}
    of = {place: list[Record]() for place in newest}
    for sample in samples:
        if (place := (sample["kind"], sample[axis])) in of:
            of[place].append(sample)
    return [(record, of[place]) for place, record in newest.items()]


def mend_logs(folder: Path, *, axis: str = "rollout", until: int = 0) -> None:
    """Make the logs of a run that goes on after rollout or step ``until`` ready for its next record.

    The line that the run was killed in the middle of is cut off, so that the next one begins a line of its own. Records
    that are not there are named on the terminal: nothing else holds them, and a run can go on without.

    Raises CheckpointError where what is left is not all records: the summary at the end of the run would need them.
    """
    for name in ("log.jsonl", "samples.jsonl"):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                os.truncate(path, content.rfind(b"\n") + 1)
        _lines(path)
    there = {record[axis] for record in read_records(folder, "train", axis)}
    lost = [number for number in range(1, until + 1) if number not in there]
    if lost:
        say(
            f"{folder / 'log.jsonl'} has lost {len(lost)} of {until} records, the first of {axis} {lost[0]}, the last "
            f"of {axis} {lost[-1]}: the summary and an offline W&B run will lack them; to have them, stop, restore "
            "that file, and continue with --resume"
        )


def _lines(path: Path) -> list[Record]:
    """The records in a file of JSON lines, which may be missing. Raises CheckpointError for anything else in it."""
    if not path.exists() and not path.is_symlink():
        return []
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; put the file itself there, or remove it")
    records = list[Record]()
    try:
        whole, newline, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a kill may have cut the last line
        for line in whole.splitlines() if newline else ():
            record = json.loads(line)
            place = record.get("rollout", record.get("step")) if isinstance(record, dict) else None
            if not isinstance(place, int) or not isinstance(record.get("kind"), str):
                raise ValueError("it is no record of a run")
            records.append(record)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read at line {len(records) + 1} ({described(error)}); restore that file, or remove that "
            "line"
        ) from error
    return records


def write_summary(folder: Path, *, seconds: float, world_size: int, device: str) -> Record:
    """Write and return ``summary.json``: the score of every rollout, None where no response got one, time, speed,
    memory, evaluations and versions."""
    summary = {
        **ppo_curves(read_records(folder, "train")),
        "seconds": seconds,
        "evaluations": read_records(folder, "eval"),
        "world_size": world_size,
        "device": device,
        "versions": versions(),
    }
    return _write_sealed(folder, summary)


def ppo_curves(records: Sequence[Record]) -> Record:
    """What a summary says of the rollouts of these records."""
    seconds = [record["timing_s/step"] for record in records]
    return {
        "mean_scores": [record.get("critic/score/mean") for record in records],
        "mean_raw_scores": [record.get("critic/raw_score/mean") for record in records],
        "ref_kl": [record.get("actor/ref_kl") for record in records],
        "seconds_per_rollout": seconds,
        "tokens_per_second": sum(record["perf/total_num_tokens"] for record in records) / max(sum(seconds), 1e-9),
        "peak_memory_gib": most_memory(records),
    }


def supervised_curves(records: Sequence[Record], prefix: str) -> Record:
    """What a summary says of the steps of these records."""
    return {
        "losses": [record[f"{prefix}/loss"] for record in records if f"{prefix}/loss" in record],
        "accuracies": [record[f"{prefix}/accuracy"] for record in records if f"{prefix}/accuracy" in record],
        "peak_memory_gib": most_memory(records),
    }


def most_memory(records: Sequence[Record]) -> float:
    """The peak over records, in GiB."""
    return max((record["perf/max_memory_allocated_gb"] for record in records), default=0.0)


def _write_sealed(folder: Path, summary: Record) -> Record:
    whole = sealed(folder, summary)
    write_text(folder / SUMMARY, json.dumps(whole, indent=2) + "\n")
    return whole


def summary_of_ended(folder: Path, rounds: int, axis: str) -> Record | None:
    """``summary.json`` where it, what it is made of and what was trained are as a run of so many rounds left them; else
    None."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        require_seal(folder, summary)
        last = max(record[axis] for record in read_records(folder, "train", axis))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, CheckpointError):
        return None
    trained = any((folder / role).is_dir() for role in TRAINED)
    return dict(summary) if trained and SEAL in summary and last >= rounds else None


def versions() -> dict[str, str]:
    """The version of the toolkit, and those of ``PACKAGES`` as far as they are installed."""
    found = {"rlhf_toolkit": rlhf_toolkit.__version__}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_fine_tuning_summary(
    folder: Path, *, seconds: float, world_size: int, device: str, prefix: str, extra: Record
) -> Record:
    """Write and return ``summary.json`` of a supervised run: its curve, evaluations, time, memory and versions."""
    summary = {
        **supervised_curves(read_records(folder, "train", "step"), prefix),
        "evaluations": read_records(folder, "eval", "step"),
        "seconds": seconds,
        "world_size": world_size,
        "device": device,
        "versions": versions(),
        **extra,
    }
    return _write_sealed(folder, summary)


def kind_of_record(logs: Record) -> str | None:
    """Of what a record is, a round of training or an evaluation; None for Trainer's own closing record."""
    if "train/loss" in logs or "train/grad_norm" in logs:  # no loss is there where every update was left out
        return TRAIN
    return EVAL if any(name.startswith("eval/") for name in logs) else None
