"""Write prompts of GSM8K: `python recipes/gsm8k/make_prompts.py [--source FOLDER_OR_FILE]`.

Without --source the dataset openai/gsm8k comes from the hub: 7,473 training problems and 1,319 test problems, which are
held out. Each line of train.jsonl and heldout.jsonl has `prompt`, the question and verl's instruction, `answer`, the
bare number, and `solution`, the dataset's worked solution. No question is in both files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, str]

DATASET, CONFIG = "openai/gsm8k", "main"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


class PromptsError(Exception):
    """The files cannot be made; the message is one line and says the way out."""


def row(item: Mapping[str, Any]) -> Row:
    """A problem of the dataset as a row. Raises PromptsError where it has no question, or no number behind `####`."""
    question, solution = (str(item.get(name) or "").strip() for name in ("question", "answer"))
    _, mark, number = solution.rpartition("####")
    number = number.strip().replace(",", "")
    if not (question and mark and number.lstrip("-").replace(".", "", 1).isdigit()):
        raise PromptsError(f"{dict(item)!r:.200} is no problem of GSM8K: give question, and answer with '#### number'")
    return {"prompt": f"{question} {INSTRUCTION}", "answer": number, "solution": solution}


def load(source: str | None, *, heldout: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Training and held-out problems of the hub's dataset, or of a local folder or file.

    A folder holds train* and test* files, parquet or jsonl, itself or in its folder `main`. Of a single file `heldout`
    problems, drawn by `seed`, are held out. Raises PromptsError where nothing can be read.
    """
    from datasets import load_dataset

    try:
        if source is None:
            splits = load_dataset(DATASET, CONFIG)
            return list(splits["train"]), list(splits["test"])
        files = local_files(Path(source))
        kind = FORMATS[Path(files["train"][0]).suffix]
        parts = {name: list(load_dataset(kind, data_files=paths, split="train")) for name, paths in files.items()}
    except PromptsError:
        raise
    except Exception as error:  # the hub, the network and three file formats fail in many ways
        why = " ".join(str(error).split())[:300]
        raise PromptsError(
            f"cannot read {source or DATASET} ({type(error).__name__}: {why}): check network and path, or give "
            "--source a folder with train.jsonl and test.jsonl"
        ) from error
    return (parts["train"], parts["test"]) if "test" in parts else drawn(parts["train"], heldout, seed)


def local_files(source: Path) -> dict[str, list[str]]:
    """`train` -> files, and `test` -> files where `source` is a folder. Raises PromptsError where there are none."""
    if source.is_file():
        if source.suffix not in FORMATS:
            raise PromptsError(f"{source} is none of {', '.join(FORMATS)}; give a file of that kind, or a folder")
        return {"train": [str(source)]}
    folder = source / CONFIG if (source / CONFIG).is_dir() else source
    found = {
        name: sorted(str(path) for path in folder.glob(f"{name}*") if path.suffix in FORMATS)
        for name in ("train", "test")
    }
    if not all(found.values()):
        raise PromptsError(f"{folder} needs train* and test* files, one of {', '.join(FORMATS)} each")
    return found


def drawn(problems: list[Any], heldout: int, seed: int) -> tuple[list[Any], list[Any]]:
    """`problems` without, and with nothing but, `heldout` of them. Raises PromptsError where none would be left."""
    if heldout >= len(problems):
        raise PromptsError(f"--heldout {heldout} leaves none of {len(problems)} problems to train on; lower it")
    chosen = set(random.Random(f"gsm8k {seed}").sample(range(len(problems)), heldout))
    train = [problem for index, problem in enumerate(problems) if index not in chosen]
    return train, [problems[index] for index in sorted(chosen)]


def split(train: Iterable[Any], heldout: Iterable[Any]) -> dict[str, list[Row]]:
    """File name -> its rows, in the dataset's order. A question in both stays held out, and none stays twice."""
    files: dict[str, list[Row]] = {"heldout.jsonl": [], "train.jsonl": []}
    seen: set[str] = set()
    for name, problems in (("heldout.jsonl", heldout), ("train.jsonl", train)):
        for problem in problems:
            new = row(problem)
            if new["prompt"] not in seen:
                seen.add(new["prompt"])
                files[name].append(new)
    return files


def write(folder: Path, files: dict[str, list[Row]]) -> None:
    """Write each file's rows into `folder`, one JSON object a line, UTF-8, "\\n" on every system."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
        (folder / name).write_bytes("".join(lines).encode())


def main() -> None:
    """Write the files and say how many rows they have; exit with status 1 and one line on PromptsError."""
    parser = argparse.ArgumentParser(description="Write prompts of GSM8K.")
    parser.add_argument("--source", help="a local folder or file instead of the hub's dataset")
    parser.add_argument("--heldout", type=int, default=256, help="of a single file, problems to hold out")
    parser.add_argument("--seed", type=int, default=0, help="of a single file, which; default: %(default)s")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args()
    try:
        train, heldout = load(given.source, heldout=given.heldout, seed=given.seed)
        files = split(train, heldout)
        write(given.to, files)
    except PromptsError as error:
        sys.exit(f"make_prompts: {error}")
    left_out = len(train) + len(heldout) - sum(map(len, files.values()))
    print(*(f"{name}: {len(rows)} rows" for name, rows in files.items()), f"left out as repeated: {left_out}", sep="\n")


if __name__ == "__main__":
    main()
