"""Where ``rlhf train`` puts a run: the processes, accelerate's settings, and the words of the launch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_toolkit.cli import machine, main
from rlhf_toolkit.cli.placement import chosen
from rlhf_toolkit.cli.shipped import launch_configs, recipe
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.last_words import COMMAND
from rlhf_toolkit.settings.kinds import KINDS
from tests.support.processes import ROOT

SMI = """#!/bin/sh
for number in 0 1 2 3; do echo "GPU $number: NVIDIA H100 (UUID: GPU-$number)"; done
"""


@pytest.mark.parametrize(
    ("gpus", "processes", "quantised", "found"),
    [
        (0, None, False, (1, None, None)),
        (0, 2, False, (2, "cpu_zero3", 3)),
        (0, 2, True, (2, "cpu_zero3", 3)),
        (1, None, False, (1, None, None)),
        (4, None, False, (4, "zero3_2gpu", 3)),
        (4, 2, False, (2, "zero3_2gpu", 3)),
        (4, None, True, (4, "zero2_2gpu", 2)),
        (4, 1, True, (1, None, None)),
    ],
)
def test_each_machine_gets_its_launch(gpus: int, processes: int | None, quantised: bool, found: Any) -> None:
    where = chosen(None, processes, gpus=gpus, quantised=quantised)
    assert (where.processes, where.file and where.file.stem, where.stage) == found
    if where.file is not None:
        stage = yaml.safe_load(where.file.read_text())["deepspeed_config"]["zero_stage"]
        assert stage == where.stage and f"ZeRO-{stage}" in where.text()


def test_a_launch_file_is_taken_as_it_stands(tmp_path: Path) -> None:
    assert chosen("zero3_4gpu", None, gpus=0, quantised=False).processes == 4
    assert chosen("zero3_4gpu.yaml", 8, gpus=0, quantised=False).launch_options()[2:] == ["--num_processes", "8"]
    nodes = chosen("zero3_2nodes", None, gpus=0, quantised=False, options=("--machine_rank", "1"))
    assert nodes.launch_options()[-2:] == ["--machine_rank", "1"] and nodes.processes == 4
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: 'NO'\nnum_processes: 1\n")
    where = chosen(str(own), None, gpus=4, quantised=False)
    assert (where.processes, where.file, where.stage) == (1, own, None)
    own.write_text("mixed_precision: 'no'\n")
    for words, message in (
        ((str(own), None), "has no num_processes: 1 or more"),
        (
            ("zero3_4gpus", None),
            "is no file; did you mean zero3_4gpu?; give a YAML file of accelerate's or one of cpu_",
        ),
        ((None, 3), "--processes 3, but there are 2 GPUs here; give 2 or less"),
    ):
        with pytest.raises(ConfigError) as caught:
            chosen(*words, gpus=2, quantised=False)
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="a run on several machines needs a launch config"):
        chosen(None, None, gpus=2, quantised=False, options=("--machine_rank", "1"))


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setattr(machine, "torch_version", lambda: "2.13.0")
    for visible, count in ((None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,3", 2), ("1,-1,2", 1), ("0,1,2,3,4,5", 4)):
        assert machine.gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count, visible
    monkeypatch.setattr(machine, "torch_version", lambda: "2.13.0+cpu")
    assert machine.gpus({}) == 0
    monkeypatch.setattr(machine, "torch_version", lambda: "2.13.0+cu128")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus({}) == 0
    (tmp_path / "nvidia-smi").unlink()
    assert machine.gpus({}) == 0


def test_recipes_and_launch_configs_are_those_at_the_top_of_the_clone() -> None:
    assert {path.parent for path in launch_configs().values()} == {ROOT / "accelerate_configs"}
    assert all(recipe(kind.recipe) == ROOT / "recipes" / kind.recipe for kind in KINDS.values())
    assert all(recipe(kind.recipe).is_file() for kind in KINDS.values())


EXPERIMENTS = {
    "ppo": "reward: {function: 'r.py:f'}\nrollout: {prompts_per_rollout: 6}\n",
    "sft": "kind: sft\n",
    "reward": "reward_model: {epochs: 2}\n",
    "dpo": "dpo:\n",
}


@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_one_process_becomes_the_recipe(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings as they were given, and with the command that goes on in the environment."""
    started = list[list[Any]]()

    def replaced(*words: Any) -> None:
        started.append([*words])

    monkeypatch.setattr("rlhf_toolkit.cli.train.gpus", lambda: 0)
    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setattr("rlhf_toolkit.distributed.launcher.launch", replaced)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    path = tmp_path / "my.yaml"
    path.write_text("model: {name: m}\ndata: {train: t.jsonl}\n" + EXPERIMENTS[kind])
    words = ["--resume", "--run.seed", "3", str(path), "run.output_dir=out"]
    monkeypatch.setattr(sys, "argv", ["/bin/rlhf", "train", *words])
    with pytest.raises(SystemExit):  # nothing has taken this process's place
        main(["train", *words])
    script = str(ROOT / "recipes" / KINDS[kind].recipe)
    settings = ["--config", str(path), "run.seed=3", "run.output_dir=out", "--resume"]
    assert started[0] == [sys.executable, [sys.executable, script, *settings]]
    assert json.loads(os.environ[COMMAND]) == ["rlhf", "train", *words]
    assert f"{kind}: 1 process on CPU, no DeepSpeed; results in out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", str(path), "--processes", "2"])
    assert started[-1][0] == Path(script) and started[-1][2][:1] == ["--config_file"]
    if kind == "ppo":
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["train", str(path), "--processes", "4"])
        said = "ConfigError: rollout.prompts_per_rollout=6 does not divide among 4 processes; try 4 or 8\n"
        assert capsys.readouterr().err == said


def test_a_file_that_is_not_named_is_the_one_of_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train"])
    assert "there is no experiment.yaml in " in capsys.readouterr().err
