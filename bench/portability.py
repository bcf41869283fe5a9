"""Does the demo's task end and learn on other processors, as far as this one can imitate them?

    python bench/portability.py [--rollouts 15] [--small-rollouts 30] [--only NAME ...]     # an hour
    python bench/portability.py --smoke                                                        # half a minute

oneDNN and PyTorch are held to older instruction sets by their own environment variables; bfloat16 that is named on such
a processor must run, however slowly. A row for each run: how it ended, its dtype, the largest and the mean deviation of
the first ratio, the mean score of the first two and of the last four rollouts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import SMOLLM, TINY, keep, model_folder

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS

ROOT = Path(__file__).parents[1]
PROCESSORS = {
    "this one": {},
    "SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}
HEADER = ["run", "ranks x threads", "dtype", "rollouts", "largest first ratio - 1", "first two", "last four", "seconds"]
FIGURES = ("first_ratio_largest", "first_two", "last_four")
SMALL = ["rollout.prompts_per_rollout=4", "rollout.max_new_tokens=8", "data.evaluation=none"]
PAIRS = ["rollout.prompts_per_rollout=8", "rollout.responses_per_prompt=2", "rollout.max_new_tokens=16"]
PAIRS += ["data.evaluation=none", "run.evaluate_every=0"]


@dataclass(frozen=True)
class Case:
    """A run: what it is held to, its processes and threads, and its settings."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 2
    threads: int = 1
    settings: tuple[str, ...] = ()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every processor with its own dtype; bfloat16 where it is emulated; ranks, threads and seeds, spread over them;
    every estimator, in thirty small rollouts of two responses to a prompt."""
    long, small = f"ppo.num_rollouts={options.rollouts}", (f"ppo.num_rollouts={options.small_rollouts}", *PAIRS)
    for name, environment in PROCESSORS.items():
        seed = 1 if name == "AMX" else 0
        yield Case(f"{name}, seed {seed}", environment, settings=(long, f"run.seed={seed}"))
    yield Case("this one, seed 2", ranks=1, threads=2, settings=(long, "run.seed=2"))
    for name in ("AVX2", "AVX-512"):
        few = ("ppo.num_rollouts=2", *PAIRS)
        yield Case(f"{name}, bfloat16", PROCESSORS[name], settings=(*few, "model.dtype=bfloat16"))
    for estimator in ADVANTAGE_ESTIMATORS:
        chosen = (f"ppo.advantage={estimator}", "model.dtype=bfloat16")
        yield Case(f"estimator {estimator}", ranks=1, settings=(*small, *chosen))


def smoke_cases() -> Iterator[Case]:
    """One rollout of a few tokens on each kind of processor, with the dtype that it chooses and with bfloat16."""
    one = ("ppo.num_rollouts=1", *SMALL)
    yield Case("AVX2", PROCESSORS["AVX2"], ranks=1, settings=one)
    yield Case("AVX2, bfloat16", PROCESSORS["AVX2"], ranks=1, settings=(*one, "model.dtype=bfloat16"))
    yield Case("AVX-512", PROCESSORS["AVX-512"], ranks=1, settings=one)


def measured(case: Case, model: str) -> dict[str, Any]:
    """A row of the table, which is printed at once."""
    row = {"name": case.name, "ranks": case.ranks, "threads": case.threads, **run(case, model)}
    print(json.dumps(row), flush=True)
    return row


def run(case: Case, model: str) -> dict[str, Any]:
    """The figures of one run in processes of its own; ``status`` is 0 where it ended as it should."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"model.name={model}", f"run.output_dir={folder}/run", "run.wandb=off", *case.settings]
        recipe = ["recipes/ppo.py", "--config", "recipes/sentiment/ppo.yaml", *settings]
        launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
        launcher += ["accelerate_configs/cpu_zero3.yaml", "--num_processes", str(case.ranks)]
        launcher += ["--main_process_port", str(free_port())]
        command = [*(launcher if case.ranks > 1 else [sys.executable]), *recipe]
        threads = {"OMP_NUM_THREADS": str(case.threads), "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **threads, **case.environment}, capture_output=True, text=True
        )
        row = {"status": done.returncode, "seconds": round(time.perf_counter() - began)}
        if done.returncode:
            return {**row, "said": (done.stderr.strip().splitlines() or [""])[-1][:500]}
        return {**row, **figures(Path(folder, "run"))}


def figures(folder: Path) -> dict[str, Any]:
    """What a run folder says about its dtype, its first ratios and its scores."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    ratios = [record for record in records if "actor/first_ratio_deviation" in record]
    scores = json.loads((folder / "summary.json").read_text())["mean_scores"]
    return {
        "dtype": json.loads((folder / "run.json").read_text())["model"]["dtype"],
        "first_ratio_largest": max((record["actor/first_ratio_deviation"] for record in ratios), default=0.0),
        "first_ratio_mean": max((record["actor/first_ratio_mean_deviation"] for record in ratios), default=0.0),
        "first_two": round(statistics.mean(scores[:2]), 3),
        "last_four": round(statistics.mean(scores[-4:]), 3),
        "rollouts": len(scores),
    }


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in docs/performance.md."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for row in rows:
        lines.append(
            [
                row["name"],
                f"{row['ranks']} x {row['threads']}",
                *([row["dtype"], str(row["rollouts"])] if row["status"] == 0 else ["stopped", ""]),
                *(f"{row[name]:.3g}" if name in row else "" for name in FIGURES),
                str(row["seconds"]),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=15)
    parser.add_argument("--small-rollouts", type=int, default=30, help="with each estimator")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the cases of these names")
    parser.add_argument("--smoke", action="store_true", help="a few tokens; nothing is kept")
    options = parser.parse_args()
    model = model_folder(TINY if options.smoke else SMOLLM)
    every = list(smoke_cases() if options.smoke else cases(options))
    chosen = [case for case in every if not options.only or case.name in options.only]
    whole = [case for case in chosen if case.ranks * case.threads > 1]
    single = [case for case in chosen if case.ranks * case.threads == 1]
    rows = [measured(case, model) for case in whole]
    with ThreadPoolExecutor(max_workers=2) as two:
        rows += two.map(partial(measured, model=model), single)
    if not options.smoke:
        print(as_markdown(rows))
        keep("portability", rows)
    sys.exit(0 if all(row["status"] == 0 for row in rows) else 1)


if __name__ == "__main__":
    main()
