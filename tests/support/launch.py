"""Runs a recipe or a worker function on real ranks, with a hard time limit and a stack dump of every rank that hangs.

Ranks are forked from one process that has imported everything (``tests/support/forked.py``), which takes a tenth of
the time of ``accelerate launch``; a test of launching itself says ``launcher=True``.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.support.forked import shared
from tests.support.processes import ROOT, Finished, environment_of_tests, run

__all__ = ["ACCELERATE", "ROOT", "SECONDS", "Finished", "environment_of_tests", "launch", "run", "run_recipe"]

ACCELERATE = Path(sys.executable).with_name("accelerate")
SECONDS = 600
"""A hang's, not a slow machine's: what ends at all ends in a tenth of it where nothing else runs."""


def launch(
    script: list[str],
    folder: Path,
    *,
    processes: int,
    stage: int | None,
    seconds: int = SECONDS,
    launch_options: dict[str, Any] | None = None,
    launcher: bool = False,
) -> Finished:
    """Run ``python script`` on ``processes`` ranks under ZeRO ``stage`` (None: plain). Kills everything after
    ``seconds``.

    ``launcher``: by ``accelerate launch``. Otherwise the ranks are forked and find in their environment what accelerate
    makes of the same YAML. Every process dumps its stacks shortly before the limit, so that a hang is a failure with a
    reason.
    """
    config = write_launch_config(folder, processes, stage, launch_options or {})
    if not launcher:
        return shared().run(script[0], *script[1:], launch_config=config, seconds=seconds)
    if stage is not None:
        build_op()
    dump = f"import faulthandler; faulthandler.dump_traceback_later({seconds - 10}, exit=True)"
    (folder / "sitecustomize.py").write_text(dump)
    command = [str(ACCELERATE), "launch", "--config_file", str(config), *script]
    return run(command, seconds=seconds, PYTHONPATH=os.pathsep.join(map(str, (folder, ROOT, ROOT / "src"))))


def write_launch_config(folder: Path, processes: int, stage: int | None, options: dict[str, Any]) -> Path:
    """accelerate's YAML in ``folder``. Port 0: any that is free when the launch begins."""
    deepspeed = {} if stage is None else {"zero_stage": stage, "zero3_init_flag": stage == 3}
    deepspeed |= options
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED" if stage is not None else "NO",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "main_training_function": "main",
        "main_process_port": 0,
        "use_cpu": False,
    }
    path = folder / f"accelerate_{processes}_{stage}.yaml"
    path.write_text(yaml.safe_dump(settings | ({"deepspeed_config": deepspeed} if deepspeed else {})))
    return path


@functools.cache
def build_op() -> None:
    """Compile DeepSpeed's op before the first launch, so that no launch's time limit has to allow for it."""
    run([sys.executable, "-m", "rlhf_toolkit.distributed.extensions"], seconds=SECONDS).succeeded()


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
    function: str, folder: Path, *, processes: int = 2, stage: int | None = 3, seconds: int = SECONDS, **arguments: Any
) -> list[Any]:
    """Call ``module:name`` with ``arguments`` on every rank; return what each rank returned, in rank order."""
    torch.save(arguments, folder / "arguments.pt")
    script = [str(Path(__file__).with_name("worker.py")), function, str(folder)]
    launch(script, folder, processes=processes, stage=stage, seconds=seconds).succeeded()
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]
