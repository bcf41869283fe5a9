"""The mini-batches whose update was left out, as files of the run folder: ``rlhf inspect`` replays them.

``skipped/step-7`` holds ``batch.safetensors``, the micro-batches of all ranks as their tensors; ``batch.json``, what is
known beside; and, where they are small, the trained roles as a checkpoint has them. Nothing is pickled. Their number
and their size are bounded, and the first ones stay: what comes later is likely to follow from them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_toolkit.errors import DataError, described, shortened
from rlhf_toolkit.files import write_text

FOLDER, TENSORS, RECORD = "skipped", "batch.safetensors", "batch.json"
FORMAT = 1
MOST_KEPT = 8
"""Mini-batches of a run."""
MOST_BYTES = 2**28
"""Of one mini-batch's tensors; what is beyond is left out, micro-batches with finite losses first."""
MOST_BYTES_OF_WEIGHTS = 2**30
"""Of the trained weights, which are kept with each; larger ones are not."""
MOST_BYTES_OF_RECORD = 2**24

Part = dict[str, Tensor]
"""A micro-batch: its columns by name."""


@dataclass(frozen=True)
class KeptBatch:
    """A mini-batch whose update was left out.

    Attributes:
        kind: whose: ``ppo``, ``sft``, ``reward_model`` or ``dpo``.
        step: the number of the update, from 1.
        parts: micro-batches, with ``places`` (rank, number on it) and the ``losses`` that they had.
        why: what was not finite, in words.
        details: plain values that the loss needs beside the columns.
        left_out: micro-batches that found no room in the file.
        weights: whether the trained roles of that update lie beside it.
    """

    kind: str
    step: int
    parts: list[Part]
    places: list[tuple[int, int]]
    losses: list[float]
    why: str
    details: Mapping[str, Any] = field(default_factory=dict)
    left_out: int = 0
    weights: bool = False

    def within(self, most: int) -> KeptBatch:
        """As many micro-batches as ``most`` bytes hold: first those whose loss is not finite, in their order."""
        sizes = [sum(column.nbytes for column in part.values()) for part in self.parts]
        order = sorted(range(len(sizes)), key=lambda i: math.isfinite(self.losses[i]))
        chosen, total = list[int](), 0
        for i in order:
            if total + sizes[i] <= most:
                chosen.append(i)
                total += sizes[i]
        return replace(
            self,
            parts=[self.parts[i] for i in chosen],
            places=[self.places[i] for i in chosen],
            losses=[self.losses[i] for i in chosen],
            left_out=self.left_out + len(sizes) - len(chosen),
        )

    def write(self, run_folder: Path, save_weights: Callable[[Path], None] | None) -> Path | None:
        """Write the batch, and by ``save_weights`` the trained roles, to a folder of its own; None where the run has
        kept its ``MOST_KEPT``. The folder is whole or not there. Raises OSError or SafetensorError."""
        place = run_folder / FOLDER / f"step-{self.step}"
        others = [path for path in place.parent.glob("step-*") if path != place]
        if len(others) >= MOST_KEPT:
            return None
        unfinished = place.with_name(f".{place.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        batch = replace(self.within(MOST_BYTES), weights=save_weights is not None)
        tensors = {f"{i}.{name}": column for i, part in enumerate(batch.parts) for name, column in part.items()}
        save_file(
            {name: column.detach().cpu().contiguous().clone() for name, column in tensors.items()}, unfinished / TENSORS
        )
        record = {
            "format": FORMAT,
            "kind": batch.kind,
            "step": batch.step,
            "why": batch.why,
            "places": batch.places,
            "losses": [str(loss) for loss in batch.losses],  # JSON has no NaN
            "left_out": batch.left_out,
            "weights": batch.weights,
            "details": dict(batch.details),
        }
        write_text(unfinished / RECORD, json.dumps(record, indent=2) + "\n")
        if save_weights is not None:
            save_weights(unfinished)
        if place.exists():  # this update was reached once before, and the run resumed from before it
            shutil.rmtree(place)
        os.replace(unfinished, place)
        return place


def read_kept_batch(path: Path) -> KeptBatch:
    """The batch in the folder ``path``, or in the folder of the file ``path``. Raises DataError for what no run has
    written."""
    folder = kept_folder(path)
    record = _read_record(folder / RECORD)
    try:
        if (folder / TENSORS).stat().st_size > MOST_BYTES + MOST_BYTES_OF_RECORD:
            raise OSError("it is larger than any that a run writes")
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / TENSORS} cannot be read ({described(error)}); it is cut or was changed") from error
    parts: list[Part] = [{} for _ in record["places"]]
    for name, column in tensors.items():
        number, _, column_name = name.partition(".")
        if not number.isdecimal() or len(number) > 9 or int(number) >= len(parts):
            raise DataError(f"{folder / TENSORS} holds {shortened(name)}, which {RECORD} does not know; it was changed")
        parts[int(number)][column_name] = column
    return KeptBatch(
        record["kind"],
        record["step"],
        parts,
        [(rank, number) for rank, number in record["places"]],
        [float(loss) for loss in record["losses"]],
        record["why"],
        record["details"],
        record["left_out"],
        record["weights"],
    )


def kept_folder(path: Path) -> Path:
    """The folder of a kept batch, which ``path`` or a file in it names. Raises DataError where there is none."""
    folder = path if path.is_dir() else path.parent
    if not (folder / RECORD).is_file():
        raise DataError(f"{path} is no kept batch: {folder} has no {RECORD}; name a folder such as RUN/{FOLDER}/step-7")
    return folder


SHAPE: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: isinstance(value, str) and value in ("ppo", "sft", "reward_model", "dpo"),
    "step": lambda value: type(value) is int and value > 0,
    "why": lambda value: isinstance(value, str),
    "places": lambda value: (
        isinstance(value, list)
        and all(isinstance(place, list) and len(place) == 2 for place in value)
        and all(type(number) is int and number >= 0 for place in value for number in place)
    ),
    "losses": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "left_out": lambda value: type(value) is int and value >= 0,
    "weights": lambda value: isinstance(value, bool),
    "details": lambda value: isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values()),
}
"""What each value of ``batch.json`` must be."""


def _read_record(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES_OF_RECORD:
            raise ValueError(f"it is larger than {MOST_BYTES_OF_RECORD} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({described(error)}); it is cut or was changed") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = shortened(record.get("format") if isinstance(record, dict) else record)
        raise DataError(f"{path} has the format {found}, this version reads {FORMAT}; use the version that wrote it")
    for name, holds in SHAPE.items():
        if not holds(record.get(name)):
            raise DataError(f"{path} has {name}={shortened(record.get(name))}, which no run writes; it was changed")
    if len(record["places"]) != len(record["losses"]):
        raise DataError(f"{path} has {len(record['places'])} places but {len(record['losses'])} losses; it was changed")
    return record


def _is_number(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > 50:
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
