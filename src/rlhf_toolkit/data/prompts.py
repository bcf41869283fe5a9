"""Prompts: read rows, tokenise them once, and say which of them each rollout and each rank gets.

Which prompts rollout k uses is a function of (seed, k), never a position that somebody carries: a resumed run asks for
its next rollout and gets what it would have got.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import (
    Message,
    is_message_list,
    messages_of,
    plain_ids,
    prompt_text,
    rendered_ids,
    user_message,
    with_system,
)
from rlhf_toolkit.data.csv_types import csv_features
from rlhf_toolkit.data.json_files import is_blank, json_fault
from rlhf_toolkit.data.streams import Rows, StreamedRows, first_row
from rlhf_toolkit.data.tables import check_values, csv_fault, folder_fault, parquet_fault, stored
from rlhf_toolkit.data.template_values import Unread
from rlhf_toolkit.data.template_values import template_values as values_of
from rlhf_toolkit.data.templates import NOTHING
from rlhf_toolkit.errors import DataError, described, shortened
from rlhf_toolkit.given import ROWS, given_object, refuse_foreign
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import Prompt

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or it tells a server of every file that is read, local ones too
NO_ROWS = "holds no rows; give it at least one prompt, or name another split"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
OTHER_KINDS = ("text", "imagefolder", "audiofolder", "videofolder", "pdffolder", "niftifolder", "meshfolder")
"""What else ``datasets`` may take a folder for: lines of text, and files that stay closed, with a table beside them."""
LIKELY_PROMPTS = ("prompt", "question", "problem", "instruction", "query", "messages", "conversations", "input", "text")
"""What prompts are called where they are not called as the settings say, the likeliest first."""
RESERVED_COLUMNS = ("prompts", "responses")
"""The arguments that a reward gets beside a dataset's columns."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts that fit, in the dataset's order. ``total`` counts all rows, ``dropped_too_long`` those left out;
    ``unread`` says what their chat template does not read."""

    prompts: tuple[Prompt, ...]
    dropped_too_long: int
    total: int
    unread: str = ""

    @property
    def prefilled(self) -> list[Prompt]:
        """Those that end with an assistant's message, which the response continues."""
        return [prompt for prompt in self.prompts if prompt.messages and prompt.messages[-1]["role"] == "assistant"]

    @classmethod
    def fitting(cls, prompts: Sequence[Prompt], max_prompt_tokens: int) -> PromptSet:
        """Those of ``prompts`` that have at most ``max_prompt_tokens``. DataError where there is none."""
        if not prompts:
            raise DataError(f"the dataset {NO_ROWS}")
        kept = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens)
        if not kept:
            shortest = min(len(prompt.token_ids) for prompt in prompts)
            raise DataError(
                f"all {len(prompts)} prompts are longer than data.max_prompt_tokens={max_prompt_tokens}; "
                f"the shortest has {shortest} tokens, so set it to {shortest} or more"
            )
        return cls(prompts=kept, dropped_too_long=len(prompts) - len(kept), total=len(prompts))

    def summary(self) -> str:
        """One line for a log."""
        lengths, prefilled = [len(prompt.token_ids) for prompt in self.prompts], self.prefilled
        told = (
            f"{len(self.prompts)} of {self.total} prompts, {min(lengths)} to {max(lengths)} tokens; "
            f"{self.dropped_too_long} dropped as too long"
        )
        if prefilled:
            told += (
                f"; {len(prefilled)} end with a message of the assistant, which the response continues: prompt "
                f"{prefilled[0].index} ends in {shortened(prefilled[0].text[-80:])}"
            )
        return told + self.unread


