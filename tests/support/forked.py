"""Ranks that cost a second and not twenty: one parent imports everything once and forks for each process of each run.

A rank finds in its environment what ``accelerate launch`` and torchrun would have put there, made by accelerate's own
functions from the same YAML. Like torchrun, the parent keeps the store at which ranks meet in a process beside them, on
a port that the kernel chooses, and ends all ranks when one has failed.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.support.processes import ROOT, Finished, environment_of_tests

HEAVY = (
    "rlhf_toolkit.runs.ppo",
    "rlhf_toolkit.runs.fine_tuning",
    "transformers.models.llama.modeling_llama",
    "accelerate.commands.launch",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which brings torch's compiler along
)
"""What takes seconds to import, some of it late in a run."""
RECIPE = ROOT / "recipes/ppo.py"
_interrupts: list[int] = []
"""Interrupts that the parent has received and, like torchrun, hands on to all ranks."""
GRACE_SECONDS = 30.0
"""What a rank has to end when another has failed, as under torchrun."""
OF_TORCHRUN = {
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


# ---- in the tests' process -------------------------------------------------------------------------------------------


class Processes:
    """Runs scripts in forks of one parent, one after another."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output.txt"
        self.parent = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            cwd=ROOT,
            env={**environment_of_tests(), "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src")))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        script: str,
        *arguments: str,
        launch_config: Path | None = None,
        seconds: int = 600,
        before: str = "",
        environment: dict[str, str] | None = None,
    ) -> Finished:
        """The script with these ``arguments``, after ``before``, Python code that spoils or observes.

        ``launch_config`` is accelerate's YAML; without it this is one plain process.
        """
        job = {
            "script": script,
            "arguments": arguments,
            "launch_config": None if launch_config is None else str(launch_config),
            "seconds": seconds,
            "before": before,
            "environment": environment or {},
            "output": str(self.output),
        }
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.parent.stdin.write(json.dumps(job) + "\n")
        self.parent.stdin.flush()
        answer = self.parent.stdout.readline()
        assert answer, f"the parent of all runs has ended with {self.parent.wait()}"
        return Finished(int(answer), self.output.read_text(errors="replace"))

    def close(self) -> None:
        """The parent ends when it has nothing more to read."""
        self.parent.communicate(timeout=GRACE_SECONDS)


@functools.cache
def shared() -> Processes:
    """The one of this test session, started by whoever needs it first."""
    folder = tempfile.TemporaryDirectory()
    processes = Processes(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(processes.close)
    return processes


class RecipeProcesses:
    """``recipes/ppo.py`` as one plain process for each call of ``run``."""

    def run(
        self, *arguments: str, seconds: int = 600, before: str = "", environment: dict[str, str] | None = None
    ) -> Finished:
        """The recipe with these command-line ``arguments``, as in ``Processes.run``."""
        return shared().run(str(RECIPE), *arguments, seconds=seconds, before=before, environment=environment)


# ---- in the parent ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork for each job on stdin and answer with its exit status: a failed rank's, 0, or -9 at the time limit."""
    signal.signal(signal.SIGINT, lambda number, _: _interrupts.append(number))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints to its output is not an answer
    for name in HEAVY:
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # a cache
    gc.collect()
    gc.freeze()  # or every child would go through what the parent has imported
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        print(_run(job, environments_of(job["launch_config"])), file=answers, flush=True)


def environments_of(config: str | None) -> list[dict[str, str]]:
    """What accelerate's launcher puts into the environment of each process that the YAML ``config`` asks for."""
    if config is None:
        return [{}]
    commands = importlib.import_module("accelerate.commands.launch")
    parsed = commands.launch_command_parser().parse_args(["--config_file", config, "script.py"])
    args, *_ = commands._validate_launch_command(parsed)
    before = set(os.environ.items())
    made = dict(set(_environment_of_accelerate(args).items()) - before)
    world = int(args.num_processes)
    if not args.use_deepspeed:
        return [made]
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "ROLE_WORLD_SIZE": str(world)}
    ranks = [{name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")} for rank in range(world)]
    return [{**made, **OF_TORCHRUN, **size, **rank} for rank in ranks]


def _environment_of_accelerate(args: argparse.Namespace) -> dict[str, str]:
    utilities = importlib.import_module("accelerate.utils.launch")
    args.deepspeed_fields_from_accelerate_config = []
    prepare = utilities.prepare_deepspeed_cmd_env if args.use_deepspeed else utilities.prepare_simple_launcher_cmd_env
    _, environment = prepare(args)
    return dict(environment)


def _run(job: dict[str, Any], environments: Sequence[dict[str, str]]) -> int:
    """Fork a process for each environment, and where they have to meet one for their store; wait for all."""
    Path(job["output"]).write_bytes(b"")
    store, meet = None, {}
    if "RANK" in environments[0]:
        importlib.import_module("rlhf_toolkit.distributed.extensions").build_cpu_collectives()  # the first time
        store, meet["MASTER_PORT"] = _store()
    ranks = []
    for environment in environments:
        child = os.fork()
        if child == 0:
            _become(job, {**environment, **meet})
        ranks.append(child)
    try:
        return _wait(ranks, job["seconds"])
    finally:
        if store is not None:
            os.kill(store, signal.SIGKILL)
            os.waitpid(store, 0)


def _store() -> tuple[int, str]:
    """A process that is the store of a process group, and its port. Nobody can take a port that is already served."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        distributed = importlib.import_module("torch.distributed")
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        os.close(writing)
        signal.pause()
        os._exit(1)
    os.close(writing)
    port = os.read(reading, 16).decode()
    os.close(reading)
    assert port, "the store did not start"
    return child, port


def _wait(ranks: Sequence[int], seconds: float) -> int:
    """Wait for all ranks; end the others when one has failed, and all when the time is up."""
    deadline, failed, running = time.monotonic() + seconds, 0, set(ranks)
    ended_by: int | None = None
    while running:
        for number in _interrupts:
            failed, ended_by = failed or 128 + number, number
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            _signal(running, number)
        _interrupts.clear()
        for rank in sorted(running):
            done, status = os.waitpid(rank, os.WNOHANG)
            if done:
                running.discard(rank)
                if failed == 0:
                    failed = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if failed and running and ended_by is None:
            time.sleep(0.1)  # torchrun looks ten times a second: a rank that is just ending may end by itself
            ended_by, deadline = signal.SIGTERM, min(deadline, now + GRACE_SECONDS)
            _signal(running, signal.SIGTERM)
        elif now > deadline and ended_by is not signal.SIGKILL:
            failed = failed or -9
            ended_by = signal.SIGKILL
            _signal(running, signal.SIGKILL)
        time.sleep(0.02)
    return failed


def _signal(ranks: set[int], number: int) -> None:
    """To each rank's process group."""
    for rank in ranks:
        os.killpg(rank, number)


# ---- in a rank -------------------------------------------------------------------------------------------------------


def _become(job: dict[str, Any], environment: dict[str, str]) -> NoReturn:
    """Turn this process into the script. It ends as Python would end it, without taking down what the parent built."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()  # what the parent has registered, such as removing wandb's temporary folder, is the parent's to do
    for target, path, mode in ((0, os.devnull, os.O_RDONLY), (1, job["output"], os.O_WRONLY | os.O_APPEND)):
        os.dup2(os.open(path, mode, 0o600), target)
    os.dup2(1, 2)
    faulthandler.dump_traceback_later(max(job["seconds"] - 10, 1), exit=True, file=2)
    os.environ.update({**environment, **job["environment"]})
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    status = 0
    try:
        exec(job["before"], {})
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
