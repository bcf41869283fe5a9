"""Plays one case in a process of its own, forked from one that has imported everything, and says how it ended."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainerCallback

from rlhf_toolkit.errors import RLHFError
from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import load_experiment
from tests.fuzz.cases import Case
from tests.fuzz.values import KINDS

RAN, REFUSED, BARE, HUNG, DIED, MANY_LINES = "ran", "refused", "bare traceback", "hung", "died", "more than a line"
NO_UPDATE, ACCEPTED = "no update", "accepted wrongly"
GOOD = (RAN, REFUSED)
UPDATES = 2
MOST_PER_ROLLOUT = 8
MOST_BYTES = 12 * 2**30
LONGEST_MESSAGE = 2000


@dataclass
class Outcome:
    """How a case ended, with the message or the traceback; of a run also what it left, as a hash."""

    how: str
    text: str = ""
    left: str = ""


class _EnoughError(Exception):
    """A rollout has more updates than anybody waits for."""


class _Stop(TrainerCallback):
    """Ends a run after a whole rollout, so that it evaluates and saves as one does that is at its end."""

    def __init__(self, updates_per_rollout: int) -> None:
        self.per_rollout = updates_per_rollout

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.per_rollout > MOST_PER_ROLLOUT and state.global_step >= UPDATES:
            raise _EnoughError
        if state.global_step >= UPDATES and state.global_step % self.per_rollout == 0:
            control.should_training_stop = True


def start(case: Case, fixtures: Path, folder: Path) -> int:
    """Fork a process that plays ``case`` in ``folder`` and leaves the outcome there; its id."""
    child = os.fork()
    if child == 0:
        _become(case, fixtures, folder)
    return child


def outcome(case: Case, folder: Path, status: int | None) -> Outcome:
    """What a process left that ended with ``status``; None: it was ended at the time limit."""
    log = (folder / "output.txt").read_text(errors="replace") if (folder / "output.txt").exists() else ""
    if status is None:
        return Outcome(HUNG, log[-3000:])
    file = folder / "outcome.json"
    if not file.exists():
        return Outcome(DIED, f"status {status}\n{log[-3000:]}")
    found = Outcome(**json.loads(file.read_text()))
    if case.wrong and found.how == RAN:
        return Outcome(ACCEPTED, f"{case.wrong}={case.changes[case.wrong]!r} had to be refused")
    return found


def _become(case: Case, fixtures: Path, folder: Path) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        found = play(case, fixtures, folder)
        (folder / "outcome.json").write_text(json.dumps(asdict(found)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def play(case: Case, fixtures: Path, folder: Path) -> Outcome:
    """Run the case as a recipe would, up to ``UPDATES`` updates."""
    places = {"HERE": str(fixtures), "TRAIN": str(folder / "rows.jsonl"), "OUT": str(folder / "run")}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    (folder / "settings.yaml").write_text(yaml.safe_dump(nested(case, {**places, "ROWS": places["TRAIN"]})))
    began = time.perf_counter()
    try:
        experiment = load_experiment(folder / "settings.yaml", {}, KINDS[case.kind])
        updates_per_rollout = experiment.updates_per_rollout if isinstance(experiment, Experiment) else 1
        run: Any = prepare(experiment) if isinstance(experiment, Experiment) else prepare_fine_tuning(experiment)
        run.trainer.add_callback(_Stop(updates_per_rollout))
        with suppress(_EnoughError):
            run.train()
    except RLHFError as error:
        text = str(error)
        one_line = "\n" not in text and 10 < len(text) <= LONGEST_MESSAGE
        return Outcome(REFUSED if one_line else MANY_LINES, f"{type(error).__name__}: {text}")
    except Exception:
        return Outcome(BARE, traceback.format_exc())
    done, wanted = run.trainer.state.global_step, run.trainer.state.max_steps
    stopped = getattr(getattr(experiment, "alarms", None), "stop", False)
    if done == 0 or (done < min(UPDATES, wanted) and not stopped):
        return Outcome(NO_UPDATE, f"{done} of {wanted} updates")
    return Outcome(RAN, f"{time.perf_counter() - began:.2f} s", left(folder))


def nested(case: Case, places: dict[str, str]) -> dict[str, Any]:
    """The sections of the settings file, with paths in the place of their names."""
    sections: dict[str, Any] = {}
    for name, value in case.changes.items():
        section, dot, key = name.partition(".")
        value = _placed(value, places)
        if not dot:
            sections[section] = value
        elif isinstance(sections.setdefault(section, {}), dict):
            sections[section][key] = value
    return sections


def _placed(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, path in places.items():
            if value == name or value.startswith(f"{name}/"):
                return path + value.removeprefix(name)
    if isinstance(value, list):
        return [_placed(item, places) for item in value]
    return {key: _placed(item, places) for key, item in value.items()} if isinstance(value, dict) else value


def left(folder: Path) -> str:
    """A hash of what a run wrote and said, without times, paths and the settings themselves."""
    digest = hashlib.sha256()
    for path in sorted((folder / "run").rglob("*")):
        if path.is_file() and path.name not in ("run.json", "training_args.bin", "README.md"):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(_timeless(path) if path.suffix in (".json", ".jsonl") else path.read_bytes())
    digest.update((folder / "output.txt").read_bytes().split(b"%")[0])
    return digest.hexdigest()[:16]


def _timeless(path: Path) -> bytes:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    kept = []
    for line in lines:
        value = json.loads(line)
        if isinstance(value, dict):
            value = {key: each for key, each in value.items() if not key.startswith(("timing_s", "perf", "minutes"))}
        kept.append(json.dumps(value))
    return "\n".join(kept).encode()
