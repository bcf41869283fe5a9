"""Each mistake of the tables costs its one line, before the model's weights are touched; docs/mistakes.md has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlhf_toolkit.errors import _Script, reported
from rlhf_toolkit.runs.ppo import PPOKind, prepare
from rlhf_toolkit.runs.task import load_rewards
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import load_experiment
from tests.support.launch import ROOT
from tests.support.mistakes import SCORINGS, SETTINGS, STARTS, Mistake, written
from tests.support.offenders import for_each
from tests.support.rewards import prompts_for

sys.path.insert(0, str(ROOT / "bench"))
import mistakes

PAGE = ROOT / "docs/mistakes.md"
TABLES = {"settings": SETTINGS, "starts": STARTS, "scorings": SCORINGS}


def last_line(case: Mistake, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What ends the run: all that stderr gets, but for the stack of a reward that has raised."""

    def load_model(*_: object) -> None:
        raise AssertionError("the model is loaded before the mistake is seen")

    monkeypatch.setattr(_Script, "runs", False)
    monkeypatch.setattr(PPOKind, "load_model", load_model)
    path = written(case, folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, reported():
        experiment: Experiment = load_experiment(path)
        if case in SCORINGS:
            with_rewards(experiment)
        else:
            prepare(experiment, **case.arguments)
    assert end.value.code == 1
    *above, line = capsys.readouterr().err.splitlines()
    stack = above[:1] == ["Traceback (most recent call last):"] and case.written == "a reward that raises"
    assert not above or stack, "one line, but for the stack of the user's own code above it"
    return line.replace(str(folder), "{here}").replace(str(Path.cwd()), "{cwd}").partition(": ")[2]


def with_rewards(experiment: Experiment) -> None:
    """The first scoring, of two responses."""
    rewards = load_rewards(experiment)
    try:
        rewards.collect(prompts_for(2), ["w1", "w2"], [[1], [2]])
    finally:
        rewards.close()


@for_each("case", [*SETTINGS, *STARTS, *SCORINGS], lambda case: case.written)
def test_a_mistake_costs_one_line(
    case: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, _, place = last_line(case, tmp_path, monkeypatch, capsys).partition(" ({here}/experiment.yaml, line ")
    assert line == case.line
    assert not place or 1 <= int(place.rstrip(")")) <= len((tmp_path / "experiment.yaml").read_text().splitlines())
    assert place or case not in SETTINGS


def table(cases: tuple[Mistake, ...]) -> str:
    """As the page shows it."""
    rows = [f"| {case.written} | `{case.line.replace('{here}', '…').replace('{cwd}', '…')}` |" for case in cases]
    return "\n".join(["| what is written | the line |", "| --- | --- |", *rows]) + "\n"


def test_the_page_shows_these_tables() -> None:
    page = PAGE.read_text()
    for name, cases in TABLES.items():
        assert table(cases) in page, name


def test_the_page_shows_what_they_cost_in_a_process_of_their_own() -> None:
    found = json.loads((ROOT / "bench/results/mistakes.json").read_text())["figures"]
    assert mistakes.as_markdown(found) in PAGE.read_text()
    assert {row["written"] for row in found} == {case.written for cases in TABLES.values() for case in cases}
    assert max(row["lines"] for row in found if not row["stack"]) == 1
    assert max(row["seconds"] for row in found if row["kind"] == "settings") < 3
