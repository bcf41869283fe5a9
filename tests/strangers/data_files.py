"""Files of data: JSON, CSV and parquet whose bytes, shapes, sizes or features are hostile, and folders of them."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_toolkit.data.prompts import load_rows
from tests.strangers import frame, payloads
from tests.strangers.ground import here

COUNT, LIMIT = 400, 20.0
HEAVY = ("rlhf_toolkit.data.prompts", "pandas")
ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(20)]
FETCHING = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure")


@dataclass(frozen=True)
class Case:
    """Files by name, one of which, or the folder, is loaded. ``refuse`` says that it must not be taken."""

    name: str
    files: tuple[tuple[str, bytes | Callable[[], bytes]], ...]
    load: str = ""
    refuse: bool = False
    streaming: bool = False


# ---- JSON and CSV ----------------------------------------------------------------------------------------------------


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = {".jsonl": jsonl(ROWS), ".json": json.dumps(ROWS, indent=1).encode()}
GOOD[".csv"] = b"prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS).encode()
LINES: dict[str, bytes] = {
    "null": b"null\n",
    "nulls": b"null\n" * 100,
    "a number": b"3\n",
    "text": b'"x"\n',
    "true": b"true",
    "a list": b"[1, 2]\n",
    "empty": b"",
    "blank": b" \n\n\t\n",
    "deep lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "deep objects": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "open": b"[" * 100_000,
    "depth 900": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "NUL": b'{"a": "\x00"}\n',
    "escaped NUL": b'{"prompt": "\\u0000", "a\\u0000b": 1}\n',
    "surrogate": b'{"prompt": "\\ud800"}\n',
    "surrogate key": b'{"\\udfff": "x"}\n',
    "not UTF-8": b'{"prompt": "\xff\xfe"}\n',
    "UTF-16": json.dumps(ROWS).encode("utf-16"),
    "UTF-32": json.dumps(ROWS).encode("utf-32"),
    "two BOMs": b"\xef\xbb\xbf\xef\xbb\xbf" + jsonl(ROWS),
    "long number": b'{"prompt": "x", "n": ' + b"9" * 10_000 + b"}\n",
    "1e9999999": b'{"prompt": "x", "n": 1e9999999}\n',
    "NaN": b'{"prompt": "x", "n": NaN, "m": -Infinity}\n',
    "beyond 64 bits": b'{"prompt": "x", "n": 99999999999999999999999}\n',
    "mixed numbers": b'{"prompt": "x", "n": 1}\n{"prompt": "x", "n": 99999999999999999999}\n{"prompt":"x","n":"a"}\n',
    "null then object": b"null\n" + jsonl(ROWS),
    "object then null": jsonl(ROWS) + b"null\n",
    "object then list": jsonl(ROWS) + b"[1]\n",
    "objects on a line": b'{"prompt": "a"}{"prompt": "b"}\n',
    "same key": b'{"prompt": "a", "prompt": 3}\n',
    "empty key": b'{"": "a", "prompt": "x"}\n',
    "many keys": json.dumps({f"k{i}": i for i in range(20_000)}).encode() + b"\n",
    "long key": json.dumps({"k" * 1_000_000: 1}).encode() + b"\n",
    "empty object": b"{}\n",
    "empty objects": b"{}\n" * 1000,
    "types differ": b'{"prompt": "a"}\n{"prompt": ["b"]}\n{"prompt": {"c": 1}}\n{"prompt": null}\n',
    "nested types differ": b'{"prompt": [{"role": "user"}]}\n{"prompt": [{"role": 3}]}\n{"prompt": [["x"]]}\n',
    "columns differ": b'{"prompt": "a"}\n{"other": "b"}\n',
    "struct grows": b'{"prompt": {"a": 1}}\n{"prompt": {"b": {"c": [1]}}}\n',
    "dates": b'{"prompt": "2024-01-01"}\n{"prompt": "9999999-99-99T99:99"}\n',
    "huge date": b'{"prompt": "99999-01-01T00:00:00"}\n',
    "a pickle": b"cos\nsystem\n(S'{COMMAND}'\ntR.",
    "an object of Python": b"{'prompt': __import__('os').system('{COMMAND}')}\n",
    "ESC in a column": b'{"a\\u001b[2J\\u202e": "b"}\n',
    "newline in a column": b'{"a\\nTraceback": "b"}\n',
    "an Image": b'{"prompt": {"path": "{URL}/x.png", "bytes": null}}\n',
    "a path": b'{"prompt": "{URL}/x", "file_name": "{OUTSIDE}/victim", "image": "{OUTSIDE}/victim"}\n',
    "comments": b'{"prompt": "x"} // hm\n',
    "trailing comma": b'{"prompt": "x",}\n',
    "single quotes": b"{'prompt': 'x'}\n",
    "cut": jsonl(ROWS)[:-7],
    "CR only": jsonl(ROWS).replace(b"\n", b"\r"),
    "a long line": json.dumps({"prompt": "x" * 3_000_000}).encode() + b"\n",
    "gzip": gzip.compress(jsonl(ROWS)),
}
TABLES: dict[str, bytes] = {
    "no header": b"\n\n1,2\n",
    "NUL": b"prompt\n\x00\n",
    "open quote": b'prompt,answer\n"abc,def\n' + b"x,y\n" * 100,
    "many columns": (",".join(f"c{i}" for i in range(20_000)) + "\n" + ",".join("1" * 20_000) + "\n").encode(),
    "ragged": b"prompt,answer\n1\n1,2,3,4\n",
    "same column": b"prompt,prompt\na,b\n",
    "empty column": b",prompt\na,b\n",
    "formula": b"prompt\n=cmd|' /C calc'!A0\n@SUM(1)\n",
    "1e9999999": b"prompt,n\nx,1e9999999\n",
    "long number": b"prompt,n\nx," + b"9" * 10_000 + b"\n",
    "a long field": b"prompt\n" + b"x" * 3_000_000 + b"\n",
    "dates": b"prompt\n2024-01-01\n99999-99-99\n",
    "not UTF-8": b"prompt\n\xff\xfe\n",
    "UTF-16": "prompt\nx\n".encode("utf-16"),
    "types differ": b"prompt\n1\nx\n1.5\n\nTrue\n",
    "only a header": b"prompt,answer\n",
    "ESC": b"\x1b[2J\x1b]0;x\x07,prompt\na,b\n",
    "empty": b"",
    "blank": b"\n\n\n",
    "BOM": b"\xef\xbb\xbfprompt\nx\n",
    "CR only": b"prompt\rx\ry\r",
    "quotes": b'"' * 100_001,
    "gzip": gzip.compress(b"prompt\nx\n"),
    "commas": b"," * 1_000_000,
}


def archive(kind: str) -> bytes:
    """An archive that stands where a file of data should, with names that lead outside."""
    out, content = io.BytesIO(), jsonl(ROWS)
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
            for name in ("../../outside/victim", "/tmp/strangers_out.jsonl", "a.jsonl"):
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name in ("../../outside/victim", "a.jsonl"):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return out.getvalue()


# ---- parquet ---------------------------------------------------------------------------------------------------------


def parquet(columns: dict[str, Any], features: dict[str, Any] | None = None, **options: Any) -> bytes:
    """A table with what ``datasets`` keeps in its schema's metadata."""
    table, out = pa.table(columns), io.BytesIO()
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, out, **options)
    return out.getvalue()


