"""Rows that are read while they are used: the same as those read at once, bounded, and with faults by line or row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_toolkit.data.instructions import tokenise_examples
from rlhf_toolkit.data.preferences import tokenise_pairs
from rlhf_toolkit.data.prompts import load_rows, tokenise_prompts
from rlhf_toolkit.data.streams import StreamedRows
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.runs.fine_tuning import load_items
from rlhf_toolkit.runs.task import load_prompts
from rlhf_toolkit.settings.configs import DataConfig
from rlhf_toolkit.settings.experiment import DPOExperiment, FineTuning, SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.chat_tokenizers import ask, said, word_tokenizer
from tests.support.offenders import for_each

ROWS: list[dict[str, Any]] = [
    {"prompt": f"a {'b ' * number}", "completion": "c", "chosen": "hello", "rejected": "world", "margin": number}
    for number in range(7)
]


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    match path.suffix:
        case ".csv":
            datasets.Dataset.from_list(rows).to_csv(path)
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(source: str, split: str = "train", **options: Any) -> str:
    """The text of the DataError with which a stream is opened or read, which has to be one line."""
    with pytest.raises(DataError) as caught:
        list(load_rows(source, split, **{"streaming": True, **options}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` parses json a few rows at a time, as it does a large file."""
    from datasets.packaged_modules.json.json import JsonConfig

    init = JsonConfig.__init__
    monkeypatch.setattr(JsonConfig, "__init__", lambda self, *a, **k: init(self, *a, **{**k, "chunksize": 50}))


# ---- what is read ----------------------------------------------------------------------------------------------------


