"""All that a run writes to a terminal and to a log, to the last line: no library's words, no bar that stays, and
nothing glued to one."""

from __future__ import annotations

import re
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from rlhf_toolkit import texts
from rlhf_toolkit.errors import RunWarning, _Script
from rlhf_toolkit.reporting import progress
from rlhf_toolkit.reporting.report import print_report
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.forked import RecipeProcesses
from tests.support.launch import run_recipe
from tests.support.screen import shown, terminal
from tests.support.tiny import merged, write_experiment, write_task

PANEL = """
{here}/prompts.jsonl: # of # prompts, # to # tokens; # dropped as too long
{here}/heldout.jsonl: # of # prompts, # to # tokens; # dropped as too long
model: {here}/model (llama)
chat template: none, texts are taken as they stand
stop tokens: '</s>'
row #: # tokens of prompt
 prompt # | w#
trained: the policy's adapter (LoRA of rank # on all-linear), the value's adapter (LoRA of rank # on all-linear) and \
its head
micro-batches: packed, shared prefixes once
writes: {here}/run: log.jsonl, samples.jsonl, summary.json, a checkpoint every rollout, the newest # kept
ranks: {ranks}; #M parameters, #M trained; # mini-batch(es) a pass, micro-batches of at most # tokens a role; the role \
pass asks policy, value, reference; where an update is one pass, reference
rollout: base gathered once a rollout, # slot(s), # tokens a prefill; sampling #, role pass #, update # of # GiB free
"""
TRAINED = """
evaluation after rollout #/# score # kl # length # # s
rollout #/# score # kl # length # tok/s # # s left #
evaluation after rollout #/# score # kl # length # # s
rollout #/# score # kl # length # tok/s # # s
evaluation after rollout #/# score # kl # length # # s

 mean score, first two rollouts #
 mean score, last four rollouts #
 held-out score, before #
 held-out score, after #
 KL to the reference, last rollout (nats a response) #
 minutes #
 tokens per second #
 peak memory of rank # (GiB) #

 prompt ...
 before # ...
 after # ...

 prompt ...
 before # ...
 after # ...

 prompt ...
 before # ...
 after # ...

 run folder {here}/run
 log {here}/run/log.jsonl
 adapters {here}/run/policy, {here}/run/value
"""
FIRST = "{here}/run.yaml: results in {here}/run"
TITLE = "PPO: {here}/model on {here}/prompts.jsonl"
SAVING: dict[str, Any] = {"ppo.num_rollouts": 2, "run.evaluate_every": 1, "run.save_every": None}
ONE, TWO = "# process(es) on cpu, no DeepSpeed", "# process(es) on cpu, ZeRO-#"


def task_in(folder: Path, **changes: Any) -> dict[str, Any]:
    return merged(write_task(folder), {"data.evaluation": str(folder / "heldout.jsonl"), **SAVING, **changes})


def plain(lines: list[str], here: Path) -> list[str]:
    """Lines with a # for each number, one space for several, and dots for what a model has said."""
    found = []
    for line in lines:
        line = re.sub(r"^(  (?:prompt|before|after)(?! +\d+ \|) +)([+-]\d\S+ )?.*", r"\1\2...", line)
        line = re.sub(r"(?<!\w)[+-]?\d+(?:[.:]\d+)*", "#", line.replace(str(here), "{here}"))
        found.append(re.sub(r"w\d+$", "w#", re.sub(r"ZeRO-\d", "ZeRO-#", re.sub(" +", " ", line))))
    return found


def expected(*parts: str, ranks: str) -> list[str]:
    return "\n".join(part.strip("\n").replace("{ranks}", ranks) for part in parts).splitlines()


