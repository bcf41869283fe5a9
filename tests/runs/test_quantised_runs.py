"""Whole runs on a base in 4 bits end with the adapters of runs on a base of the dequantised weights, of every kind and
on any ranks, and say what they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.runs.evaluation import compare_contestants
from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.distributed.test_quantised_base import ALONE, base_on, dense
from tests.support.launch import run_recipe
from tests.support.tiny import merged, tiny_llama, write_experiment, write_task
from tests.support.values import named
from tests.trainers.test_fine_tuning import KINDS, sections

ON_RANKS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {}),
    (3, {"model.gradient_checkpointing": True}),
    (3, {"rollout.mode": "stream", "update.packing": "off"}),
)


def adapters(folder: Path) -> dict[str, Tensor]:
    files = [*folder.glob("*/adapter_model.safetensors"), *folder.glob("*/*_head.safetensors")]
    assert files
    return {f"{f.parent.name}/{n}": t for f in files if "checkpoint" not in str(f) for n, t in load_file(f).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=named(name))


def with_dense_copy(settings: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with a base in NF4, and with one of the same weights in fp32, in run folders of their own."""
    folder.mkdir()
    model = dense(base_on(settings["model"]["name"], ALONE, "nf4"))
    for path in Path(settings["model"]["name"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(folder)
    quantised = merged(settings, {"model.quantization": "nf4", "run.output_dir": str(folder.parent / "nf4")})
    return quantised, merged(settings, {"model.name": str(folder), "run.output_dir": str(folder.parent / "dense")})


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The settings of a run on NF4 that has ended, and what one on its dequantised weights left."""
    folder = tmp_path_factory.mktemp("ppo")
    task = write_task(folder, model=tiny_llama(initializer_range=0.2))
    changes = {"ppo.num_rollouts": 2, "ppo.mini_batches": 2, "data.evaluation": str(folder / "heldout.jsonl")}
    pair = with_dense_copy(merged(task, {**changes, "run.save_every": 1}), folder / "dense_model")
    for settings in pair:
        run = prepare(experiment_from_dict(settings))
        run.train()
    return pair[0], folder


def test_ppo_ends_with_the_adapters_of_the_dequantised_base(ppo: tuple[dict[str, Any], Path]) -> None:
    _, folder = ppo
    same(adapters(folder / "nf4"), adapters(folder / "dense"))


def test_ppo_on_ranks_ends_with_the_same(ppo: tuple[dict[str, Any], Path]) -> None:
    settings, folder = ppo
    for number, (stage, changes) in enumerate(ON_RANKS):
        experiment = merged(settings, {**changes, "run.output_dir": str(folder / f"ranks{number}")})
        path = write_experiment(folder / f"{number}.yaml", experiment)
        run_recipe(path, processes=2, stage=stage).succeeded()
        same(adapters(folder / f"ranks{number}"), adapters(folder / "nf4"))


def test_a_run_names_its_quantisation_and_goes_on_with_no_other(ppo: tuple[dict[str, Any], Path]) -> None:
    settings, folder = ppo
    assert json.loads((folder / "nf4/run.json").read_text())["model"]["quantization"] == "nf4"
    other = merged(settings, {"model.quantization": "int8", "ppo.num_rollouts": 3})
    with pytest.raises(CheckpointError, match=r"model\.quantization='nf4', now model\.quantization='int8'"):
        prepare(experiment_from_dict(other), resume=True)


def test_evaluation_says_of_a_quantised_base_what_it_says_of_its_weights(ppo: tuple[dict[str, Any], Path]) -> None:
    settings, folder = ppo
    dense_one = merged(settings, {"model.name": str(folder / "dense_model"), "model.quantization": "none"})
    contestants = ("base", str(folder / "nf4/policy"))
    found, expected = (compare_contestants(experiment_from_dict(each), contestants) for each in (settings, dense_one))
    for label in contestants:
        mine, right = (each.responses[label]["greedy"] for each in (found, expected))
        assert mine.sampled.responses == right.sampled.responses
        assert mine.kl is not None and right.kl is not None
        torch.testing.assert_close(mine.kl, right.kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_supervised_run_ends_with_the_adapters_of_the_dequantised_base(kind: str, tmp_path: Path) -> None:
    task = sections(tmp_path, kind, {})
    for settings in with_dense_copy(task, tmp_path / "dense_model"):
        prepare_fine_tuning(experiment_from_dict(settings, KINDS[kind])).train()
    same(adapters(tmp_path / "nf4"), adapters(tmp_path / "dense"))
