"""Start a bench's worker on several ranks, as ``accelerate launch`` does, and read what rank 0 found."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml


def on_ranks(script: str, job: dict[str, Any], *, ranks: int, stage: int | None = 3, seconds: int = 540) -> Any:
    """Run ``script --worker JOB`` on ``ranks`` processes under ZeRO ``stage`` (None: plain); return what rank 0 left in
    ``job["result"]``.

    Raises SystemExit with the launch's last output where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        job = {**job, "folder": f"{folder}/run", "result": f"{folder}/result.json"}
        file.write_text(json.dumps(job))
        command = [sys.executable, *launcher(Path(folder), ranks, stage), script, "--worker", str(file)]
        done = subprocess.run(
            command,
            env=environment(ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{script} failed on {ranks} ranks:\n{done.stdout[-6000:]}")
        return json.loads(Path(job["result"]).read_text())


def launcher(folder: Path, ranks: int, stage: int | None) -> list[str]:
    """What starts the ranks, its config in ``folder``; nothing for a single process without ZeRO, which needs none."""
    if ranks == 1 and stage is None:
        return []
    config = folder / "launch.yaml"
    config.write_text(yaml.safe_dump(launch_config(ranks, stage)))
    return ["-m", "accelerate.commands.launch", "--config_file", str(config)]


def worker_or_bench(
    parser: argparse.ArgumentParser, worker: Callable[[dict[str, Any]], None], bench: Callable[[Any], None]
) -> None:
    """What a bench's ``main`` does: its worker's part where ``on_ranks`` has started it, else the bench."""
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(Path(options.worker).read_text()))
    else:
        bench(options)


def launch_config(ranks: int, stage: int | None) -> dict[str, Any]:
    """accelerate's settings: as in accelerate_configs/, with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO" if stage is None else "DEEPSPEED",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": ranks,
        "machine_rank": 0,
        "main_training_function": "main",
        "main_process_port": port,
        "use_cpu": False,
    }
    return settings if stage is None else {**settings, "deepspeed_config": {"zero_stage": stage}}


def environment(ranks: int) -> dict[str, str]:
    """Without GPU: DeepSpeed on the CPU, and the cores shared among the ranks."""
    common = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if torch.cuda.is_available():
        return common
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)) // ranks)
    return {**common, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
