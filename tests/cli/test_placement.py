"""Where ``rlhf train`` puts a run: the processes, accelerate's settings, and the words of the launch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

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
    own.write_text("num_processes: 6\nnum_machines: 2\n")
    with pytest.raises(ConfigError, match=r"starts 3 processes on a machine, but there are 2 GPUs here; .* 4 or less"):
        chosen(str(own), None, gpus=2, quantised=False)
    assert chosen(str(own), 4, gpus=2, quantised=False).processes == 4
    own.write_text("num_processes: 6\nuse_cpu: true\n")
    assert chosen(str(own), None, gpus=2, quantised=False).processes == 6
    for text, message in (
        ("num_processes: true", "has no num_processes: 1 or more"),
        ("num_processes: 2\nnum_machines: two", "has num_machines='two'; write 1 or more"),
        ("num_processes: 2\ndeepspeed_config: [3]", r"has deepspeed_config=\[3\]; write zero_stage: 2 or 3"),
        ("num_processes: 2\ndeepspeed_config: {zero_stage: '3'}", "has deepspeed_config={'zero_stage': '3'}; write"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match=message):
            chosen(str(own), None, gpus=0, quantised=False)
    own.write_text("mixed_precision: 'no'\n")
    for words, message in (
        ((str(own), None), "has no num_processes: 1 or more"),
        (
            ("zero3_4gpus", None),
            "is no file; did you mean zero3_4gpu?; give a YAML file of accelerate's or one of cpu_",
        ),
        ((None, 3), "--processes starts 3 processes on a machine, but there are 2 GPUs here; give --processes 2 or"),
    ):
        with pytest.raises(ConfigError) as caught:
            chosen(*words, gpus=2, quantised=False)
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="--machine_rank is of a run on several machines; give --nodes N"):
        chosen(None, None, gpus=2, quantised=False, options=("--machine_rank", "1"))
    own.write_text("num_processes: 5\nnum_machines: 2\n")
    with pytest.raises(ConfigError, match="5 processes on 2 machines; give --processes a multiple of 2"):
        chosen(str(own), None, gpus=0, quantised=False)


@pytest.mark.parametrize(
    ("launch", "processes", "gpus", "found"),
    [
        (None, None, 4, (12, "zero3_2nodes")),
        (None, 6, 4, (6, "zero3_2nodes")),
        (None, None, 0, (3, "cpu_zero3")),
        ("zero3_2nodes", None, 2, (6, "zero3_2nodes")),
        ("zero3_offload", None, 2, (6, "zero3_offload")),
    ],
)
def test_several_machines_are_like_this_one(launch: str | None, processes: int | None, gpus: int, found: Any) -> None:
    """accelerate's own parser takes the words, and its configuration comes to so many machines and processes."""
    more = ("--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    where = chosen(launch, processes, gpus=gpus, quantised=True, nodes=3, options=more)
    assert (where.processes, where.file and where.file.stem) == found
    words = launch_command_parser().parse_args([*where.launch_options(), "recipe.py"])
    assert (words.num_machines, words.machine_rank, words.main_process_ip) == (3, 1, "10.0.0.1")
    assert (words.main_process_port or yaml.safe_load(where.file.read_text())["main_process_port"]) == 29500  # type: ignore[union-attr]


def test_machines_need_a_place_to_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("kind: sft\nmodel: {name: m}\ndata: {train: t.jsonl}\n")
    with pytest.raises(SystemExit):
        main(["check", str(path), "--nodes", "2"])
    assert "--nodes 2, but nothing says where they meet; give --main-address" in capsys.readouterr().err


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setattr(machine, "torch_version", lambda: "2.13.0")
    for visible, count in (
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("2", 1),
        ("0,3", 2),
        ("1,-1,2", 1),
        ("0,1,2,3,4,5", 4),
        ("7", 0),
        ("3,4,0", 1),
        ("MIG-1f, GPU-2", 2),
    ):
        assert machine.gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count, visible
    monkeypatch.setattr(machine, "torch_version", lambda: "2.13.0+cpu")
    assert machine.gpus({}) == 0
    monkeypatch.setattr(machine, "torch_version", lambda: "2.13.0+cu128")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus({}) == 0
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    assert machine.gpus({}) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):  # as in a container without nvidia-smi
        (tmp_path / name).touch()
    assert machine.gpus({}) == 2 and machine.gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1


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
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/run.json").touch()
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


def test_a_run_folder_that_cannot_be_used_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", lambda *words: pytest.fail("it was started"))
    Path("my.yaml").write_text("model: {name: m}\ndata: {train: t.jsonl}\nkind: sft\nrun: {output_dir: out}\n")
    Path("out").mkdir()
    for words, message in (
        (["--resume"], "--resume, but run.output_dir=out holds no run; start without --resume"),
        (["run.output_dir=my.yaml"], "run.output_dir=my.yaml cannot be written: File exists; choose"),
        (["run.output_dir=."], "run.output_dir=. holds files but no run.json, so it is not a run folder"),
        ([], "run.output_dir=out holds another run; continue it with --resume, replace it"),
    ):
        if not words:
            Path("out/run.json").touch()
            Path("out/checkpoint-1").mkdir()
        with pytest.raises(SystemExit):
            main(["train", "my.yaml", *words])
        assert capsys.readouterr().err.startswith(f"CheckpointError: {message}")


def test_words_that_are_wrong_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, line in (
        (
            ["train", "--processes", "0"],
            "rlhf train: argument --processes: '0' is no whole number from 1 up; a setting",
        ),
        (["train", "--kl\x1bcoef"], "rlhf train: unrecognized arguments: --kl\\x1bcoef; a setting is written "),
        (["check", "--machine-rank", "-1"], "rlhf check: argument --machine-rank: '-1' is no whole number from 0 up;"),
        (["init", "--kind", "grpo"], "rlhf init: argument --kind: invalid choice: 'grpo' (choose from 'ppo',"),
        (["tune"], "rlhf: argument COMMAND: invalid choice: 'tune'"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        said = capsys.readouterr().err
        assert said.startswith(line) and said.count("\n") == 1 and caught.value.code == 2, said
        assert said.endswith("; see " + line.partition(":")[0] + " --help\n")


def test_a_file_that_is_not_named_is_the_one_of_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train"])
    assert "there is no experiment.yaml in " in capsys.readouterr().err