@for_each("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "od[d] *.jsonl"])
@for_each("max_rows", [None, 1, 3, 7, 100])
def test_the_same_rows_as_at_once(tmp_path: Path, name: str, max_rows: int | None) -> None:
    source = write_rows(tmp_path / name)
    for streaming in (False, True):
        rows = load_rows(source, "train", streaming=streaming, max_rows=max_rows)
        assert isinstance(rows, StreamedRows) == streaming
        assert list(rows) == list(rows) == ROWS[:max_rows]
        assert rows.column_names == list(ROWS[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_prompts_examples_and_pairs(tmp_path: Path, streaming: bool) -> None:
    rows = load_rows(write_rows(tmp_path / "x.jsonl"), "train", streaming=streaming, max_rows=5)
    some, tokenizer = datasets.Dataset.from_list(ROWS[:5]), word_tokenizer()
    assert tokenise_examples(rows, tokenizer, max_tokens=7) == tokenise_examples(some, tokenizer, max_tokens=7)
    assert tokenise_examples(rows, tokenizer, max_tokens=7).dropped == {"too long": 2}
    assert tokenise_pairs(rows, tokenizer, max_tokens=7) == tokenise_pairs(some, tokenizer, max_tokens=7)
    assert tokenise_pairs(rows, tokenizer, max_tokens=7).total == 5
    options: dict[str, Any] = {"column": "prompt", "chat_template": True, "system_prompt": None, "max_prompt_tokens": 6}
    assert tokenise_prompts(rows, tokenizer, **options) == tokenise_prompts(some, tokenizer, **options)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for name in ("x.jsonl", "x.csv", "x.parquet"):
        assert list(load_rows(write_rows(tmp_path / name), "train", streaming=True)) == ROWS
    left = [path for path in (*scratch.rglob("*"), *home.rglob("*")) if path.is_file()]
    assert all(path.suffix == ".lock" and path.stat().st_size == 0 for path in left)


def test_no_more_rows_are_read_than_asked_for() -> None:
    read = []

    def endless() -> Iterator[dict[str, Any]]:
        for number in range(10**9):
            read.append(number)
            yield {"text": "a b"}

    stream = datasets.IterableDataset.from_generator(endless)
    rows = StreamedRows("endless", lambda: stream, lambda error, count: DataError(f"{error} {count}"), 4)
    assert tokenise_examples(rows, word_tokenizer(), max_tokens=9).total == 4
    assert len(read) == 1 + 4  # the first one to see its columns


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_or_hub_dataset(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of files takes the hub's way."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "test.parquet")
    rows = load_rows(str(tmp_path / "set"), "test", streaming=streaming, max_rows=3)
    assert list(rows) == ROWS[:3]


@pytest.mark.parametrize(
    ("source", "expected"), [("openai/gsm8k:main", ("openai/gsm8k", "main")), ("org/plain", ("org/plain", None))]
)
def test_a_hub_name_is_streamed(source: str, expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def hub(*names: str | None, **options: Any) -> datasets.IterableDataset:
        calls.append((names, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert list(load_rows(source, "test", streaming=True, max_rows=2)) == ROWS[:2]
    assert calls == [(expected, {"split": "test", "streaming": True})]


# ---- faults ----------------------------------------------------------------------------------------------------------


@for_each(
    "text, fault",
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n', "line 3: Expecting ',' delimiter; repair that line"),
        ('{"prompt": "a\u2028b"}\n{"prompt" "b"}\n', "line 2: Expecting ':' delimiter; repair that line"),
        ('{"prompt": "a"}\n"b"\n', 'line 2: \'b\' is not an object such as {"prompt": "..."}; repair that line'),
    ],
)
@for_each("suffix", ["json", "jsonl"])
def test_a_broken_line(tmp_path: Path, text: str, fault: str, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_text(text)
    assert refused(f"{tmp_path}/x.{suffix}") == f"cannot read {tmp_path}/x.{suffix} (split train): {fault}"


@pytest.mark.usefixtures("small_chunks")
def test_a_broken_line_further_on(tmp_path: Path) -> None:
    """Found when it is reached, not at the start; never reached, never found."""
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "a b c"}) for _ in range(30)]
    path.write_text("\n".join([*lines[:20], '{"text" "a"}', *lines[21:]]))
    rows = load_rows(str(path), "train", streaming=True)
    with pytest.raises(DataError) as caught:
        tokenise_examples(rows, word_tokenizer(), max_tokens=9)
    text = str(caught.value)
    assert text.startswith(f"cannot read {path} (split train) after ") and text.endswith(
        " rows: line 21: Expecting ':' delimiter; repair that line"
    )
    assert 0 < int(text.partition(" after ")[2].partition(" rows")[0]) <= 20
    bounded = load_rows(str(path), "train", streaming=True, max_rows=10)
    assert tokenise_examples(bounded, word_tokenizer(), max_tokens=9).total == 10


@pytest.mark.usefixtures("small_chunks")
def test_a_column_that_changes_further_on(tmp_path: Path) -> None:
    """Between chunks, too, where ``datasets`` knows the types of the first one alone."""
    kept: dict[str, Any] = {"prompt": "a", "completion": "b"}
    for changed in ({**kept, "prompt": ask("a")}, {**kept, "prompt": None}, {**kept, "other": "c"}):
        source = write_rows(tmp_path / "x.jsonl", [kept] * 20 + [changed] + [kept] * 20)
        with pytest.raises(DataError) as caught:
            tokenise_examples(load_rows(source, "train", streaming=True), word_tokenizer(), max_tokens=9)
        assert "after 20 rows: " in str(caught.value) or str(caught.value).startswith("row 20: prompt "), caught.value


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_mixed_types(tmp_path: Path, column: str) -> None:
    kept: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
    changed = {**kept, column: [said("user" if column == "prompt" else "assistant", "c")]}
    source = write_rows(tmp_path / "x.jsonl", [kept, changed])
    with pytest.raises(
        DataError, match=rf"^row 1: {column} .* is a list, but in row 0 it is a string; give the column"
    ):
        tokenise_pairs(load_rows(source, "train", streaming=True), word_tokenizer(), max_tokens=9)


@pytest.mark.parametrize("text", ['[{"prompt": "a"}, {"prompt": [1]}]', '[{"prompt": "a"}]'])
def test_json_that_is_one_value(tmp_path: Path, text: str) -> None:
    """``datasets`` would give its strings in quotes where the column has lists, too."""
    (tmp_path / "x.json").write_text(text)
    assert refused(f"{tmp_path}/x.json") == (
        f"{tmp_path}/x.json: json that is not one object on each line cannot be streamed; write it so, or set "
        "data.streaming to false"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_other_encodings_name_the_line(tmp_path: Path, suffix: str) -> None:
    text = {"jsonl": '{"prompt": "a"}\n{"prompt": "é"}', "csv": "prompt\né\n"}[suffix]
    (tmp_path / f"x.{suffix}").write_text(text, encoding="latin-1")
    assert refused(f"{tmp_path}/x.{suffix}") == (
        f"cannot read {tmp_path}/x.{suffix}: line 2 is not UTF-8; save the file as UTF-8"
    )


def test_a_broken_csv_and_a_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,label\na,1\nb,2,3\n")
    assert "Expected 2 fields in line 3, saw 3; repair the file" in refused(f"{tmp_path}/x.csv")
    (tmp_path / "x.parquet").write_text("not parquet")
    assert refused(f"{tmp_path}/x.parquet").startswith(
        f"cannot read {tmp_path}/x.parquet (split train): it does not begin as"
    )


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    line = refused(f"{tmp_path}/x.jsonl")
    assert f"{tmp_path}/x.jsonl" in line and line.endswith(
        "holds no rows; give it at least one prompt, or name another split"
    )


def test_no_such_file_and_unknown_suffix(tmp_path: Path) -> None:
    assert refused("no/such.jsonl").startswith("there is no file no/such.jsonl (looked in ")
    (tmp_path / "x.txt").write_text("hello")
    assert "its suffix '.txt' is not one of" in refused(f"{tmp_path}/x.txt")


@pytest.mark.parametrize("split", ["train[:3]", "train+test"])
def test_a_split_that_is_more_than_a_name(tmp_path: Path, split: str) -> None:
    assert refused(write_rows(tmp_path / "x.jsonl"), split) == (
        f"the split {split!r} cannot be streamed; name one split without a slice, with data.max_rows for its "
        "beginning, or set data.streaming to false"
    )


def test_the_hub_fails_at_once_or_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking() -> Iterator[dict[str, Any]]:
        yield from ROWS[:5]
        raise ConnectionError("gone\naway")

    streams = iter([None, datasets.IterableDataset.from_generator(breaking)])

    def hub(*names: str | None, **options: Any) -> datasets.IterableDataset:
        stream = next(streams)
        if stream is None:
            raise ConnectionError("Couldn't reach")
        return stream

    monkeypatch.setattr(datasets, "load_dataset", hub)
    where = "cannot load dataset 'org/name' (configuration default, split 'train')"
    assert refused("org/name").startswith(
        f"{where}: ConnectionError: Couldn't reach; check these names and the network"
    )
    assert refused("org/name").startswith(f"{where} after 5 rows: ConnectionError: gone away; check these names")


# ---- the settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_the_settings_reach_the_rows(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    stream = StreamedRows.__init__
    monkeypatch.setattr(StreamedRows, "__init__", lambda *a: asked.append(True) or stream(*a))  # type: ignore[func-returns-value]
    source, held_out = write_rows(tmp_path / "x.jsonl"), write_rows(tmp_path / "y.jsonl", ROWS[:2])
    data = DataConfig(train=source, streaming=streaming, max_rows=3)
    assert len(load_prompts(data, word_tokenizer(), source, "train", 1)) == 3
    kinds: list[type[FineTuning]] = [SFTExperiment, DPOExperiment]
    for kind in kinds:
        section = {"train": source, "evaluation": held_out, "streaming": streaming, "max_rows": 3}
        experiment = experiment_from_dict({"model": {"name": "m"}, "data": section}, kind)
        assert [len(items) for items in load_items(experiment, word_tokenizer(), [])[:2]] == [3, 2]
    assert len(asked) == (5 if streaming else 0)
