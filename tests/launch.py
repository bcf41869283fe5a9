"""Start a recipe or a worker function on real ranks, with a hard time limit and a stack dump of every rank that
hangs."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
ACCELERATE = Path(sys.executable).with_name("accelerate")


@dataclass(frozen=True)
class Finished:
    """How a launch ended."""

    status: int
    output: str

    def succeeded(self) -> Finished:
        """Fail the test with the output unless the launch succeeded."""
        assert self.status == 0, self.output[-6000:]
        return self


def launch(
    script: list[str],
    folder: Path,
    *,
    processes: int,
    stage: int | None,
    seconds: int = 240,
    launch_options: dict[str, Any] | None = None,
) -> Finished:
    """Run ``python script`` on ``processes`` ranks under ZeRO ``stage`` (None: plain). Kills everything after
    ``seconds``.

    Every process dumps its stacks shortly before that, so that a hang is a failure with a reason.
    """
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED" if stage is not None else "NO",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "main_training_function": "main",
        "main_process_port": _free_port(),
        "use_cpu": False,
    }
    if stage is not None:
        build_op()
        settings["deepspeed_config"] = {"zero_stage": stage, "zero3_init_flag": stage == 3}
    settings["deepspeed_config"] = {**settings.get("deepspeed_config", {}), **(launch_options or {})}
    if not settings["deepspeed_config"]:
        del settings["deepspeed_config"]
    config = folder / f"accelerate_{processes}_{stage}.yaml"
    config.write_text(yaml.safe_dump(settings))
    dump = f"import faulthandler; faulthandler.dump_traceback_later({seconds - 10}, exit=True)"
    (folder / "sitecustomize.py").write_text(dump)
    command = [str(ACCELERATE), "launch", "--config_file", str(config), *script]
    return run(command, seconds=seconds, PYTHONPATH=os.pathsep.join(map(str, (folder, ROOT, ROOT / "src"))))


@functools.cache
def build_op() -> None:
    """Compile DeepSpeed's op before the first launch, so that no launch's time limit has to allow for it."""
    run([sys.executable, "-m", "rlhf_toolkit.distributed.extensions"], seconds=600).succeeded()


def run(command: list[str], *, seconds: int, **environment: str) -> Finished:
    """Run a command in a process group of its own; kill the whole group at the time limit."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment_of_tests(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return Finished(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        return Finished(-9, f"{output}\n--- killed after {seconds} s ---")


def environment_of_tests() -> dict[str, str]:
    """No network, no GPU, one thread."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def run_recipe(
    experiment: Path,
    *arguments: str,
    processes: int = 1,
    stage: int | None = None,
    recipe: str = "recipes/ppo.py",
    **options: Any,
) -> Finished:
    """Run ``recipe`` on ``experiment``, a YAML file."""
    script = [str(ROOT / recipe), "--config", str(experiment), *arguments]
    return launch(script, experiment.parent, processes=processes, stage=stage, **options)


def run_worker(
    function: str, folder: Path, *, processes: int = 2, stage: int | None = 3, seconds: int = 240, **arguments: Any
) -> list[Any]:
    """Call ``module:name`` with ``arguments`` on every rank; return what each rank returned, in rank order."""
    torch.save(arguments, folder / "arguments.pt")
    script = [str(Path(__file__).with_name("worker.py")), function, str(folder)]
    launch(script, folder, processes=processes, stage=stage, seconds=seconds).succeeded()
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
