"""The exam that the toolkit takes wherever a GPU is at hand, before anything else is done there.

    python bench/gpu_exam.py --wheels .gpu_wheels      # at most 9 minutes on one H100 or H200, without network
    python bench/gpu_exam.py --rehearse                # all of it on a CPU at tiny shapes, in a minute and a half

Result in bench/results/gpu/exam.json, written anew after each section; what the sections printed is in exam.log beside
it. A rehearsal's go to a temporary folder, whose path it prints; ``--out`` names another. Each section is a process of
its own with a time limit, in the order of their importance, so that one that fails or hangs costs itself only.
``--wheels`` installs what ``bench/gpu_wheels.py`` gathered into a folder of its own, and leaves the machine's packages
as they are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results/gpu"
SECONDS = 540
LEAST = 15  # seconds that a section must have left to be begun


@dataclass(frozen=True)
class Section:
    """``function`` of ``module`` is given ``seconds`` at most."""

    name: str
    module: str
    seconds: int
    listed: bool = True


SECTIONS = (
    Section("environment", "exam.agreement", 90),
    Section("kernels", "exam.agreement", 30),
    Section("update", "exam.agreement", 90),
    Section("ratio", "exam.running", 90),
    Section("seven_billion", "exam.speed", 90),
    Section("quantised_ppo", "exam.running", 150),
    Section("ppo", "exam.running", 150),
    Section("attention", "exam.agreement", 75),
    Section("decode", "exam.speed", 180),
    Section("rate", "exam.speed", 75),
    Section("trl", "exam.running", 120),
    Section("update_other", "exam.agreement", 90, listed=False),
)


def main() -> None:
    options = arguments()
    if options.section:
        run_section(options)
        return
    options.out = results_folder(options)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        children = environment(options)
        sections = [s for s in SECTIONS if s.listed and s.name in (options.only or [s.name])]
        found: dict[str, Any] = {}
        for section in sections:
            left = options.seconds - (time.monotonic() - began)
            found[section.name] = examined(section, options, children, left)
            keep(options, found, time.monotonic() - began)
            print(line(section.name, found[section.name]), flush=True)
    print(table(found), flush=True)
    sys.exit(0 if all(one["status"] in ("passed", "left out") for one in found.values()) else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny shapes")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first, without network")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for everything; default: %(default)s")
    parser.add_argument("--patience", type=float, default=1.0, help="sections' own limits times this; default: 1")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}, of a rehearsal a temporary folder")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in SECTIONS if s.listed], help="only these sections")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def results_folder(options: argparse.Namespace) -> Path:
    """Where the results go, made if need be: a rehearsal never touches those of a card, unless it is told to."""
    if options.out is None and options.rehearse:
        folder = Path(tempfile.mkdtemp(prefix="gpu_exam_"))
        print(f"results of this rehearsal: {folder}", flush=True)
        return folder
    folder = options.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What every section's process finds: this checkout's package, the wheels, no network, and CUDA's compiler, which
    DeepSpeed looks for although nothing is built with it."""
    site = [str(install(options))] if options.wheels else []
    paths = [str(ROOT / "src"), *site, os.environ.get("PYTHONPATH", "")]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([*(f"{folder}/bin" for folder in site), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "DS_BUILD_OPS": "0",
        "HF_HOME": str(options.work / "hf"),
        "MPLBACKEND": "agg",
    }
    for transport in ("NCCL", "GLOO"):  # one machine, perhaps without any network
        found.setdefault(f"{transport}_SOCKET_IFNAME", "lo")
    if options.rehearse:
        found |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        found.setdefault("OMP_NUM_THREADS", "2")
        build = [sys.executable, "-m", "rlhf_toolkit.distributed.extensions"]
        subprocess.run(build, env=found, check=True)  # a minute where it is new, which no section should wait for
        return found
    compiler = shutil.which("nvcc", path=f"/usr/local/cuda/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if compiler is not None:
        found.setdefault("CUDA_HOME", str(Path(compiler).resolve().parents[1]))
    return found


def install(options: argparse.Namespace) -> Path:
    """A folder with what the wheels hold."""
    folder: Path = options.work / "site"
    wheels = sorted(map(str, options.wheels.glob("*.whl")))
    if not wheels:
        sys.exit(f"--wheels {options.wheels} holds no wheels; gather them with python bench/gpu_wheels.py")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--no-cache-dir", "--target", str(folder), *wheels], check=True)
    return folder


# ---- sections --------------------------------------------------------------------------------------------------------


def examined(section: Section, options: argparse.Namespace, children: dict[str, str], left: float) -> dict[str, Any]:
    """What a section found, how it ended, and how long it took; ``left`` seconds are there at most."""
    if left < LEAST:
        return {"status": "left out", "seconds": 0.0, "why": f"{left:.0f} s were left"}
    limit = min(section.seconds * options.patience, left)
    command = [sys.executable, __file__, "--section", section.name, "--work", str(options.work)]
    command += ["--seconds", str(int(limit)), *(["--rehearse"] if options.rehearse else [])]
    began = time.monotonic()
    with (options.out / "exam.log").open("ab") as log:
        log.write(f"\n======== {section.name} ========\n".encode())
        log.flush()
        ended = limited(command, children, log, limit)
    file = options.work / f"{section.name}.json"
    found = json.loads(file.read_text()) if file.is_file() else {"figures": {}, "checks": []}
    failed = [check for check in found["checks"] if not check["passed"]]
    status = ended or ("failed" if failed else "left out" if "left_out" in found["figures"] else "passed")
    return {"status": status, "seconds": round(time.monotonic() - began, 1), **found}


def limited(command: list[str], children: dict[str, str], log: Any, limit: float) -> str | None:
    """Run ``command`` for ``limit`` seconds at most; None where it ended well. What it has started ends with it: a
    worker of torchrun has a session of its own, so a group would not hold it, and it would keep the GPU."""
    import psutil

    process = psutil.Popen(command, env=children, stdout=log, stderr=log, cwd=ROOT)
    try:
        status = process.wait(timeout=limit)
        return None if status == 0 else f"error ({status})"
    except psutil.TimeoutExpired:
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        return "timed out"


def run_section(options: argparse.Namespace) -> None:
    """One section, in this process; shortly before its limit every thread's stack goes to the log."""
    import faulthandler

    faulthandler.dump_traceback_later(max(5, options.seconds - 3))
    from exam.subject import TINY, WHOLE, Exam, Report

    section = next(each for each in SECTIONS if each.name == options.section)
    report = Report(options.work / f"{section.name}.json")
    exam = Exam(TINY if options.rehearse else WHOLE, options.work, report)
    getattr(importlib.import_module(section.module), section.name)(exam)
    faulthandler.cancel_dump_traceback_later()


# ---- what is kept ----------------------------------------------------------------------------------------------------


def keep(options: argparse.Namespace, found: dict[str, Any], seconds: float) -> None:
    """Everything so far, as JSON; figures are cut to four digits."""
    from common import commit, rounded

    words = [word for word in sys.argv[1:] if not word.startswith("/")]
    result = {
        "command": " ".join(["python", "bench/gpu_exam.py", *words]),
        "commit": commit(),
        "rehearsal": options.rehearse,
        "seconds": seconds,
        "sections": found,
    }
    (options.out / "exam.json").write_text(json.dumps(rounded(result), indent=1) + "\n")


def line(name: str, found: dict[str, Any]) -> str:
    """A section's row of the table."""
    checks = found.get("checks", [])
    passed = sum(check["passed"] for check in checks)
    return f"{name:12} {found['status']:12} {found['seconds']:6.1f} s   {passed} of {len(checks)} checks"


def table(found: dict[str, Any]) -> str:
    """All rows, and under them what did not pass."""
    rows = ["", *(line(name, one) for name, one in found.items())]
    for name, one in found.items():
        for check in one.get("checks", []):
            if not check["passed"]:
                rows.append(f"  {name}: {check['what']}: {check['found']}, at most {check['most']}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
