"""``python -m tests.fuzz.settings --count 3000 --seed 0``: settings files and rows, legal, at the border and wrong.

Each makes two updates on a tiny model, or ends with an RLHFError of one line. A bare traceback, a run that does not
end, a wrong setting that is accepted, and a setting that changes nothing wherever it is set, are failures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.cases import Case, base, make
from tests.fuzz.play import GOOD, HUNG, RAN, Outcome, outcome, start
from tests.fuzz.task import write_fixtures
from tests.fuzz.values import knobs

SECONDS = 120.0
"""Of a case; it takes one where nothing else runs."""
LEAST_TRIES = 12
ONE_IN = 3
"""Of that many runs one is repeated without one of its settings."""
WITHOUT_TRACE = {
    "model.lora_dropout": "it has one legal value",
    "reward.model_weight": "there is no reward model",
    "reward.model_revision": "there is no reward model",
    "model.revision": "the model is local",
    "alarms.stop": "two updates may cause no alarm",
    "run.most_not_finite": "all numbers are finite",
    "model.trust_remote_code": "the model is local and brings no code",
    "data.chat_template_kwargs": "the tiny template reads none",
    "sft.turns": "rows have one turn of the assistant's",
    "run.timeout_minutes": "nobody is late",
    "run.stall_minutes": "nobody stands still",
    "run.trackers": "W&B is off, and none of the others is asked for",
    "run.wandb_project": "W&B is off",
    "run.name": "W&B is off",
    "run.keep_best": "two updates leave no more checkpoints than are kept",
    "run.keep_checkpoints": "two updates leave two checkpoints",
    "rollout.slots": "results do not depend on it",
    "rollout.keep_special_tokens": "the tiny tokenizer's special tokens are no words",
    "rollout.max_turns": "three tokens rarely leave room for a second turn",
    "update.packing": "rounding alone",
    "update.optimizer": "the tiny adapters are too small for 8 bits, which leaves rounding",
    "model.attention": "rounding alone",
}
"""Settings that two updates on one process may not show, and why."""


@dataclass
class Table:
    """What has happened so far."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[tuple[Case, Outcome]] = field(default_factory=list)
    tried: Counter[str] = field(default_factory=Counter)
    differed: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case, found: Outcome) -> None:
        """Count a case."""
        self.counts[case.kind, case.shape, found.how] += 1
        if found.how not in GOOD:
            self.failures.append((case, found))

    def idle(self) -> list[str]:
        """Settings that were tried often and never changed anything."""
        return [
            name
            for name, count in sorted(self.tried.items())
            if count >= LEAST_TRIES and not self.differed[name] and name not in WITHOUT_TRACE
        ]

    def lines(self) -> Iterator[str]:
        """The table by kind and shape."""
        for kind, shape in sorted({key[:2] for key in self.counts}):
            found = {how: n for (k, s, how), n in sorted(self.counts.items()) if (k, s) == (kind, shape)}
            yield f"{kind:14}{shape:10}" + ", ".join(f"{n} {how}" for how, n in found.items())
        yield f"settings taken out of a run one at a time: {len(self.tried)}, {sum(self.tried.values())} times"
        yield f"of them without any trace: {', '.join(self.idle()) or 'none'}"


def play_all(numbers: range, seed: int, *, processes: int = 1, seconds: float = SECONDS) -> Table:
    """Play the cases of these numbers, ``processes`` at a time."""
    table, waiting = Table(), list(reversed(numbers))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "fixtures").mkdir()
        fixtures = write_fixtures(place / "fixtures")
        gc.collect()
        gc.freeze()  # or every child would go through what this process has imported
        again: list[tuple[Case, str, str]] = []  # a case without a setting, the setting, and what the whole case left
        running: dict[int, tuple[Case, Path, float, tuple[str, str] | None]] = {}
        while waiting or running or again:
            while len(running) < processes and (waiting or again):
                if again:
                    case, knob, left = again.pop()
                    about: tuple[str, str] | None = (knob, left)
                else:
                    case = make(seed, waiting.pop())
                    about = None
                folder = Path(tempfile.mkdtemp(dir=place))
                running[start(case, fixtures, folder)] = (case, folder, time.monotonic(), about)
            for child, (case, folder, began, about) in list(running.items()):
                ended = _ended(child, time.monotonic() - began > seconds)
                if ended == "":
                    continue
                del running[child]
                found = outcome(case, folder, None if ended == HUNG else int(ended))
                shutil.rmtree(folder, ignore_errors=True)
                if about is None:
                    table.add(case, found)
                    _report(case, found, seed)
                    if (done := sum(table.counts.values())) % 100 == 0:
                        print(f"... {done} cases", flush=True)
                    if found.how == RAN and (drawn := _drawn_knob(case, seed)):
                        again.append((case.without(drawn), drawn, found.left))
                elif found.how in GOOD:
                    table.tried[about[0]] += 1
                    table.differed[about[0]] += found.left != about[1]
            time.sleep(0.01)
    return table


def _ended(child: int, late: bool) -> str:
    """Status of a process that has ended, HUNG for one that is ended here, nothing for one that runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        return str(os.waitstatus_to_exitcode(status))
    if not late:
        return ""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HUNG


def _drawn_knob(case: Case, seed: int) -> str | None:
    """One of the settings that a case changes from what the tiny run has, now and then."""
    chance, known, usual = random.Random(f"{seed} {case.number} again"), knobs(case.kind), base(case.kind)
    changed = [
        name
        for name, value in case.changes.items()
        if name in known and name not in usual and value != _default(known[name][0])
    ]
    return chance.choice(changed) if changed and chance.randrange(ONE_IN) == 0 else None


def _default(setting: object) -> object:
    factory = getattr(setting, "default_factory", None)
    return factory() if callable(factory) else getattr(setting, "default", None)


def _report(case: Case, found: Outcome, seed: int) -> None:
    if found.how in GOOD:
        return
    told = {name: value for name, value in case.changes.items() if base(case.kind).get(name) != value}
    rows = json.dumps(case.rows)[:600] if case.shape == "rows" else ""
    words = (
        f"--- case {case.number} of seed {seed}, {case.kind}, {case.shape}: {found.how}\n    {_short(told)}\n    {rows}"
    )
    print(f"{words}\n{found.text[-1800:]}", flush=True)


def _short(told: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r:.120}" for name, value in told.items())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a case")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    table = play_all(numbers, options.seed, processes=options.processes, seconds=options.seconds)
    for line in table.lines():
        print(line)
    failed = len(table.failures) + len(table.idle())
    print(f"{sum(table.counts.values()) - len(table.failures)} passed, {failed} failed", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
