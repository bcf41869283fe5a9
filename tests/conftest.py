"""Recipes as processes, and one finished run in miniature for what is done with its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forked import RecipeProcesses
from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task


@pytest.fixture(scope="session")
def recipe() -> RecipeProcesses:
    """``recipes/ppo.py`` in processes that cost a second."""
    return RecipeProcesses()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` and ``run/``; nobody writes to it."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {
        "ppo.num_rollouts": 2,
        "data.evaluation": str(folder / "heldout.jsonl"),
        "run.evaluate_every": 1,
        "run.save_every": 1,
    }
    run_recipe(write_experiment(folder / "run.yaml", merged(write_task(folder), changes))).succeeded()
    return folder
