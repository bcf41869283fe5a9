"""Write prompts of any reasoning-gym dataset: `python recipes/reasoning_gym/make_prompts.py [--dataset NAME ...]`.

Each line of train.jsonl and heldout.jsonl has `prompt` and what the reward needs: `entry`, the item as JSON text,
`dataset`, its name, and `config`, the settings it was built with. The same command gives the same bytes every time, and
no prompt is in both files. Needs the package reasoning-gym: `pip install 'rlhf_toolkit[tasks]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_toolkit.rewards.gym import entry_text

Row = dict[str, str]

EASY: dict[str, dict[str, Any]] = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
"""Settings that are used where --config gives none: chain_sum as SmolLM2-135M-Instruct learns it."""
TRIES = 20
"""Items looked at for each prompt wanted, before a dataset counts as too small."""


class PromptsError(Exception):
    """The files cannot be made; the message is one line and says the way out."""


def rows(dataset: str, config: Mapping[str, Any], *, seed: int, template: str, items: int) -> Iterator[Row]:
    """The first `items` items of `dataset` as rows, in its order, those with a prompt seen before left out."""
    from reasoning_gym import create_dataset

    source, seen = create_dataset(dataset, seed=seed, size=items, **config), set()
    for index in range(items):
        item = source[index]
        prompt = template.replace("{question}", str(item["question"]))
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "entry": entry_text(item), "dataset": dataset, "config": json.dumps(config)}


def split(
    dataset: str, config: Mapping[str, Any], *, train: int, heldout: int, seed: int, template: str = "{question}"
) -> dict[str, list[Row]]:
    """File name -> its rows: the first `heldout` distinct prompts are held out, the next `train` are for training.

    Raises PromptsError where the dataset has fewer distinct prompts, or cannot be built.
    """
    wanted = heldout + train
    found: list[Row] = []
    try:
        for row in rows(dataset, config, seed=seed, template=template, items=TRIES * wanted):
            found.append(row)
            if len(found) == wanted:
                break
    except (ValueError, TypeError, AssertionError) as error:  # unknown name, unknown setting, value out of range
        raise PromptsError(f"reasoning-gym cannot build {dataset} with {json.dumps(config)}: {error}") from error
    if len(found) < wanted:
        raise PromptsError(
            f"{dataset} has {len(found)} distinct prompts among {TRIES * wanted} items, {wanted} are wanted: "
            "lower --train or --heldout, or widen --config"
        )
    return {"heldout.jsonl": found[:heldout], "train.jsonl": found[heldout:]}


def write(folder: Path, files: Mapping[str, list[Row]]) -> None:
    """Write each file's rows into `folder`, one JSON object a line, UTF-8, "\\n" on every system."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines).encode())


def main() -> None:
    """Write the files; exit with status 1 and one line on PromptsError."""
    parser = argparse.ArgumentParser(description="Write prompts of a reasoning-gym dataset.")
    parser.add_argument("--dataset", default="chain_sum", help="its name in reasoning-gym; default: %(default)s")
    parser.add_argument("--config", type=json.loads, help="its settings, as JSON; default: those of EASY, else its own")
    parser.add_argument("--template", default="{question}", help="the prompt, with {question} in it")
    parser.add_argument("--train", type=int, default=512, help="training prompts; default: %(default)s")
    parser.add_argument("--heldout", type=int, default=128, help="held-out prompts; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args()
    config = EASY.get(given.dataset, {}) if given.config is None else given.config
    sizes = {"train": given.train, "heldout": given.heldout, "seed": given.seed}
    try:
        write(given.to, split(given.dataset, config, template=given.template, **sizes))
    except PromptsError as error:
        sys.exit(f"make_prompts: {error}")


if __name__ == "__main__":
    main()
