"""JSON that would end the process in the reader of ``datasets``, or says something that no row can."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from rlhf_toolkit.data import json_files
from rlhf_toolkit.data.json_files import DEEPEST, json_fault
from rlhf_toolkit.data.prompts import load_rows
from rlhf_toolkit.errors import DataError
from tests.support.offenders import for_each

GOOD, DEEP = b'{"prompt": "a"}\n', 100_000
NESTED = {
    "lists": b"[" * DEEP + b"]" * DEEP,
    "objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "both": b'[{"a":' * DEEP + b"1" + b"}]" * DEEP,
    "open": b"[" * DEEP,
    "some": b"[" * 300 + b"]" * 300,
}
LINES = [
    *(b"null", b"1", b'"x"', b"[]", b"true", b"-0.5", b"[null]", b'[{"prompt": "a"}]', b"NaN", b"Infinity"),
    *(b'{"prompt": "a"} null', b'{"prompt": "a"} {"prompt": "b"}', b"null null", b"nul", b"{", b'{"prompt": "a"'),
    *(b'{"prompt": "\\ud800"}', b'{"prompt": "\\uDC00x"}', b'{"\\ud800": "a"}', b'{"prompt": ["\\uD83D"]}'),
    *(b'{"prompt": "a\x00b"}', b"\x00", b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}"),
    *(b'{"n": ' + b"9" * 5000 + b"}", b'{"n": -' + b"1" * 100_000 + b"}"),
    *(b'{"prompt": "a", "x": ' + nested + b"}" for nested in NESTED.values()),
    *NESTED.values(),
]


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    """In each of three places, as a whole and as a stream; where the reader got it, some would kill this process."""
    accepted = []
    for number, line in enumerate(LINES):
        path = tmp_path / f"{number}.jsonl"
        for before in (0, 1, 3):
            if line.startswith(b"\xef\xbb\xbf") and not before:
                continue  # at the beginning of a file a mark is none of its text
            path.write_bytes(GOOD * before + line + b"\n" + GOOD)
            for streaming in (False, True):
                try:
                    accepted.append((line[:40], before, load_rows(str(path), "train", streaming=streaming)))
                except DataError as error:
                    named = f"{path}" in str(error) and f"line {before + 1}" in str(error) and "\n" not in str(error)
                    accepted += [] if named else [(line[:40], before, error)]
    assert not accepted


def test_a_list_of_something_else_is_refused(tmp_path: Path) -> None:
    accepted, path = [], tmp_path / "x.json"
    values = [b"null", b"1", b'"x"', b"true", b"[null]", b'[{"prompt": "a"}, null]', b'["a", {}]', b"[[]]", b"[1, 2]"]
    values += [b'[{"prompt": "\\ud800"}]', b'[{"n": ' + b"9" * 5000 + b"}]", b'[{"prompt": "\xff"}]', b"[1", b"[{}] []"]
    values += [*NESTED.values(), *(b'[{"x": ' + nested + b"}]" for nested in NESTED.values())]
    for value in values:
        for written in (value, b"\n " + value + b"\n", b"\xef\xbb\xbf" + value):
            path.write_bytes(written)
            for streaming in (False, True):
                try:
                    accepted.append((written[:40], load_rows(str(path), "train", streaming=streaming)))
                except DataError as error:
                    accepted += [] if f"{path}" in str(error) and "line" in str(error) else [(written[:40], error)]
    assert not accepted


@for_each("indent", [None, 1])
def test_rows_inside_an_object_are_pointed_at(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": "1", "data": [{"prompt": "a"}, {"prompt": "b"}]}, indent=indent))
    with pytest.raises(DataError, match=r"x\.json \(split train\): it is one object, whose 'data' has 2 objects: save"):
        load_rows(str(path), "train")
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}, indent=indent))
    assert len(list(load_rows(str(path), "train"))) == 1


def test_files_with_nothing_in_them(tmp_path: Path) -> None:
    for name in ("x.json", "x.jsonl"):
        for content in (b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
            (tmp_path / name).write_bytes(content)
            for streaming in (False, True):
                with pytest.raises(DataError, match="holds no rows"):
                    load_rows(str(tmp_path / name), "train", streaming=streaming)


def test_what_is_sound_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028\x00\U0001f600"}, {"prompt": "[" * 500}]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows for ascii_only in (True, False)]
    for content in ("\n".join(lines), "\r\n".join(lines) + "\r\n\r\n", "\ufeff" + "\n \n".join(lines)):
        (tmp_path / "x.jsonl").write_bytes(content.encode())
        assert list(load_rows(str(tmp_path / "x.jsonl"), "train")) == [row for row in rows for _ in range(2)]
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert list(load_rows(str(tmp_path / "x.json"), "train")) == rows
    (tmp_path / "x.json").write_text('{\n "prompt": "a"\n}\n')
    assert list(load_rows(str(tmp_path / "x.json"), "train")) == [{"prompt": "a"}]


def test_the_depth_is_counted_exactly(tmp_path: Path) -> None:
    for name, frame in (("x.jsonl", "{}"), ("x.json", "[{}]")):
        for beyond in (0, 1):
            depth = DEEPEST - len(frame) // 2 + beyond
            text = frame.replace("{}", '{"a": ' + "[" * depth + "]" * depth + "}")
            (tmp_path / name).write_text(text)
            assert (json_fault(tmp_path / name) is not None) == bool(beyond), (name, beyond)


def test_a_folder_of_files_is_looked_through(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(GOOD + b"null\n")
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"train\.jsonl .*line 2: None is not an object"):
            load_rows(str(tmp_path), "train", streaming=streaming)


def test_one_line_is_in_memory_at_a_time_and_no_more_is_read_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes((json.dumps({"prompt": "a" * 1000}).encode() + b"\n") * 10_000 + b"null\n")
    tracemalloc.start()
    assert json_fault(path) == f"line 10001: None is not {json_files.OBJECT}"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    monkeypatch.setattr(json_files, "AHEAD", 100_000)
    assert json_fault(path, max_rows=10) is None and json_fault(path, max_rows=9_990) is not None
    monkeypatch.setattr(json_files, "LONGEST_LINE", 500)
    with pytest.raises(DataError, match="line 1 is longer than 500 bytes"):
        json_fault(path)
