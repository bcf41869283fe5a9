"""What every bench shares: pairs of timings taken in turn, and a result file with machine, versions and commit."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def paired_medians(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int = 9
) -> tuple[float, float]:
    """Median milliseconds of two contestants that take turns (A B A B); the first round warms up and does not count."""
    pairs = [(milliseconds(first), milliseconds(second)) for _ in range(repeats + 1)][1:]
    first_times, second_times = zip(*pairs, strict=True)
    return statistics.median(first_times), statistics.median(second_times)


def milliseconds(action: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def keep(name: str, figures: list[dict[str, Any]]) -> None:
    """Write ``results/NAME.json`` and print the same as one JSON object."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
