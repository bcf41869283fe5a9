"""Everything on docs/data.md is what the commands and the starts of runs there print, word for word."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen3Config

from recipes.sentiment.fetch_model import default_folder, fetch
from rlhf_toolkit.cli import main
from rlhf_toolkit.runs.fine_tuning import FineTuningKind, prepare_fine_tuning
from rlhf_toolkit.runs.ppo import PPOKind, prepare
from rlhf_toolkit.runs.start import Kind
from rlhf_toolkit.settings.experiment import SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.docs.test_docs import ROOT
from tests.support.chat_tokenizers import CHATML, QWEN3, byte_tokenizer
from tests.support.tiny import merged

PAGE = (ROOT / "docs/data.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
FILES = dict(
    zip(re.findall(r"^`(\w+\.jsonl)`:$", PAGE, flags=re.MULTILINE), (b for k, b in BLOCKS if k == "json"), strict=True)
)
COMMANDS = [block.removeprefix("$ rlhf ").partition("\n")[::2] for kind, block in BLOCKS if kind == "console"]
DEMO, SFT = (block for kind, block in BLOCKS if not kind)
SMOLLM = "~/.cache/rlhf_toolkit/SmolLM2-135M-Instruct"
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the page's files and its two models, which have no weights."""
    for name, template, eos in (("qwen3-tiny", QWEN3, "<|im_end|>"), ("base-tiny", CHATML, "<|endoftext|>")):
        byte_tokenizer(template, eos=eos).save_pretrained(tmp_path / name)
        Qwen3Config(**SIZES).save_pretrained(tmp_path / name)
    for name, rows in FILES.items():
        (tmp_path / name).write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_prints_what_the_page_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(FILES) == 4 and len(COMMANDS) == 7
    for words, shown in COMMANDS:
        main(shlex.split(words))
        assert capsys.readouterr().out == shown, words


class Begun(Exception):
    """All that a start says before it loads weights has been said."""


def start_of(kind: type[Kind[Any, Any, Any, Any]], prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(kind, "load_model", load_model)
    with pytest.raises(Begun):
        prepared()


def test_the_start_of_a_supervised_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {
        "model": {"name": "qwen3-tiny", "dtype": "float32"},
        "data": {"train": "tools.jsonl"},
        "sft": {"turns": "last"},
        "run": {"output_dir": "run", "wandb": "off"},
    }
    experiment = experiment_from_dict(sections, SFTExperiment)
    start_of(FineTuningKind, lambda: prepare_fine_tuning(experiment), monkeypatch)
    assert capsys.readouterr().out == SFT


@pytest.mark.thorough
def test_the_start_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load((ROOT / "recipes/sentiment/ppo.yaml").read_text())
    model = fetch(default_folder())
    changes = {"model.name": str(model), "run.output_dir": str(tmp_path / "run"), "run.wandb": "off"}
    experiment: Any = experiment_from_dict(merged(recipe, changes))
    start_of(PPOKind, lambda: prepare(experiment), monkeypatch)
    told = capsys.readouterr().out.replace(str(model), SMOLLM).splitlines(keepends=True)
    assert told[1].startswith("model.dtype auto: ")
    assert "".join([told[0], *told[2:]]) == DEMO
