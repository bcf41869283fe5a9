"""What a rank leaves for its launcher, and what the launcher makes of what all have left."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_toolkit.errors import ConfigError, RewardError, reported
from rlhf_toolkit.last_words import COMMAND, ERROR_FILE, LAUNCHER, command_of_rlhf, leave, left_in, say_last


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of two ranks of ``rlhf train``, as torchelastic names them."""
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    folders = [tmp_path / "attempt_0" / str(rank) for rank in range(2)]
    for folder in folders:
        folder.mkdir(parents=True)
    return [folder / "error.json" for folder in folders]


def test_under_rlhf_train_a_rank_leaves_its_line_and_says_nothing(
    ranks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(COMMAND, json.dumps(["rlhf", "train", "x.yaml"]))
    assert command_of_rlhf() == ["rlhf", "train", "x.yaml"]
    assert left_in(tmp_path) == ("", [])
    for place in ranks:
        monkeypatch.setenv(ERROR_FILE, str(place))
        with pytest.raises(SystemExit) as caught, reported():
            raise ConfigError("no \x1b[31mgood")
        assert caught.value.code == 1
    assert capsys.readouterr().err == ""
    assert left_in(tmp_path) == ("ConfigError: no \\x1b[31mgood", [])


def test_the_first_word_counts_and_a_rank_that_failed_alone_is_named(
    ranks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMMAND, "[]")
    for rank, lines in ((1, ("the cause", "what came of it")), (0, ("rank 1 failed: the cause",))):
        monkeypatch.setenv(ERROR_FILE, str(ranks[rank]))
        monkeypatch.setenv("RANK", str(rank))
        for line in lines:
            say_last(line, "its stack")
    assert left_in(tmp_path) == ("[rank 1] the cause", ["its stack"])
    ranks[1].write_text(ranks[1].read_text()[:-10])  # it was killed meanwhile
    assert left_in(tmp_path) == ("rank 1 failed: the cause", ["its stack"])


def test_under_another_launcher_it_says_it_and_leaves_it_in_torchelastics_words(
    ranks: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.delenv(LAUNCHER)
    monkeypatch.setenv(ERROR_FILE, str(ranks[0]))
    with pytest.raises(SystemExit), reported():
        try:
            raise LookupError("nobody knows")
        except LookupError as error:
            raise RewardError("reward f raised LookupError: nobody knows") from error
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Traceback (most recent call last):" and "LookupError: nobody knows" in said
    assert said[-1] == "RewardError: reward f raised LookupError: nobody knows"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(ranks[0]))
    assert "traceback : RewardError: reward f raised LookupError: nobody knows\n" in str(
        ChildFailedError("recipes/ppo.py", {0: failure})
    )


def test_a_process_that_a_rank_has_started_speaks_for_itself(
    ranks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has its rank's environment, and would put its own end in the place of its rank's."""
    monkeypatch.setenv(ERROR_FILE, str(ranks[0]))
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))
    say_last("only a command within a reward")
    assert capsys.readouterr().err == "only a command within a reward\n"
    assert left_in(tmp_path) == ("", [])


def test_a_line_is_there_as_a_whole_or_not_at_all(
    ranks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second thread that finds it may end the process at once, and torchelastic fails on half a file."""
    monkeypatch.setenv(ERROR_FILE, str(ranks[1]))
    monkeypatch.setenv("RANK", "3")  # the second of the second machine
    lines = [f"thread {number} " + "x" * 10**6 for number in range(4)]

    def say(line: str) -> str:
        assert leave(line)
        return str(json.loads(ranks[1].read_text())["message"]["message"])

    with ThreadPoolExecutor(4) as threads:
        (found,) = set(threads.map(say, lines))
    assert found in lines and os.listdir(ranks[1].parent) == ["error.json"]
    ranks[0].write_text(ranks[1].read_text().replace('"rank": "3"', '"rank": "2"').replace(found, "another"))
    assert left_in(tmp_path)[0] in ("[rank 2] another", f"[rank 3] {found}")


def test_a_rank_s_name_stands_before_its_line_and_not_before_the_stack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    say_last("the cause", "its\nstack")
    assert capsys.readouterr().err == "\nits\nstack\n[rank 1] the cause\n"


def test_what_nobody_foresaw_keeps_its_stack(
    ranks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ``rlhf train`` above the line, once; elsewhere Python prints it."""
    with pytest.raises(ZeroDivisionError), reported():
        _ = 1 // 0
    monkeypatch.setenv(COMMAND, "[]")
    monkeypatch.setenv(ERROR_FILE, str(ranks[0]))
    with pytest.raises(SystemExit), reported():
        _ = 1 // 0
    line, (stack,) = left_in(tmp_path)
    assert (
        line.startswith("ZeroDivisionError: integer division") and stack.startswith("Traceback") and "1 // 0" in stack
    )


def test_an_early_interrupt_is_a_line_and_no_stack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, told in (("0", "stopped by SIGINT before there was anything to keep; start it again\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught, reported():
            raise KeyboardInterrupt
        assert caught.value.code == 130 and capsys.readouterr().err == told
