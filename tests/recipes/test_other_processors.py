"""A run on processors that this one can imitate: the short form of bench/portability.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment_of_tests
from tests.support.tiny import merged, write_experiment, write_task

# Libraries read these when they are loaded, so that each processor needs a process of its own.
PROCESSORS = {
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX-512, two threads": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "2"},
}
RUNS = """
import sys
from rlhf_toolkit.settings.loading import load_experiment
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.runs.ppo import prepare

for path in sys.argv[1:]:
    prepare(load_experiment(path, {}, Experiment)).train()
"""


@pytest.mark.thorough
def test_a_run_ends_on_other_processors_in_their_own_dtype_and_in_bfloat16(tmp_path: Path) -> None:
    wrong, running = {}, {}
    for name, environment in PROCESSORS.items():
        folder = tmp_path / name.replace(" ", "_")
        paths = [experiment(folder / dtype, dtype) for dtype in ("auto", "bfloat16")]
        command = [sys.executable, "-c", RUNS, *map(str, paths)]
        process = subprocess.Popen(
            command,
            env={**environment_of_tests(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running[name] = folder, process
    for name, (folder, process) in running.items():
        output, _ = process.communicate(timeout=600)
        if process.returncode != 0 or "slow here: oneDNN is held to" not in output:
            wrong[name] = output[-2000:]
        else:
            for named, meant in {"auto": "float32", "bfloat16": "bfloat16"}.items():
                run = folder / named / "run"
                chosen = json.loads((run / "run.json").read_text())["model"]["dtype"]
                first = json.loads((run / "log.jsonl").read_text().splitlines()[0])
                if chosen != meant or first["actor/first_ratio_mean_deviation"] > 0.05:
                    wrong[f"{name}, {named}"] = f"{chosen}, {first}"
    assert not wrong, wrong


def experiment(folder: Path, dtype: str) -> Path:
    folder.mkdir(parents=True)
    return write_experiment(
        folder / "run.yaml", merged(write_task(folder), {"ppo.num_rollouts": 2, "model.dtype": dtype})
    )
