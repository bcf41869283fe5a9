"""Tables from strangers: what a file's own description may ask ``datasets`` to do, and how large the rows may get.

A file of parquet names the type of each column, and a column of images or sounds is one whose cells ``datasets`` opens
or fetches when a row is read. Here such a cell stays what the file holds, a path and bytes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from rlhf_toolkit.errors import described, shortened
from rlhf_toolkit.files import link_outside

MOST_COLUMNS = 2000
"""Columns, and fields of an object within one; ``datasets`` takes time quadratic in their number."""
EXPANSION, LEAST_LIMIT = 100, 2**30
"""Rows may take so many times the bytes of their file, and this many in any case: text shrinks to a tenth at best."""
PLAIN = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_boolean, pa.types.is_integer),
    *(pa.types.is_floating, pa.types.is_null),
)
"""Types of which every value can be read as an object of Python."""

MAGIC = (
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"Rar!",
    b"7z\xbc\xaf",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)
"""How archives begin, and files that are compressed as a whole."""
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".lz4")
LONGEST_HEADER = 2**18


# ---- columns that fetch ----------------------------------------------------------------------------------------------


def as_stored(feature: Any) -> Any:
    """``feature``, a type of ``datasets``, such that nothing is opened, fetched or decoded when a value is read.

    ``Json`` alone is still decoded: it holds its text itself.
    """
    if isinstance(feature, dict):
        return {name: as_stored(inner) for name, inner in feature.items()}
    if isinstance(feature, (list, tuple)):
        return [as_stored(inner) for inner in feature]
    changed = copy.copy(feature)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        changed.feature = as_stored(feature.feature)
    elif hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
        changed.decode = False
    return changed


def stored(rows: Any, **options: Any) -> Any:
    """``rows``, a dataset in memory or a stream, whose values are read as they are stored. ``options`` are those of a
    dataset's ``cast``."""
    if rows.features is None:
        return rows
    wanted = datasets.Features(as_stored(dict(rows.features)))
    return rows if wanted == rows.features else rows.cast(wanted, **options)


def check_values(rows: datasets.Dataset) -> None:
    """Raise what Arrow or Python raise where a value cannot be read: text that is no UTF-8, a date beyond year 9999."""
    rows.data.validate(full=True)
    odd = [
        field.name for field in rows.data.schema if not all(any(is_(t) for is_ in PLAIN) for t in leaves(field.type))
    ]
    for start in range(0, len(rows) if odd else 0, 1000):
        rows.data.slice(start, 1000).select(odd).to_pylist()


def leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types of single values inside ``kind``."""
    if not kind.num_fields:
        yield kind
    for position in range(kind.num_fields):
        yield from leaves(kind.field(position).type)


# ---- files that grow -------------------------------------------------------------------------------------------------


def parquet_fault(path: Path) -> str | None:
    """Why a parquet file must not be read; None where nothing speaks against it. Raises what Arrow raises.

    It says itself how large its pages get; what a repeated value, written once, grows to is counted.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":  # datasets would unpack an archive
            return "it does not begin as parquet"
    limit = max(LEAST_LIMIT, EXPANSION * path.stat().st_size)
    with pq.ParquetFile(path) as file:
        about = file.metadata
        if about.num_columns > MOST_COLUMNS:
            return f"it has {about.num_columns} columns, more than {MOST_COLUMNS}"
        chunks = [
            about.row_group(group).column(column)
            for group in range(about.num_row_groups)
            for column in range(about.num_columns)
        ]
        if sum(chunk.total_uncompressed_size for chunk in chunks) > limit:
            return f"it grows to more than {limit} bytes"
        if sum(chunk.num_values * chunk.total_uncompressed_size for chunk in chunks) <= limit:
            return None
        names = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
        names += [field.name for field in file.schema_arrow if pa.types.is_binary(field.type)]
    with pq.ParquetFile(path, read_dictionary=names) as file:
        size = 0
        for batch in file.iter_batches(batch_size=4096):
            for column in batch.columns:
                if isinstance(column, pa.DictionaryArray):  # each value is there once, and counts as often as it stands
                    lengths = pc.take(pc.binary_length(column.dictionary), column.indices)
                    size += int(pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0)
                else:
                    size += int(column.nbytes)
            if size > limit:
                return f"its rows take more than {limit} bytes"
    return None


def csv_fault(path: Path) -> str | None:
    """Why a CSV file must not be read; None where nothing speaks against it."""
    with path.open("rb") as file:
        beginning = file.read(2**20)
    if is_archive(beginning):
        return "it is an archive, which has to be unpacked"
    if beginning.partition(b"\n")[0].count(b",") >= MOST_COLUMNS:
        return f"it has more than {MOST_COLUMNS} columns"
    return None


def is_archive(beginning: bytes) -> bool:
    """Whether a file that begins so is one that ``datasets``, which goes by the content, would unpack."""
    return beginning.startswith(MAGIC) or beginning[257:262] == b"ustar"


# ---- folders ---------------------------------------------------------------------------------------------------------

CARDS = ("README.md", ".huggingface.yaml")
CARD_KEYS = {"config_name", "data_files", "data_dir", "default", "description", "version", "features"}
"""What a card may say about a configuration. Other keys go to the reader, such as a regular expression that parts the
columns of a CSV file, which may take for ever."""


def folder_fault(folder: Path) -> str | None:
    """Why a folder of files must not be loaded; None where nothing speaks against it."""
    link = link_outside(folder)
    if link is not None:
        return f"{shortened(link.relative_to(folder).as_posix())} is a link out of the folder; put the file there"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                if path.suffix.lower() in ARCHIVES or is_archive(file.read(512)):
                    return f"{shortened(path.relative_to(folder).as_posix())} is an archive; unpack it"
    for card in CARDS:
        if (folder / card).is_file():
            try:
                what = card_fault((folder / card).read_bytes().decode(), whole=card != CARDS[0])
            except (ValueError, RecursionError, yaml.YAMLError) as error:
                what = f"cannot be read: {described(error)}; repair or remove it"
            if what is not None:
                return f"{card} {what}"
    return None


def card_fault(text: str, *, whole: bool = False) -> str | None:
    """What in a dataset's card would have ``datasets`` leave the folder or run a stranger's settings; None where
    nothing would. The settings are the block that the hub's own pattern finds, or the ``whole`` text.

    Raises ValueError where they are none that a person writes, and what PyYAML raises.
    """
    if not whole:
        block = REGEX_YAML_BLOCK.search(text)
        text = block[2] if block else ""
    if len(text) > LONGEST_HEADER or any(
        isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)
    ):
        raise ValueError(f"settings of more than {LONGEST_HEADER} characters, or with aliases")
    header = yaml.safe_load(text)
    waiting = [header.get("configs") if isinstance(header, dict) else None]
    for configuration in waiting[0] if isinstance(waiting[0], list) else ():
        for key in configuration if isinstance(configuration, dict) else ():
            is_letter = key in ("sep", "delimiter") and len(str(configuration[key])) == 1
            if key not in CARD_KEYS and not is_letter:
                return f"sets {shortened(key)} for the reader of its files; remove that setting"
    while waiting:  # all texts below configs, the data files' patterns among them
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += [*value.values(), *value] if isinstance(value, dict) else value
        elif isinstance(value, str) and (
            "://" in value or "::" in value or value.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", value)
        ):
            return f"names {shortened(value)} among its data files; name files of the folder"
    return None