def media(places: list[str], kind: str, nested: str) -> Callable[[], bytes]:
    """A column of a feature that reads what its path names."""

    def write() -> bytes:
        item = {"path": here().filled(places[0]), "bytes": None}
        text = {"_type": "Value", "dtype": "string"}
        feature: Any = {"_type": kind}
        if nested == "mode":
            feature = {"_type": kind, "decode": True}
        value: Any = [item] * 2
        if nested == "list":
            feature, value = {"_type": "List", "feature": feature}, [[item]] * 2
        elif nested == "struct":
            feature, value = {"inner": feature}, [{"inner": item}] * 2
        elif nested == "old list":
            feature, value = [feature], [[item]] * 2
        elif nested == "sequence":
            feature, value = {"_type": "Sequence", "feature": feature}, [[item]] * 2
        kind_of = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        if nested in ("list", "old list", "sequence"):
            kind_of = pa.list_(kind_of)
        elif nested == "struct":
            kind_of = pa.struct([("inner", kind_of)])
        return parquet({"prompt": ["a", "b"], "media": pa.array(value, kind_of)}, {"prompt": text, "media": feature})

    return write


@cache
def good_parquet() -> bytes:
    return parquet({"prompt": [row["prompt"] for row in ROWS], "answer": [row["answer"] for row in ROWS]})