@dataclass(frozen=True)
class PromptSchedule:
    """Which prompts each rollout uses: one endless stream, cut into blocks of ``per_rollout``.

    The stream is one permutation of ``size`` prompts after another, each derived from ``(seed, epoch)``: every epoch
    has each prompt once, whatever ``per_rollout`` is. A block may span two epochs and then hold a prompt twice;
    ``rollout.dealing.rollout_rows`` tells their samples apart. DataError where an epoch is shorter than a rollout.
    """

    size: int
    per_rollout: int
    seed: int

    def __post_init__(self) -> None:
        if self.per_rollout > self.size:
            raise DataError(
                f"rollout.prompts_per_rollout={self.per_rollout} is more than the {self.size} prompts there are, "
                f"so that every rollout would repeat some; set it to {self.size} or less, or add prompts"
            )

    def indices(self, rollout: int) -> list[int]:
        """The positions in ``PromptSet.prompts`` that rollout number ``rollout``, from 0, uses, in order."""
        first = rollout * self.per_rollout
        epochs = range(first // self.size, (first + self.per_rollout - 1) // self.size + 1)
        generators = (derived_generator(self.seed, "prompts", epoch) for epoch in epochs)
        stream = [index for each in generators for index in torch.randperm(self.size, generator=each).tolist()]
        offset = first % self.size
        return stream[offset : offset + self.per_rollout]

    def others(self, rollout: int, number: int, *, count: int, without: set[int]) -> list[int]:
        """Up to ``count`` further positions for rollout number ``rollout``, none of them in ``without``: draw number
        ``number`` from a stream of its own."""
        generator = derived_generator(self.seed, "other prompts", rollout, number)
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return [position for position in order if position not in without][:count]


# ---- reading rows ----------------------------------------------------------------------------------------------------


def load_rows(source: str, split: str, *, streaming: bool = False, max_rows: int | None = None) -> Rows:
    """The rows of a local json, jsonl, csv or parquet file, or of a hub dataset ``name`` or ``name:configuration``;
    with ``max_rows`` only the first so many.

    A file is read anew each time, so that an edit always counts; all of it is ``split``, whose slices, such as
    ``train[:100]``, work as on the hub. Values are as ``datasets`` reads them: a column of ISO dates holds datetimes.
    With ``streaming`` rows are read while they are iterated over and never stored as a whole; there are no slices.
    DataError where there is no such file or dataset, it cannot be read, or it is empty. JSON is looked through first, a
    line at a time; of a stream, what is broken further on and does no harm is found when it is read.
    """
    rows = given_object(ROWS, source)
    if rows is not None:
        return rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
    refuse_foreign(source, "the data", "name a file or a dataset of the hub", DataError)
    path = Path(source)
    is_file = path.suffix.lower() in FORMATS
    if not is_file and path.is_file():
        raise DataError(
            f"cannot read {source}: its suffix {path.suffix!r} is not one of {', '.join(FORMATS)}; convert or rename it"
        )
    if is_file and not path.is_file():
        raise DataError(f"there is no file {path} (looked in {Path.cwd()}); check data.train or data.evaluation")
    place = _File(path, split, FORMATS[path.suffix.lower()]) if is_file else _HubDataset(source, split)
    if streaming:
        if set(split) & set("[+"):
            raise DataError(
                f"the split {split!r} cannot be streamed; name one split without a slice, with data.max_rows for its "
                "beginning, or set data.streaming to false"
            )
        place.check(max_rows, streaming=True)
        rows = StreamedRows(source, partial(place.load, streaming=True), place.fault, max_rows)
    else:
        place.check()
        rows = place.load_whole()
        rows = rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
    if first_row(rows) is None:
        raise DataError(f"{source} (split {split}) {NO_ROWS}")
    return rows


@dataclass(frozen=True)
class _File:
    """A local file of a ``kind``, one of the values of ``FORMATS``, all of which is ``split``."""

    path: Path
    split: str
    kind: str

    def check(self, max_rows: int | None = None, *, streaming: bool = False) -> None:
        """Raise DataError where the file is text and no UTF-8, or JSON and empty or not sound. Of a stream, what the
        reader survives is left to be found when it is reached."""
        if self.kind == "json":
            blank = is_blank(self.path)
            what = f"it {NO_ROWS}" if blank else json_fault(self.path, max_rows=max_rows, fatal_only=streaming)
            if what is not None:
                way_out = "; repair that line" if what.startswith("line") else ""
                raise DataError(f"cannot read {self.path} (split {self.split}): {what}{way_out}")
            return
        try:
            what = csv_fault(self.path) if self.kind == "csv" else parquet_fault(self.path)
        except Exception as error:  # whatever pyarrow raises
            raise self.fault(error) from error
        if what is not None:
            raise DataError(f"cannot read {self.path} (split {self.split}): {what}; repair the file or name another")
        if self.kind == "csv" and not streaming:
            _check_utf8(self.path)

    def load(self, **options: Any) -> Any:
        """What ``datasets.load_dataset`` makes of the file."""
        files = {self.split.partition("[")[0]: glob.escape(str(self.path))}
        if self.kind == "csv":
            options |= {"features": csv_features(self.path), "keep_default_na": False, "na_values": [""]}
        return stored(datasets.load_dataset(self.kind, data_files=files, split=self.split, **options))

    def load_whole(self) -> datasets.Dataset:
        """Rows in memory, through a cache that is thrown away.

        The cache of ``datasets`` is shared by all ranks, and knows a file by its time of change, not by its content.
        """
        with tempfile.TemporaryDirectory() as cache:
            try:
                rows: datasets.Dataset = self.load(cache_dir=cache, keep_in_memory=True)
                check_values(rows)
            except Exception as error:  # whatever datasets, pyarrow or pandas raise
                raise self.fault(error) from error
        return rows

    def fault(self, error: Exception, count: int = 0) -> DataError:
        """What is wrong with the file, by line where that can be found out, and the way out."""
        if isinstance(error, UnicodeDecodeError):
            _check_utf8(self.path)
        if self.path.stat().st_size == 0 or "corresponds to no data" in str(error):
            what = f"it {NO_ROWS}"
        elif line := json_fault(self.path) if self.kind == "json" else None:
            what = f"{line}; repair that line" if line.startswith("line") else line
        else:
            what = f"{described(error.__cause__ or error)}; repair the file or name another split"
        return DataError(f"cannot read {self.path} (split {self.split}){_after(count)}: {what}")


@dataclass(frozen=True)
class _HubDataset:
    """A dataset of the hub, ``name`` or ``name:configuration``, or a local folder that stands for one."""

    source: str
    split: str

    def check(self, max_rows: int | None = None, *, streaming: bool = False) -> None:
        """Raise DataError where a local folder leads out of itself, or a file in it is empty or not sound."""
        folder = Path(self.source.partition(":")[0])
        if not folder.is_dir():
            return
        what = folder_fault(folder)
        if what is not None:
            raise DataError(f"cannot load dataset {shortened(self.source)}: {what}")
        name, _, configuration = self.source.partition(":")
        try:
            builder = datasets.load_dataset_builder(name, configuration or None)
        except Exception as error:  # whatever datasets raises about a card and the files that it names
            raise self.fault(error) from error
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in (*FORMATS.values(), *OTHER_KINDS):
            raise DataError(
                f"cannot load dataset {shortened(self.source)}: datasets reads its files as {kind}, which cannot be "
                f"looked at before; convert them to one of {', '.join(FORMATS)}"
            )
        for path in sorted(Path(file) for files in (builder.config.data_files or {}).values() for file in files):
            found = kind if kind in FORMATS.values() else FORMATS.get(path.suffix.lower())
            if found is not None:
                _File(path, self.split, found).check(max_rows, streaming=streaming)

    def load(self, **options: Any) -> Any:
        """What ``datasets.load_dataset`` makes of the name."""
        name, _, configuration = self.source.partition(":")
        return stored(datasets.load_dataset(name, configuration or None, split=self.split, **options))

    def load_whole(self) -> datasets.Dataset:
        """Rows from the cache of ``datasets``."""
        try:
            rows: datasets.Dataset = self.load()
            check_values(rows)
        except Exception as error:  # network, hub, cache and dataset fail in many ways
            raise self.fault(error) from error
        return rows

    def fault(self, error: Exception, count: int = 0) -> DataError:
        """Why the dataset cannot be loaded, and the way out."""
        name, _, configuration = self.source.partition(":")
        return DataError(
            f"cannot load dataset {name!r} (configuration {configuration or 'default'}, split {self.split!r})"
            f"{_after(count)}: {described(error)}; check these names and the network, or use a local file "
            f"({', '.join(FORMATS)})"
        )


def _after(count: int) -> str:
    return f" after {count} rows" if count else ""


def _check_utf8(path: Path) -> None:
    """Raise DataError at the first line in another encoding: ``datasets`` lets it through to whoever reads the row."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"cannot read {path}: line {number} is not UTF-8; save the file as UTF-8") from error


# ---- tokenising ------------------------------------------------------------------------------------------------------


def tokenise_prompts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str,
    chat_template: bool,
    system_prompt: str | None,
    max_prompt_tokens: int,
    template_values: Mapping[str, Any] = NOTHING,
) -> PromptSet:
    """Render and tokenise ``column`` of every row; prompts longer than ``max_prompt_tokens`` are dropped and counted.

    With ``chat_template`` a string becomes one user message; without, it is tokenised as it stands, with the
    tokenizer's bos and without an eos. A list of messages always goes through the chat template; where it ends with the
    assistant's, the response continues that one. ``system_prompt`` stands before messages that bring no system message.
    ``template_values`` and the row's own (``template_values.template_values``) go to the template; what it does not
    read is counted. All other columns stay with their prompt for the reward. DataError where a column, a row or the
    chat template cannot be used, or where no prompt fits.
    """
    columns = rows.column_names
    if column not in columns:
        likely = next((name for name in LIKELY_PROMPTS if name in columns), None)
        hint = "" if likely is None else f"; set data.prompt_column: {likely}"
        raise DataError(
            f"no column {column!r} for data.prompt_column; the columns are {', '.join(columns) or 'none'}{hint}"
        )
    for name in RESERVED_COLUMNS:
        if name in columns and name != column:
            raise DataError(
                f"column {name!r} collides with the argument {name} of the reward; rename or remove that column"
            )
    prompts, unread = [], Unread(tokenizer, template_values)
    for index, row in enumerate(rows):
        value = row[column]
        if isinstance(value, str) and not chat_template:
            messages, text = None, value
        else:
            messages = _messages(value, index, system_prompt)
            values = values_of(row, template_values, index=index)
            unread.look(messages, values)
            text = prompt_text(messages, tokenizer, values, index=index)
        token_ids = plain_ids(text, tokenizer) if messages is None else rendered_ids(text, tokenizer)
        if not token_ids:
            raise DataError(f"row {index}: the prompt {shortened(text)} tokenises to nothing; fill or remove that row")
        others = {name: value for name, value in row.items() if name != column}
        prompts.append(Prompt(index, text, token_ids, others, None if messages is None else tuple(messages)))
    return replace(PromptSet.fitting(prompts, max_prompt_tokens), unread=unread.text())


def _messages(value: Any, index: int, system_prompt: str | None) -> list[Message]:
    """``value`` as chat messages."""
    if isinstance(value, str):
        return user_message(value, system_prompt)
    if is_message_list(value):
        return with_system(messages_of(value, index=index, column="the prompt"), system_prompt)
    raise DataError(
        f"row {index}: the prompt {shortened(value)} is neither a string nor a list of messages with role and content "
        "as strings; repair that row or name another data.prompt_column"
    )
