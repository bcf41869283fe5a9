"""What an offline run of W&B holds: its file, read by W&B's own messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER, BLOCK, OF_A_RECORD = 7, 32 * 1024, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Recorded:
    """Rows of the history, and what else the run was told."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)
    commit: str = ""


def records(path: Path) -> Iterator[Any]:
    """Messages in the order in which they were written. The file is LevelDB's log: blocks of records, each with
    checksum (4 bytes), length (2), and whether it is a whole message or a part."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, at, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at + OF_A_RECORD <= len(data):
        if BLOCK - at % BLOCK < OF_A_RECORD:  # what is left of a block is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts = parts * (kind in (MIDDLE, LAST)) + data[at + OF_A_RECORD : at + OF_A_RECORD + length]
        at += OF_A_RECORD + length
        if kind in (WHOLE, LAST):
            message: Any = getattr(messages, "Record")()  # noqa: B009 - made when it is imported
            message.ParseFromString(parts)
            yield message


def read(folder: Path) -> Recorded:
    """The one offline run in a folder of W&B's."""
    (path,) = folder.glob("offline-run-*/*.wandb")
    found = Recorded()
    for message in records(path):
        kind = message.WhichOneof("record_type")
        if kind == "history":
            found.rows.append({_name(item): json.loads(item.value_json) for item in message.history.item})
        elif kind == "summary":
            found.summary |= {_name(item): json.loads(item.value_json) for item in message.summary.update}
        elif kind in ("run", "config"):
            config = message.run.config if kind == "run" else message.config
            found.config |= {_name(item): json.loads(item.value_json) for item in config.update}
            found.commit = message.run.git.commit or found.commit if kind == "run" else found.commit
        elif kind == "metric":
            found.metrics[message.metric.name or message.metric.glob_name] = message.metric.step_metric
        elif kind == "artifact":
            found.artifacts[message.artifact.name] = [each.path for each in message.artifact.manifest.contents]
        elif kind == "alert":
            found.alerts.append(message.alert.title)
    return found


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
