"""Runs a test on mutated source: one parent imports what is heavy and forks for each mutation, which takes a fraction
of a second."""

from __future__ import annotations

import ast
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 60  # of the processor, for one mutation: what else the machine does makes no difference
SECONDS_WITHOUT = 600  # of all tests without a mutation
WAITING = 30  # times as long by the clock, for what waits and does not compute
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "pytest_timeout", "--timeout=0")
"""pytest's. Warning of what a destructor raised takes two full garbage collections, longer than most tests. A limit by
the clock would be the load's verdict, not the test's."""
HEAVY = (
    "torch",
    "pytest",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "peft",
    "datasets",
    "accelerate",
    "wandb",
)
"""What the package and its tests import from elsewhere, and what takes seconds."""


class Mutation(NamedTuple):
    """One mistake. ``place`` is a file, or ``file:function`` (or ``file:Class.method``) for a part of it, in which
    ``old`` must be found exactly once."""

    name: str
    place: str
    old: str
    new: str
    test: str
    """The node id of the test that catches it."""


class Verdict(NamedTuple):
    """What came of a mutation: ``caught``, ``SURVIVED``, or ``DEFECT``, where its entry in the table is wrong."""

    mutation: Mutation
    outcome: str
    reason: str


class Ended(NamedTuple):
    """How a child ended: pytest's exit status, None where it died or ran out of time; whether it imported the mutated
    file; (phase, kind of error, whether it says that a number is wrong) of each failure; and its output."""

    status: int | None
    imported: bool
    failures: list[tuple[str, str, bool]]
    output: str


def verdicts(
    mutations: Sequence[Mutation], *, heavy: Sequence[str] = HEAVY, files: Sequence[str] = ()
) -> Iterator[Verdict]:
    """The verdict on each mutation. Raises SystemExit where a test fails or is skipped on the source as it is; so it
    does about all other tests in ``files``."""
    os.environ.update(ENVIRONMENT)
    for name in heavy:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every child would go through what the parent has imported
    with tempfile.TemporaryDirectory() as folder:
        tests = dict.fromkeys(m.test for m in mutations if m.test.partition("::")[0] not in files)
        without = _run([*files, *tests], None, Path(folder), seconds=SECONDS_WITHOUT)
        if without.status != 0 or " skipped" in without.output[-300:]:
            raise SystemExit(f"{without.output}\nwithout a mutation these tests must pass")
        for mutation in mutations:
            yield _verdict(mutation, Path(folder))


def mutated(mutation: Mutation) -> tuple[Path, str]:
    """The file and its text with the mutation. Raises LookupError where ``old`` is not there exactly once."""
    name, _, function = mutation.place.partition(":")
    path = ROOT / name
    text = path.read_text()
    start, stop = _span(text, function) if function else (0, len(text))
    found = text[start:stop].count(mutation.old)
    if found != 1:
        raise LookupError(f"{mutation.old!r} is found {found} times in {mutation.place}")
    return path, text[:start] + text[start:stop].replace(mutation.old, mutation.new) + text[stop:]


def _span(text: str, name: str) -> tuple[int, int]:
    """Where the function or method ``name`` begins and ends in ``text``."""
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        if len(found) != 1:
            raise LookupError(f"{name} is defined {len(found)} times")
        body = found[0].body
    lines = text.splitlines(keepends=True)
    return len("".join(lines[: found[0].lineno - 1])), len("".join(lines[: found[0].end_lineno]))


def _verdict(mutation: Mutation, folder: Path) -> Verdict:
    try:
        source = mutated(mutation)
    except LookupError as error:
        return Verdict(mutation, "DEFECT", str(error))
    ended = _run([mutation.test], source, folder, seconds=SECONDS)
    if ended.status == 0 and ended.imported:
        return Verdict(mutation, "SURVIVED", "")
    if ended.status == 0:
        return Verdict(mutation, "DEFECT", f"the test does not import {mutation.place}")
    if ended.status == 1 and [phase for phase, *_ in ended.failures] == ["call"]:
        _, kind, says_wrong = ended.failures[0]
        if says_wrong:
            return Verdict(mutation, "caught", kind)
        raises = f"it does not compute something wrong but raises {kind}"
        return Verdict(mutation, "DEFECT", f"{raises}\n{ended.output[-3000:]}")
    status = "was killed" if ended.status is None else f"pytest ended with {ended.status}"
    return Verdict(mutation, "DEFECT", f"{status}\n{ended.output[-3000:]}")


def _run(tests: Sequence[str], source: tuple[Path, str] | None, folder: Path, *, seconds: int) -> Ended:
    """Run ``tests`` in a child that imports ``source``, a file and its text, as that text."""
    assert not [name for name in sys.modules if name.partition(".")[0] == "rlhf_toolkit"], "it is too late to mutate"
    output, report = folder / "output.txt", folder / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        _become(tests, source, output, report)
    killed = _wait(child, WAITING * seconds)
    text = output.read_text()
    if not report.exists():
        return Ended(None, False, [], f"{text}\n--- {'ran out of time' if killed else 'died'}")
    said = json.loads(report.read_text())
    return Ended(said["status"], said["imported"], [tuple(each) for each in said["failures"]], text)


def _become(tests: Sequence[str], source: tuple[Path, str] | None, output: Path, report: Path) -> None:
    """Run pytest in this process, write the report and end without taking down what the parent has built."""
    try:
        os.setsid()
        for target in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND * (target - 1), 0o600), target)
        os.truncate(output, 0)
        os.chdir(ROOT)
        imported: list[str] = []
        if source is not None:
            _import_as(*source, imported)
        failures = Failures()
        options = [*OPTIONS, f"--basetemp={output.parent / 'base'}", *tests]
        status = importlib.import_module("pytest").main(options, plugins=[failures])
        sys.stdout.flush()
        report.write_text(json.dumps({"status": status, "imported": bool(imported), "failures": failures.seen}))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)


class Failures:
    """A pytest plugin that keeps what failed, when and how."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bool]] = []

    def pytest_exception_interact(self, call: Any) -> None:
        """An error in the test or around it. A wrong number is an assertion, a missed refusal (``pytest.raises``), or
        the toolkit's own word that something is wrong; anything else is a crash, which would prove nothing."""
        kind = call.excinfo.type
        wrong = issubclass(kind, AssertionError) or bool(
            {"Failed", "RLHFError"} & {each.__name__ for each in kind.__mro__}
        )
        self.seen.append((call.when, kind.__name__, wrong))


def _import_as(path: Path, text: str, imported: list[str]) -> None:
    """Have Python compile ``text`` whenever the file at ``path`` is imported, and say so in ``imported``."""
    plain = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> Any:
        if os.path.realpath(loader.path) != os.path.realpath(path):
            return plain(loader, name)
        imported.append(name)
        return loader.source_to_code(text.encode(), loader.path)

    setattr(SourceFileLoader, "get_code", get_code)  # noqa: B010  no method is assigned to otherwise


def _wait(child: int, seconds: float) -> bool:
    """Wait for the child and kill it, with all that it has started, after ``seconds``; whether that was needed, or the
    kernel has ended it for the time it took of the processor."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True
