"""``rlhf config`` and ``rlhf init``: what they print and write, and that nobody waits for torch meanwhile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rlhf_toolkit.cli import main
from rlhf_toolkit.cli.first_files import written
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.kinds import KINDS, kind_of
from rlhf_toolkit.settings.loading import load_experiment
from rlhf_toolkit.settings.schema import schema
from tests.support.json_schema import faults
from tests.support.offenders import for_each
from tests.support.processes import run

LIGHT = """
import sys
from rlhf_toolkit.cli import main
for words in {commands}:
    try:
        main(words)
    except SystemExit as ended:
        print(words[0], ended.code)
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules), "a heavy import"
"""


def test_what_needs_no_model_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Nor does a mistake in the settings of a run, which is said before torch is imported."""
    path = tmp_path / "bad.yaml"
    path.write_text("model: {name: m}\ndata: {train: t}\nreward: {function: 'r.py:f'}\nppo: {kl_coeff: 1}\n")
    commands = [["--version"], ["--help"], ["train", "--help"], ["config", "dpo"], ["config", "--schema"]]
    commands += [["init", str(tmp_path / "new")], ["train", str(path)], ["train", str(tmp_path / "none.yaml")]]
    ended = run([sys.executable, "-c", LIGHT.format(commands=commands)], seconds=120).succeeded().output
    assert "rlhf_toolkit 0." in ended and "unknown setting ppo.kl_coeff; did you mean ppo.kl_coef?" in ended
    assert "none.yaml: No such file or directory; give the path of a YAML file" in ended
    assert ended.count("train 1") == 2


def test_every_recipe_says_what_is_wrong_before_torch(tmp_path: Path) -> None:
    """What a rank of ``accelerate launch`` runs, up to its settings."""
    code = "import sys, runpy; sys.argv = ['r', '--config', 'none.yaml']\n"
    code += "for name in {names}:\n  try: runpy.run_path(name, run_name='__main__')\n  except SystemExit: pass\n"
    code += "assert not {{'torch', 'transformers'}} & set(sys.modules)"
    names = [f"recipes/{kind.recipe}" for kind in KINDS.values()]
    ended = run([sys.executable, "-c", code.format(names=names)], seconds=120).succeeded()
    assert ended.output.count("ConfigError: cannot read the experiment none.yaml") == len(names)


@for_each("kind", KINDS)
@for_each("gpus", [0, 1, 2, 3, 4, 8])
def test_a_first_experiment_is_sound_on_any_machine(kind: str, gpus: int, tmp_path: Path) -> None:
    files = written(kind, model=None, gpus=gpus)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    values = yaml.safe_load(files["experiment.yaml"])
    assert kind_of(values, "x") == kind and list(faults(values, schema(kind))) == []
    experiment = load_experiment(tmp_path / "experiment.yaml", None, KINDS[kind].experiment)
    rows = [json.loads(line) for line in files["train.jsonl"].splitlines()]
    assert len(rows) == max(3, gpus)
    if isinstance(experiment, Experiment):
        experiment.check_processes(max(1, gpus))
        assert experiment.rollout.prompts_per_rollout <= len(rows)
        names = ModuleType("reward")
        exec(files["reward.py"], vars(names))
        right, wrong = names.score(["p"] * 2, ["It is 5", "It is 6"], answer=["5", "5"])
        assert right - wrong == 1.0
    else:
        assert experiment.job.batch_size % max(1, gpus) == 0


def test_each_setting_of_a_first_experiment_has_its_help_behind_it() -> None:
    lines = written("ppo", model="m", gpus=0)["experiment.yaml"].splitlines()
    settings = [line for line in lines if line.startswith("  ")]
    assert len(settings) > 10 and all("  # " in line for line in settings)
    assert "  kl_coef: 0.02  # weight of the KL to the reference" in settings


def test_init_writes_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    main(["init", "a folder", "--model", "some/model"])
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "wrote a folder/experiment.yaml, a folder/train.jsonl, a folder/reward.py",
        "now: cd 'a folder' && rlhf check && rlhf train",
    ]
    assert yaml.safe_load(Path("a folder/experiment.yaml").read_text())["model"]["name"] == "some/model"
    Path("model").mkdir()
    for folder, name in (("another", str(tmp_path / "model")), (".", "model")):  # where the run is started
        main(["init", folder, "--model", "model"])
        assert yaml.safe_load((Path(folder) / "experiment.yaml").read_text())["model"]["name"] == name
    for name in ("experiment.yaml", "train.jsonl"):
        Path(name).unlink()
    capsys.readouterr()
    Path("reward.py").write_text("mine")
    for words in (["init"], ["init", "reward.py"]):
        with pytest.raises(SystemExit):
            main(words)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "CheckpointError: reward.py exists already; choose another folder: rlhf init FOLDER"
    assert said[1].startswith("CheckpointError: cannot write to reward.py: ") and len(said) == 2
    assert Path("reward.py").read_text() == "mine" and not Path("experiment.yaml").exists()


def test_config_prints_the_schema_it_checks_with(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "sft", "--schema"])
    assert json.loads(capsys.readouterr().out) == schema("sft")
    main(["config", "sft"])
    assert "sft.turns=all" in capsys.readouterr().out
