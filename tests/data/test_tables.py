"""Folders of data: which of their files ``datasets`` would read, and what their cards may have it do."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from rlhf_toolkit.data.prompts import load_rows
from rlhf_toolkit.errors import DataError
from tests.support.offenders import for_each

ROW = '{"prompt": "a"}\n'
OUTSIDE = "configs:\n- config_name: default\n  data_files: ../secret.jsonl\n"
BOMB = 'configs: {"a":&a0 {"1":"z","2":"z"}'
BOMB += "".join(f',"b{i}":&a{i + 1} {{"1":*a{i} ,"2":*a{i} }}' for i in range(40)) + "}\n"
SEPARATOR = "configs:\n- config_name: default\n  data_files: t.csv\n  engine: python\n  sep: "
CARDS = {
    "a plain card": f"---\n{OUTSIDE}---\n",
    "three dashes that begin a key": f"---\na: 1\n---x: 1\n{OUTSIDE}---\n",
    "blank lines before, blanks behind": f"\n \n---\n{OUTSIDE}--- \n",
    "carriage returns": f"---\n{OUTSIDE}---".replace("\n", "\r") + "\n",
    "aliases in aliases": f"---\n{BOMB}---\n",
    "a pattern that parts the columns": f'---\n{SEPARATOR}"((a+)+)+X"\n---\n',
}
FILES: dict[str, tuple[str, bytes, str]] = {
    "null under another suffix of JSON": ("t.ndjson", b"null\n", "line 1: None is not an object"),
    "null with a suffix behind": ("t.jsonl.dat", b"null\n", "line 1: None is not an object"),
    "null beside pictures": ("metadata.jsonl", b"null\n", "line 1: None is not an object"),
    "a text that is compressed": ("t.txt", gzip.compress(b"a" * 1000), "is an archive"),
    "a table that links to others": ("t.h5", b"x", "reads its files as hdf5"),
    "a table of Arrow": ("t.arrow", b"x", "reads its files as arrow"),
}


def folder_with(folder: Path, name: str, content: bytes) -> str:
    (folder / "d").mkdir()
    (folder / "secret.jsonl").write_text('{"prompt": "secret"}\n')
    (folder / "d" / name).write_bytes(content)
    return str(folder / "d")


@for_each("name", CARDS)
def test_a_card_leads_nowhere(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, "README.md", CARDS[name].encode())
    (Path(folder) / "t.csv").write_text("prompt,b\n" + "a" * 40 + "!,x\n")
    with pytest.raises(DataError, match=r"README\.md"):
        load_rows(folder, "train")


@for_each("name", FILES)
def test_what_datasets_would_read_is_looked_at_first(tmp_path: Path, name: str) -> None:
    """Under the name that it goes by: the reader in C++ ends the process on null."""
    file, content, words = FILES[name]
    folder = folder_with(tmp_path, file, content)
    if file == "metadata.jsonl":
        (Path(folder) / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=words):
        load_rows(folder, "train")


def test_a_sound_card_and_a_sound_table(tmp_path: Path) -> None:
    card = '---\nlicense: mit\nconfigs:\n- config_name: a\n  data_files: t.tsv\n  sep: "\\t"\n---\n# Rows\n'
    folder = folder_with(tmp_path, "README.md", card.encode())
    (Path(folder) / "t.tsv").write_text("prompt\tb\nx\ty\n")
    for source in (folder, f"{folder}:a"):
        assert list(load_rows(source, "train")) == [{"prompt": "x", "b": "y"}]
