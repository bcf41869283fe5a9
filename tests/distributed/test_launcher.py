"""accelerate's launcher under ``rlhf train``: what is on the screen when ranks end, one way or another, and that
nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from rlhf_toolkit.distributed import launcher
from tests.support.launch import build_op
from tests.support.processes import ROOT, environment_of_tests, run
from tests.support.tiny import merged, write_experiment, write_task

RANK = """
import os, signal, sys, time
from rlhf_toolkit.errors import ConfigError, StopAskedError, reported

how, rank = sys.argv[1], os.environ.get("RANK", "0")
os.write(1, f"here is rank {rank}\\n".encode())
with reported():
    if how == "all":
        raise ConfigError("no good")
    if how == "one" and rank == "1":
        raise ConfigError("no good here")
    if how == "bug":
        1 // 0
    if how == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "killed":
        time.sleep(1)
        raise ConfigError("another rank is gone")
    if how == "stopped":
        error = StopAskedError("stopped by SIGTERM after update 3; continue with THIS")
        error.status = 143
        raise error
    if how != "well":
        time.sleep(120)
"""
DRIVER = """
import os, sys, tempfile
from pathlib import Path
from typing import Any
from rlhf_toolkit.distributed.launcher import launch

os.environ["RLHF_COMMAND"] = "[]"
tempfile.tempdir = sys.argv[3]
for how in sys.argv[4:]:
    status = launch(Path(sys.argv[1]), [how], ["--config_file", sys.argv[2]])
    print("==", how, status, len(os.listdir(tempfile.tempdir)), file=sys.stderr, flush=True)
"""


def test_a_rank_that_was_killed_is_named_and_not_what_came_of_it(tmp_path: Path) -> None:
    """The others find a partner gone, or are asked to stop by torchelastic, and say that."""

    def failed(*ranks: tuple[int, int, float | None]) -> ChildFailedError:
        failures = {}
        for rank, code, word in ranks:
            place = tmp_path / f"{rank}.json"
            place.unlink(missing_ok=True)
            if word is not None:
                about = {"timestamp": str(int(time.time() + word))}
                place.write_text(json.dumps({"message": {"message": "a word", "extraInfo": about}}))
            failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(place))
        return ChildFailedError("ppo.py", failures)

    for ranks, named in (
        ([(1, -9, None), (0, 1, 3.0)], (1, -9)),  # "another rank has ended without a word"
        ([(1, -9, None), (0, 143, 0.0)], (1, -9)),  # "stopped by SIGTERM", which was torchelastic's
        ([(0, -11, None), (1, -15, None)], (0, -11)),
        ([(0, 1, -1.0), (1, -6, None)], None),  # gloo aborts where the other has ended
        ([(0, 1, -600.0), (1, -9, None)], None),  # torchelastic's patience is over
        ([(0, 143, 0.0), (1, -15, None)], None),
        ([(0, 3, None), (1, -15, None)], None),
    ):
        assert launcher._killed(failed(*ranks)) == named, ranks
    line = launcher._unexplained(failed((1, -15, None), (0, 3, None)), tmp_path / "launcher.log")
    assert line.startswith("TopologyError: rank 0 was ended by status 3; start it again, with --resume where ")
    assert launcher._killed(None) is None and launcher._killed(ValueError()) is None


@pytest.mark.thorough
def test_the_screen_ends_with_one_line_however_ranks_end(tmp_path: Path) -> None:
    """Nothing else is there but what ranks print; the launcher's folder stays only where nobody has said why."""
    script, driver, kept = tmp_path / "rank.py", tmp_path / "driver.py", tmp_path / "kept"
    script.write_text(RANK)
    driver.write_text(DRIVER)
    kept.mkdir()
    cases = ("well", "all", "one", "bug", "stopped", "killed")
    config = str(ROOT / "accelerate_configs/cpu_zero3.yaml")
    command = [sys.executable, str(driver), str(script), config, str(kept), *cases]
    ended = run(command, seconds=300, PYTHONPATH=str(ROOT / "src")).succeeded()
    told = re.split(r"== (\w+) (\d+) (\d+)\n", re.sub(r"here is rank \d\n|\n(?=\[rank)", "", ended.output))
    found = {told[i + 1]: (told[i].strip(), int(told[i + 2]), int(told[i + 3])) for i in range(0, len(told) - 1, 4)}
    assert found["well"] == ("", 0, 0)
    assert found["all"] == ("ConfigError: no good", 1, 0)
    assert found["one"] == ("ConfigError: no good here", 1, 0)
    assert found["stopped"] == ("stopped by SIGTERM after update 3; continue with THIS", 143, 0)
    stack = found["bug"][0].splitlines()
    assert stack[0].startswith("Traceback") and stack[-1].startswith("ZeroDivisionError") and found["bug"][1:] == (1, 0)
    assert sum("Traceback" in line for line in stack) == 1
    line, status, left = found["killed"]
    pattern = r"TopologyError: rank 1 was ended by SIGKILL, as the system does where memory runs out; .*: (\S+)"
    (log,) = re.fullmatch(pattern, line).groups()  # type: ignore[union-attr]
    assert (status, left) == (1, 1) and "ChildFailedError" in Path(log).read_text()


