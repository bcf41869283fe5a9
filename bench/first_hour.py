"""What does a newcomer's first hour cost, from a wheel in a fresh environment to a merged model?

    python bench/first_hour.py        # a quarter of an hour, three minutes of it pip's
    python bench/first_hour.py --smoke

Every command is typed on a terminal of its own, 100 columns wide, in a folder that holds nothing else. A row for each:
seconds to the first line and to the end, lines left on the screen, the exit status, and the last line.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import SMOKE, SMOLLM, TINY, keep, model_folder

ROOT = Path(__file__).parents[1]
SIZE = (40, 100)
"""Rows and columns of the terminal."""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CTRL_C, CTRL_D = "\x03", "\x04"
LIMIT = 1200
HEADER = ["typed", "seconds to the first line", "seconds", "lines", "status"]


@dataclass(frozen=True)
class Step:
    """A command and what is typed while it runs: ``keys``, as soon as ``at`` stands on the screen."""

    command: str
    keys: str = ""
    at: str = ""
    status: int = 0


def steps(model: str) -> Iterator[Step]:
    """The hour, as docs/start.md tells it."""
    yield Step("rlhf --version")
    yield Step(f"rlhf init --model {model}")
    yield Step("rlhf check")
    yield Step("rlhf train ppo.kl_coeff=0.1", status=1)
    yield Step("rlhf train", CTRL_C, at="rollout 2/5", status=130)
    yield Step("rlhf train --resume")
    yield Step("rlhf report runs/first")
    yield Step("rlhf card runs/first")
    yield Step(f"rlhf chat {model} runs/first/policy --max-new-tokens 16", f"What is 2 + 3?\n{CTRL_D}", at="/quit")
    yield Step("rlhf evaluate experiment.yaml base runs/first/policy --set data.evaluation=train.jsonl")
    yield Step(f"rlhf merge {model} runs/first/policy merged --verify 2")
    yield Step('python -c "import rlhf_toolkit"')
    yield Step('python -c "from rlhf_toolkit import PPOTrainer"')


def typed(step: Step, home: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a step on a terminal. Raises SystemExit where it ends otherwise than it should."""
    began, first, seen, waits = time.perf_counter(), None, b"", bool(step.keys)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(home)
        os.execvpe("bash", ["bash", "-c", f"exec {step.command}"], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    while time.perf_counter() - began < LIMIT:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            more = os.read(terminal, 1 << 16)
        except OSError:  # Linux's way to say that nobody holds the other end any more
            more = b""
        if not more:
            break
        first = first or time.perf_counter() - began
        seen += more
        if waits and step.at in seen.decode(errors="replace"):
            os.write(terminal, step.keys.encode())
            waits = False
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    lines = screen(seen.decode(errors="replace"))
    row = {"typed": step.command, "status": status, "seconds": time.perf_counter() - began, "first_line": first}
    if status != step.status:
        raise SystemExit(f"{step.command} ended with {status} instead of {step.status}:\n" + "\n".join(lines))
    return {**row, "lines": len(lines), "last": lines[-1] if lines else "", "screen": lines}


def screen(text: str) -> list[str]:
    """What is left on a terminal of what was written there: of a line that was drawn again its last state."""
    left = []
    for line in ESCAPES.sub("", text).replace("\r\n", "\n").split("\n"):
        states = [state for state in line.split("\r") if state.strip()]
        left.append(states[-1].rstrip() if states else "")
    while left and not left[-1]:
        left.pop()
    return left


def fresh_environment(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """An environment with the wheel of this checkout and what it asks for, and the row of its installation. For a smoke
    test the libraries are this environment's."""
    run = subprocess.check_call
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("*.whl")
    where = folder / "environment"
    began = time.perf_counter()
    run([sys.executable, "-m", "venv", *(["--system-site-packages"] if SMOKE else []), str(where)])
    words = ["--no-deps"] if SMOKE else ["--constraint", str(ROOT / "constraints-cpu.txt")]
    pip = [str(where / "bin/python"), "-m", "pip", "install", "--quiet", *words, str(wheel)]
    run(pip)
    if SMOKE:
        (packages,) = where.glob("lib/python*/site-packages")
        (packages / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("packages")))
    row = {"typed": "pip install rlhf_toolkit-*.whl", "status": 0, "seconds": time.perf_counter() - began, "lines": 0}
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return {**inherited, "PATH": f"{where / 'bin'}:{os.environ['PATH']}", "TERM": "xterm"}, row


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in docs/start.md."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for row in rows:
        first = "" if row.get("first_line") is None else f"{row['first_line']:.1f}"
        lines.append([f"`{row['typed']}`", first, f"{row['seconds']:.1f}", str(row["lines"]), str(row["status"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    model = model_folder(TINY if SMOKE else SMOLLM)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name, "home")
        home.mkdir()
        environment, installed = fresh_environment(Path(name))
        rows = [installed]
        for step in steps(shlex.quote(model)):
            rows.append(typed(step, home, environment))
            print(json.dumps({key: rows[-1][key] for key in ("typed", "seconds", "lines", "last")}), file=sys.stderr)
            for key in ("typed", "last"):
                rows[-1][key] = rows[-1][key].replace(model, "MODEL")
            rows[-1]["screen"] = [line.replace(model, "MODEL") for line in rows[-1]["screen"]]
    print(as_markdown(rows), file=sys.stderr)
    keep("first_hour", rows)


if __name__ == "__main__":
    main()
