"""docs/python.md: its lines run as they stand, under python, on two ranks, and as a notebook's cells, and every way
gives the same scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recipes.sentiment.fetch_model import default_folder, fetch
from rlhf_toolkit.reporting.records import read_records
from tests.support.builders import CHAT_TEMPLATE
from tests.support.forked import shared
from tests.support.launch import ROOT, launch
from tests.support.processes import Finished
from tests.support.tiny import write_task

PAGE = (ROOT / "docs/python.md").read_text()
NOTEBOOK = ROOT / "docs/notebooks/first_run.ipynb"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = 'dtype="float32", wandb="off", lora_rank=4, num_rollouts=3'
"""In the place of the number of rollouts."""
TIMED = "\nimport time\n\nprint(time.process_time())\n"
KEYS = ("critic/score/mean", "eval/score/mean")


def lines() -> str:
    return re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0]


def cells() -> str:
    notebook = json.loads(NOTEBOOK.read_text())
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def made_small(script: str, folder: Path, name: str) -> Path:
    """``script`` on a tiny model, three rollouts long, in a folder of its own."""
    assert script.count(MODEL) == 1 and script.count("num_rollouts=8") == 1
    small = script.replace(MODEL, str(folder / "model")).replace("num_rollouts=8", SMALL)
    path = folder / f"{name}.py"
    path.write_text(small.replace("runs/brief", str(folder / name)))
    return path


def scores(folder: Path) -> list[tuple[int, str, float]]:
    records: list[dict[str, Any]] = [r for kind in ("train", "eval") for r in read_records(folder, kind)]
    return [(record["rollout"], key, record[key]) for record in records for key in KEYS if key in record]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    write_task(folder, chat_template=CHAT_TEMPLATE)
    return folder


def with_model_in_memory(script: str) -> str:
    """The script, which gives a model instead of its name: under ZeRO-3 each rank makes the whole one."""
    model = "AutoModelForCausalLM.from_pretrained(model, dtype='float32')"
    before = f"from transformers import AutoModelForCausalLM\n\nmodel = {MODEL!r}\n"
    return before + script.replace(f'model="{MODEL}"', f"model={model}")


def run_alone(script: str, task: Path, name: str) -> Finished:
    return shared().run(str(made_small(script, task, name))).succeeded()


def require_same_scores(mine: Path, first: Path) -> None:
    found, expected = scores(mine), scores(first)
    assert len(expected) == 5 and len({value for *_, value in expected}) > 1
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    assert [each[2] for each in found] == pytest.approx([each[2] for each in expected], abs=1e-6)


@pytest.fixture(scope="module")
def alone(task: Path) -> Path:
    """The run folder of the lines in one process."""
    assert "'eval/score/mean'" in run_alone(lines(), task, "alone").output
    return task / "alone"


def test_the_lines_and_the_cells_of_the_notebook_run_with_the_same_scores(task: Path, alone: Path) -> None:
    assert len([line for line in lines().splitlines() if line.strip()]) <= 16
    assert (alone / "model/policy/adapter_config.json").is_file()
    run_alone(cells(), task, "cells")
    require_same_scores(task / "cells", alone)


@pytest.mark.thorough
def test_two_ranks_under_the_launcher_have_these_scores_too(task: Path, alone: Path) -> None:
    """And so have two ranks that give a model in place of its name."""
    launched = made_small(lines(), task, "launched")
    launch([str(launched)], task, processes=2, stage=3, launcher=True).succeeded()
    require_same_scores(task / "launched", alone)
    given = made_small(with_model_in_memory(lines()), task, "given")
    launch([str(given)], task, processes=2, stage=3).succeeded()
    require_same_scores(task / "given", alone)


@pytest.mark.thorough
def test_the_notebook_as_it_stands(task: Path) -> None:
    """With the model that the demo fetches: in two minutes of a processor, scores rise."""
    model = fetch(default_folder())
    script = task / "whole.py"
    script.write_text(cells().replace(MODEL, str(model)).replace("runs/brief", str(task / "whole")) + TIMED)
    finished = shared().run(str(script)).succeeded()
    assert finished.output.count(" -> ") == 4, "responses of the beginning and of the end"
    before, after = (record["eval/score/mean"] for record in read_records(task / "whole", "eval"))
    assert after > before + 0.1
    train = [record["critic/score/mean"] for record in read_records(task / "whole", "train")]
    assert sum(train[-3:]) / 3 > sum(train[:2]) / 2 + 0.3
    assert float(finished.output.split()[-1]) < 120
