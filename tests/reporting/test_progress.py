"""The lines and the bars of a run, against a tqdm that notes what it is told."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlhf_toolkit import texts
from rlhf_toolkit.reporting import progress as module
from rlhf_toolkit.reporting.progress import Progress

ARGUMENTS: Any = TrainingArguments(output_dir="unused", report_to="none")


class Bar:
    """tqdm's part that is used."""

    made: list[Bar]

    @staticmethod
    def external_write_mode(file: object) -> AbstractContextManager[None]:
        return nullcontext()

    def __init__(self, **options: Any) -> None:
        self.options, self.total, self.n, self.postfix, self.closed = options, options["total"], 0, "", False
        Bar.made.append(self)

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.postfix = text

    def update(self, count: int) -> None:
        self.n += count

    def refresh(self) -> None:
        assert not self.closed, "a bar that is over must not come back"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def with_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, and a clock that gains two seconds at each look."""
    ticks = iter(range(0, 1000, 2))
    Bar.made = []
    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(module, "on_terminal", lambda: True)
    monkeypatch.setattr(texts, "around_lines", texts.around_lines)


def say(progress: Progress, step: int, **logs: float) -> None:
    """A record of Trainer's; ``__`` stands for a slash."""
    record = {name.replace("__", "/"): value for name, value in logs.items()}
    progress.on_log(ARGUMENTS, TrainerState(global_step=step), TrainerControl(), record)


def of_five(**options: Any) -> Progress:
    return Progress(**{"num_rollouts": 5, "updates_per_rollout": 4, "show": True, **options})


def test_each_phase_has_a_bar_that_is_gone_at_its_end(with_bars: None) -> None:
    progress = of_five()
    progress.begins("gen", 3)
    progress.on_tokens(8)
    progress.advances()
    progress.on_tokens(8)
    (sampling,) = Bar.made
    assert (sampling.options["desc"], sampling.total, sampling.n) == ("rollout 1/5  sampling", 3, 1)
    assert sampling.postfix == "16 tokens, 8 tok/s" and not sampling.options["leave"]
    progress.ends("gen")
    assert sampling.closed
    for _ in range(4):
        progress.begins("update_actor", 0)
        progress.ends("update_actor")
    updating = Bar.made[1]
    assert (updating.options["desc"], updating.total, updating.n) == ("rollout 1/5  updating", 4, 4)
    assert updating.closed and len(Bar.made) == 2, "one bar for all updates of a rollout"


def test_phases_of_an_evaluation_say_so(with_bars: None) -> None:
    progress = of_five()
    progress.begins("testing", 0)
    progress.begins("gen", 3)
    progress.ends("gen")
    progress.ends("testing")
    progress.begins("gen", 3)
    words = ["evaluation: evaluating", "evaluation: sampling", "sampling"]
    assert [bar.options["desc"] for bar in Bar.made] == [f"rollout 1/5  {each}" for each in words]
    progress.on_train_end(ARGUMENTS, TrainerState(), TrainerControl())
    assert all(bar.closed for bar in Bar.made)


def test_a_run_of_steps_has_one_bar_for_all_of_them(with_bars: None) -> None:
    progress = of_five(unit="step", updates_per_rollout=1)
    for step in range(3):
        progress.on_step_begin(ARGUMENTS, TrainerState(global_step=step), TrainerControl())
    (bar,) = Bar.made
    assert (bar.total, bar.n) == (5, 2)


def test_without_a_terminal_there_are_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    progress = of_five()
    progress.begins("gen", 3)
    progress.on_tokens(8)
    progress.advances()
    progress.ends("gen")
    assert progress._bar is None and capsys.readouterr() == ("", "")


def test_a_rollout_and_an_evaluation_have_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    progress = of_five()
    say(progress, 0, eval__score__mean=0.3, timing_s__testing=1.0)
    say(progress, 4, train__loss=0.1, critic__score__mean=0.25, timing_s__step=60.0)
    say(progress, 4, eval__score__mean=0.3, eval__ref_kl=1.0, timing_s__testing=1.5)
    say(progress, 8, train__loss=0.1, critic__score__mean=0.5, timing_s__step=20.0)
    say(progress, 20, train__loss=0.1, timing_s__step=20.0)
    progress.on_log(ARGUMENTS, TrainerState(global_step=20), TrainerControl(), {"train_runtime": 3.0})
    assert capsys.readouterr().out.splitlines() == [
        "evaluation after rollout 0/5  score    0.30     1.0 s",
        "rollout 1/5  score    0.25    60.0 s  left 0:04:00",
        "evaluation after rollout 1/5  score    0.30  kl    1.00     1.5 s",
        "rollout 2/5  score    0.50    20.0 s  left 0:02:00",
        "rollout 5/5    20.0 s",
    ]


def test_a_run_of_many_steps_has_twenty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = of_five(num_rollouts=201, updates_per_rollout=1, unit="step")
    for step in range(1, 202):
        say(progress, step, train__loss=2.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21 and lines[0].startswith("step  10/201  loss    2.00  left ")
    assert lines[-1] == "step 201/201  loss    2.00"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = of_five(show=False)
    say(progress, 4, train__loss=0.1, timing_s__step=7.5)
    assert capsys.readouterr() == ("", "")
