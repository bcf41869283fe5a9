"""The command line of recipes and of ``rlhf train``: three spellings of a setting, anywhere among the words."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.settings.command import read_command, split_settings
from rlhf_toolkit.settings.experiment import Experiment

FILE = "model: {name: m}\ndata: {train: t.jsonl}\nreward: {function: 'r.py:f'}\n"
SPELLINGS = (
    ["--config", "FILE", "ppo.kl_coef=0.25", "run.output_dir=runs/a=b", "--resume"],
    ["--resume", "--ppo.kl_coef=0.25", "--config", "FILE", "--run.output_dir", "runs/a=b"],
    ["--ppo.kl_coef", "0.25", "--config=FILE", "run.output_dir=runs/a=b", "--resume"],
)


@pytest.mark.parametrize("words", SPELLINGS)
def test_a_setting_may_be_written_in_three_ways_anywhere(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(FILE)
    command = read_command(Experiment, "A recipe.", [word.replace("FILE", str(path)) for word in words])
    assert (command.experiment.ppo.kl_coef, command.experiment.run.output_dir) == (0.25, "runs/a=b")
    assert command.resume and not command.overwrite


def test_values_that_look_like_something_else() -> None:
    words = ["./a.yaml", "run.seed=-1", "--run.seed", "-1", "reward.kwargs={a: 'b c'}", "--launch", "x.yaml", "kl=1"]
    others, settings = split_settings(words)
    assert others == ["./a.yaml", "--launch", "x.yaml", "kl=1"]
    assert settings == ["run.seed=-1", "run.seed=-1", "reward.kwargs={a: 'b c'}"]
    for words in (["--ppo.kl_coef"], ["--ppo.kl_coef", "--resume"]):
        with pytest.raises(ConfigError, match=r"--ppo\.kl_coef has no value; write ppo\.kl_coef=VALUE"):
            split_settings(words)