def test_a_run_under_nohup_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchelastic takes SIGHUP for itself, and would end a run that was started to go on."""
    started = list[Any]()
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    monkeypatch.setattr(launcher, "_end_children", lambda: None)
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, handler)
            assert launcher._accelerate(["recipe.py"]) is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "SIGHUP" not in started[0].signals_to_handle and not hasattr(started[1], "signals_to_handle")
    from accelerate.utils.launch import _filter_args
    from torch.distributed.run import get_args_parser

    taken = _filter_args(started[0], get_args_parser(), ["recipe.py"])
    assert taken.signals_to_handle == "SIGTERM,SIGINT,SIGQUIT"


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone; of one without a parent that looks after it a zombie may stay."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(happened: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.thorough
def test_a_run_is_suspended_stopped_and_continued_by_the_command_it_gives(tmp_path: Path) -> None:
    """Two ranks under real ZeRO-3: Ctrl-Z stops them with the launcher, Ctrl-C keeps a checkpoint, ends all of them and
    says how to go on, by a command that can be given as it stands. A launcher that is killed leaves nobody behind."""
    build_op()
    task = merged(write_task(tmp_path), {"ppo.num_rollouts": 400, "run.output_dir": "out"})
    write_experiment(tmp_path / "my.yaml", task)
    environment = {**environment_of_tests(), "PYTHONPATH": str(ROOT / "src")}
    rlhf = [sys.executable, "-m", "rlhf_toolkit.cli"]
    log = tmp_path / "out/log.jsonl"

    def start(words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*rlhf, *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    process = start(["train", "my.yaml", "--processes", "2", "--run.samples", "1"])
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2)
    ranks = children_of(process)
    os.kill(process.pid, signal.SIGTSTP)
    wait_for(lambda: all(rank.status() == psutil.STATUS_STOPPED for rank in ranks))
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: not any(rank.status() == psutil.STATUS_STOPPED for rank in ranks))
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    done = log.read_text().count("\n")
    assert process.returncode == 130 and all(map(has_ended, ranks)), output[-2000:]
    last = output.splitlines()[-1]
    found = re.fullmatch(r"stopped by SIGINT after update \d+, with a checkpoint; continue with rlhf (.*)", last)
    assert found and "Traceback" not in output and "elastic" not in output, output[-2000:]
    assert found[1] == "train my.yaml --processes 2 --run.samples 1 --resume"
    again = start(found[1].split())
    wait_for(lambda: log.read_text().count("\n") > done + 1)
    ranks = children_of(again)
    again.kill()
    output, _ = again.communicate(timeout=120)  # the ranks have the pipe, too
    assert all(map(has_ended, ranks))
    assert "stopped by SIGTERM after update " in output and "Traceback" not in output, output[-2000:]
    done = log.read_text().count("\n")
    last_one = start([*found[1].split(), f"ppo.num_rollouts={done + 1}"])
    output, _ = last_one.communicate(timeout=240)
    assert last_one.returncode == 0, output[-2000:]
    assert [json.loads(line)["rollout"] for line in log.read_text().splitlines()] == list(range(1, done + 2))