def test_a_log_has_the_runs_own_lines_and_no_others(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = write_experiment(tmp_path / "run.yaml", task_in(tmp_path))
    lines = recipe.run("--config", str(path)).succeeded().output.splitlines()
    assert plain(lines, tmp_path) == expected(FIRST, TITLE, PANEL, TRAINED, ranks=ONE)


@pytest.mark.thorough
def test_two_ranks_say_everything_once(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "run.yaml", task_in(tmp_path))
    lines = run_recipe(path, processes=2, stage=3, launcher=True).succeeded().output.splitlines()
    assert plain(lines, tmp_path) == expected(FIRST, TITLE, PANEL, TRAINED, ranks=TWO)


def test_on_a_terminal_bars_are_gone_and_lines_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars show without their delay, and phases last long enough for one."""
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    monkeypatch.setattr(texts, "around_lines", texts.around_lines)
    monkeypatch.setattr(_Script, "runs", True)
    task = task_in(tmp_path)
    slow = "import time\n" + (tmp_path / "reward.py").read_text().replace(
        "    shares = []", "    time.sleep(0.3)\n    shares = []"
    )
    (tmp_path / "reward.py").write_text(slow)
    with terminal() as written:
        run = prepare(experiment_from_dict(task))
        print_report(run.folder, run.train())
    (text,) = written
    for words in ("sampling", "scoring", "updating", "evaluation: scoring"):
        assert re.search(rf"\rrollout \d/2  {words}", text), f"no bar of {words}"
    lines = shown(text)
    rule = re.compile("─+")
    heading, closing = (number for number, line in enumerate(lines) if "──" in line)
    assert lines[heading].startswith(f"── PPO: {tmp_path}/model on {tmp_path}/prompts.jsonl")
    assert rule.fullmatch(lines.pop(closing)), "the panel ends before the first evaluation"
    assert closing - heading == len(expected(PANEL, ranks=ONE)) + 1
    assert plain(lines[1:], tmp_path) == [*expected(PANEL, TRAINED, ranks=ONE), ""]


def test_a_phase_whose_first_thing_is_long_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, refresh = threading.Event(), tqdm.refresh

    def seen(bar: Any, **options: Any) -> None:
        refresh(bar, **options)
        drawn.set()

    monkeypatch.setattr(tqdm, "refresh", seen)
    monkeypatch.setattr(texts, "around_lines", texts.around_lines)
    with terminal() as written:
        shows = progress.Progress(num_rollouts=5, updates_per_rollout=1, show=True)
        shows.begins("update_actor", 0)
        assert drawn.wait(60)
        shows.ends("update_actor")
    assert "rollout 1/5  updating" in written[0] and shown(written[0]) == [""]


def test_a_line_in_the_middle_of_a_bar_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    monkeypatch.setattr(texts, "around_lines", texts.around_lines)
    with terminal() as written:
        shows = progress.Progress(num_rollouts=5, updates_per_rollout=1, show=True)
        shows.begins("gen", 4)
        shows.advances()
        texts.say("reward judge: 1 of 4 calls failed")
        shows.advances()
        time.sleep(0.3)
        shows.on_tokens(3)
        shows.ends("gen")
        texts.say("the end")
    assert shown(written[0]) == ["reward judge: 1 of 4 calls failed", "the end", ""]
    assert "sampling" in written[0], "there was a bar"


def test_warnings_are_lines_of_the_runs_own_and_of_the_users_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from rlhf_toolkit.reporting.quiet import quiet_libraries

    monkeypatch.setattr(_Script, "runs", True)
    (tmp_path / "mine.py").write_text("import warnings\n\n\ndef f():\n    warnings.warn('no answer column')\n")
    names: dict[str, Any] = {}
    exec(compile((tmp_path / "mine.py").read_text(), str(tmp_path / "mine.py"), "exec"), names)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn_explicit("is deprecated", FutureWarning, str(Path(logging.__file__)), 3)
        warnings.warn_explicit("of a library we called", UserWarning, str(Path(progress.__file__)), 3)
        warnings.warn("rollout 3: the ratio is not 1", RunWarning, stacklevel=1)
        names["f"]()
    assert capsys.readouterr().err == (
        "warning: rollout 3: the ratio is not 1\nwarning at mine.py:5: UserWarning: no answer column\n"
    )


def test_no_library_draws_a_bar(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from rlhf_toolkit.reporting.quiet import quiet_libraries

    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    quiet_libraries()
    load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
    assert capfd.readouterr() == ("", "")