def bad_text() -> bytes:
    """A column of text whose bytes are none."""
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeab")]
    )
    return parquet({"prompt": column})


def deep_parquet() -> bytes:
    kind: pa.DataType = pa.string()
    value: Any = "x"
    for _ in range(200):
        kind, value = pa.list_(kind), [value]
    return parquet({"prompt": ["a"], "deep": pa.array([value], kind)})


def repeated(rows: int) -> bytes:
    """Few bytes, many rows of a long text."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 10_000]))
    return parquet({"prompt": text}, compression="zstd")


def bomb() -> bytes:
    """A hundred kilobytes, or so, that grow to more than a gigabyte."""
    out, group = io.BytesIO(), pa.table({"prompt": ["\0" * 2**20] * 64})
    with pq.ParquetWriter(out, group.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(18):
            writer.write_table(group)
    return out.getvalue()


SCHEMAS: dict[str, Any] = {
    "unknown type": {"prompt": {"_type": "Evil"}},
    "no type": {"prompt": {"dtype": "string"}},
    "a type that is a function": {"prompt": {"_type": "load_dataset"}},
    "another dtype": {"prompt": {"_type": "Value", "dtype": "int64"}},
    "evil dtype": {"prompt": {"_type": "Value", "dtype": payloads.CALL}},
    "huge array": {"prompt": {"_type": "Array2D", "shape": [10**9, 10**9], "dtype": "float64"}},
    "evil shape": {"prompt": {"_type": "Array2D", "shape": "x", "dtype": "float64"}},
    "class label": {"prompt": {"_type": "ClassLabel", "names_file": "/etc/passwd"}},
    "class label outside": {"prompt": {"_type": "ClassLabel", "num_classes": 10**9}},
    "no columns": {},
    "other columns": {"other": {"_type": "Value", "dtype": "string"}},
    "a list": [1, 2],
    "null": None,
    "extra arguments": {"prompt": {"_type": "Value", "dtype": "string", "x": 1}},
    "translation": {"prompt": {"_type": "Translation", "languages": ["a"]}},
    "json": {"prompt": {"_type": "Json"}},
    "deep": {"prompt": json.loads('{"a":' * 400 + "1" + "}" * 400)},
}


def parquet_cases() -> Iterator[Case]:
    for kind in FETCHING:
        for nested in ("plain", "mode", "list", "struct", "old list", "sequence"):
            for place in ("{URL}/x", "{OUTSIDE}/victim"):
                for streaming in (False, True):
                    yield Case(
                        f"{kind} {nested} {place}{' streamed' * streaming}",
                        (("a.parquet", media([place], kind, nested)),),
                        streaming=streaming,
                    )
    for name, features in SCHEMAS.items():
        content = parquet({"prompt": ["a", "b"]}, features)
        yield Case(f"schema: {name}", (("a.parquet", content),))
    for name, content in {
        "not UTF-8": bad_text(),
        "empty": b"",
        "magic only": b"PAR1",
        "two magics": b"PAR1PAR1",
        "JSON": jsonl(ROWS),
        "no rows": parquet({"prompt": pa.array([], pa.string())}),
        "no columns": parquet({}),
        "same columns": b"PAR1" + b"\xff" * 100 + b"PAR1",
        "cut": good_parquet()[:-20],
        "without its beginning": good_parquet()[50:],
        "a zip": archive("zip"),
        "a tar": archive("tar"),
        "gzip": gzip.compress(good_parquet()),
    }.items():
        refuse = name not in ("gzip",)
        yield Case(f"parquet: {name}", (("a.parquet", content),), refuse=refuse)
        yield Case(f"parquet: {name}, streamed", (("a.parquet", content),), refuse=refuse, streaming=True)
    yield Case("parquet: deep", (("a.parquet", deep_parquet),))
    yield Case("parquet: many rows of a long text", (("a.parquet", lambda: repeated(2_000_000)),), refuse=True)
    yield Case("parquet: huge values", (("a.parquet", bomb),), refuse=True)
    yield Case("parquet: py extension", (("a.parquet", extension),))


def extension() -> bytes:
    """The name under which Arrow once unpickled what stands beside it."""
    field = pa.field(
        "prompt",
        pa.string(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": here().filled("cos\nsystem\n(S'{COMMAND}'\ntR."),
        },
    )
    out = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"]}, schema=pa.schema([field])), out)
    return out.getvalue()


# ---- folders ---------------------------------------------------------------------------------------------------------


def folder_cases() -> Iterator[Case]:
    good = GOOD[".jsonl"]
    for place in (
        "{URL}/x.jsonl",
        "{OUTSIDE}/victim.json",
        "../outside/victim.json",
        "hf://datasets/a/b/c.jsonl",
        "/etc/passwd",
    ):
        for key in ("data_files", "path"):
            files = place if key == "data_files" else f"\n  - split: train\n    path: {place}"
            card = f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n"
            yield Case(f"README {key} {place}", (("d/README.md", card.encode()), ("d/a.jsonl", good)), "d")
    script = b"import os\nos.system('{COMMAND}')\n"
    yield Case("a script", (("d/d.py", script), ("d/a.jsonl", good)), "d")
    yield Case("only a script", (("d/d.py", script),), "d", refuse=True)
    readme = b"---\ndataset_info:\n  features:\n  - name: prompt\n    dtype: image\n---\n"
    line = jsonl([{"prompt": {"path": "x", "bytes": None}}])
    yield Case("README with an image", (("d/README.md", readme), ("d/a.jsonl", line)), "d")
    yield Case(
        "README of YAML objects",
        (("d/README.md", b"---\na: !!python/object/apply:os.system ['{COMMAND}']\n---\n"), ("d/a.jsonl", good)),
        "d",
    )
    metadata = jsonl([{"file_name": "../../outside/victim", "prompt": "x"}])
    for kind in ("png", "wav", "mp4", "pdf"):
        yield Case(f"folder of {kind}", (("d/metadata.jsonl", metadata), (f"d/a.{kind}", b"x")), "d")
    for what, content in (("null", b"null\n"), ("deep", LINES["deep lists"])):
        yield Case(f"folder with {what}", (("d/train.jsonl", content),), "d", refuse=True)
        yield Case(f"folder with {what} below", (("d/data/train-0.json", content),), "d", refuse=True)
    for kind in ("zip", "tar"):
        yield Case(f"folder with {kind}", ((f"d/train.{kind}", archive(kind)),), "d")
    yield Case("folder with a pickle", (("d/train.pkl", LINES["a pickle"]),), "d", refuse=True)
    yield Case("folder with an arrow file", (("d/train.arrow", b"ARROW1" + b"\xff" * 100),), "d", refuse=True)
    yield Case("folder with a text", (("d/train.txt", b"\x1b[2J\xff\n" * 10),), "d")
    yield Case("folder with images in parquet", (("d/a.parquet", media(["{URL}/x"], "Image", "plain")),), "d")
    yield Case(
        "folder with images, streamed", (("d/a.parquet", media(["{URL}/x"], "Image", "list")),), "d", streaming=True
    )
    yield Case(
        "saved by datasets",
        (
            ("d/dataset_info.json", b'{"features": {"prompt": {"_type": "Image"}}}'),
            ("d/state.json", b'{"_data_files": [{"filename": "../outside/victim"}]}'),
        ),
        "d",
    )
    yield Case("empty folder", (("d/.keep", b""),), "d", refuse=True)
    yield Case("a webdataset", (("d/train-0.tar", archive("tar")),), "d")


# ---- all of them -----------------------------------------------------------------------------------------------------


def cases(seed: int, count: int) -> Iterator[Case]:
    chance = random.Random(f"data_files {seed}")
    fixed = [*text_cases(), *parquet_cases(), *folder_cases()]
    room = min(len(fixed), count) if count < len(fixed) else len(fixed)
    yield from fixed if room == len(fixed) else chance.sample(fixed, room)
    for number in range(count - room):
        yield mutated(chance, number)


def text_cases() -> Iterator[Case]:
    for suffix in (".jsonl", ".json"):
        for name, content in LINES.items():
            for streaming in (False, True):
                yield Case(f"{suffix} {name}{' streamed' * streaming}", ((f"a{suffix}", content),), streaming=streaming)
    for name, content in {**TABLES, "a zip": archive("zip"), "a tar": archive("tar")}.items():
        for streaming in (False, True):
            yield Case(f"csv {name}{' streamed' * streaming}", (("a.csv", content),), streaming=streaming)


def mutated(chance: random.Random, number: int) -> Case:
    """A good file in which bytes are changed, cut out or doubled, or a value is replaced."""
    suffix = chance.choice([".jsonl", ".json", ".csv", ".parquet", ".parquet", ".parquet"])
    streaming = chance.random() < 0.3
    content = bytearray(good_parquet() if suffix == ".parquet" else GOOD[suffix])
    how = chance.choice(["flip", "flip", "cut", "double", "value"])
    if how == "value" and suffix in (".jsonl", ".json"):
        rows: list[Any] = [dict(row) for row in ROWS]
        kind = chance.randrange(3)
        value = chance.choice([payloads.text(chance)[1], chance.choice(payloads.VALUES)])
        if kind == 0:
            rows[chance.randrange(20)]["prompt"] = value
        elif kind == 1:
            rows[chance.randrange(20)] = value
        else:
            rows[chance.randrange(20)][str(value)[:200]] = value
        content = bytearray(jsonl(rows) if suffix == ".jsonl" else json.dumps(rows).encode())
    elif how == "cut":
        start = chance.randrange(len(content))
        del content[start : start + chance.randrange(1, 60)]
    elif how == "double":
        start = chance.randrange(len(content))
        content[start:start] = content[start : start + 40]
    else:
        first = len(content) // 2 if suffix == ".parquet" and chance.random() < 0.7 else 0
        for _ in range(chance.randrange(1, 5)):
            content[chance.randrange(first, len(content))] = chance.randrange(256)
    return Case(
        f"{number}: {suffix} {how}{' streamed' * streaming}", ((f"a{suffix}", bytes(content)),), streaming=streaming
    )


def run(case: Case) -> str:
    """Load the rows and read each of them, as tokenising does."""
    tempfile.tempdir = str(here().folder.parent)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # asked of S3 for any file, whatever it holds
    datasets.config.HF_DATASETS_CACHE = here().folder.parent / "cache"
    for name, content in case.files:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content() if callable(content) else content
        for word in (b"{COMMAND}", b"{URL}", b"{OUTSIDE}"):
            data = data.replace(word, here().filled(word.decode()).encode())
        path.write_bytes(data)
    rows = load_rows(case.load or case.files[0][0], "train", streaming=case.streaming)
    count = 0
    for row in rows:
        if any("secret" in str(value)[:1000] or "nor change" in str(value)[:1000] for value in row.values()):
            return frame.WRONGLY
        count += 1
    if count and math.isfinite(count) and not case.refuse:
        return frame.RIGHTLY
    return frame.WRONGLY
