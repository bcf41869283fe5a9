"""The GPU exam, rehearsed on the CPU: a first hour on a GPU must not be lost to the exam itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.launch import ROOT, environment_of_tests

sys.path.insert(0, str(ROOT / "bench"))
import gpu_exam
import gpu_wheels


@pytest.mark.thorough
def test_the_whole_exam_passes_its_rehearsal(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu_exam.py", "--rehearse", "--seconds", "1200", "--patience", "8"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment_of_tests(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + (tmp_path / "exam.log").read_text()[-8000:]
    sections = json.loads((tmp_path / "exam.json").read_text())["sections"]
    assert list(sections) == [section.name for section in gpu_exam.SECTIONS if section.listed]
    missing = [name for name in ("update", "ratio", "ppo", "attention") if not sections[name]["checks"]]
    assert not missing
    assert sections["decode"]["figures"]["tiny"]["tokens_per_second"] > 0
    assert sections["rate"]["figures"]["tiny"]["tflop_per_s"] > 0


def test_a_rehearsal_leaves_the_results_of_a_card_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def folder(*words: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["gpu_exam.py", *words])
        return gpu_exam.results_folder(gpu_exam.arguments())

    rehearsed = folder("--rehearse", "--only", "ratio")
    assert rehearsed.is_dir() and rehearsed.parent == tmp_path and str(rehearsed) in capsys.readouterr().out
    assert folder("--rehearse", "--out", str(tmp_path / "named")) == tmp_path / "named"
    assert folder() == gpu_exam.RESULTS


def stand_in(tmp_path: Path, code: str, limit: float) -> str | None:
    with (tmp_path / "log").open("wb") as log:
        return gpu_exam.limited([sys.executable, "-c", code], {}, log, limit)


@pytest.mark.thorough
def test_a_section_that_fails_or_hangs_says_so_and_leaves_no_process_behind(tmp_path: Path) -> None:
    import psutil

    assert stand_in(tmp_path, "pass", 60) is None
    assert stand_in(tmp_path, "raise SystemExit(3)", 60) == "error (3)"
    hanging = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    assert stand_in(tmp_path, hanging, 15) == "timed out"
    child = int((tmp_path / "child").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait(timeout=60)  # it was killed, and may still be going


def test_what_is_not_a_number_passes_no_check(tmp_path: Path) -> None:
    from exam.subject import Report

    report = Report(tmp_path / "found.json")
    for found in (0.5, 1.5, float("nan")):
        report.check("distance", found, 1.0)
    assert [check["passed"] for check in json.loads(report.file.read_text())["checks"]] == [True, False, False]


def test_each_wheel_is_named_once_and_those_the_toolkit_needs_are_there() -> None:
    names = [*gpu_wheels.WHEELS, *gpu_wheels.BUILT]
    assert len({name.partition("=")[0] for name in names}) == len(names)
    assert {"deepspeed==0.19.8", "peft==0.21.2", "datasets==5.2.0"} <= set(names)
