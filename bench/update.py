"""Forward and backward of policy and value, the work of an update: seconds and peak memory, with and without the fused
elementwise parts (models/fused.py).

    python bench/update.py        # result in bench/results/update.json; about 2 minutes

16 sequences of 45 + 48 tokens in micro-batches of 8 and of 16; bfloat16 base, rank 16 on all linear layers of both
roles. Memory is measured in a process for each line: what an update adds to the model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import SMOKE, arguments, keep, models, paired_medians, rounded
from one_update import ROWS, load, micro_batches, score, update


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--memory-of", nargs=3, metavar=("MODEL", "FUSE", "ROWS"))
    options = parser.parse_args()
    if options.memory_of:
        name, fused, rows = options.memory_of
        print(json.dumps(memory(name, fuse=fused == "fused", rows=int(rows))))
        return
    keep("update", rounded([line for model in models(options.set) for line in lines(model)]))


def lines(model: str) -> list[dict[str, Any]]:
    """For each size of micro-batch: seconds, paired, and GiB on top of the loaded model."""
    plain, fused, figures = load(model, fuse=False), load(model), []
    for rows in (ROWS,) if SMOKE else (8, ROWS):
        layouts = list(micro_batches(fused, rows))
        before, after = paired_medians(lambda: update(plain, layouts), lambda: update(fused, layouts), repeats=3)  # noqa: B023
        _, role_pass = paired_medians(lambda: None, lambda: score(fused, layouts), repeats=3)  # noqa: B023
        gib = [in_a_process(model, kind, rows) for kind in ("plain", "fused")]
        figures.append(
            {
                "model": model,
                "micro_batch_rows": rows,
                "update_s": after / 1e3,
                "update_unfused_s": before / 1e3,
                "ratio": after / before,
                "role_pass_of_three_roles_s": role_pass / 1e3,
                "update_gib": gib[1],
                "update_unfused_gib": gib[0],
                "memory_ratio": gib[1] / gib[0],
            }
        )
    return figures


def in_a_process(model: str, kind: str, rows: int) -> float:
    """``memory`` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", model, kind, str(rows)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(output.strip().splitlines()[-1]))


def memory(model: str, *, fuse: bool, rows: int) -> float:
    """GiB that one update needs at its peak on top of the loaded model."""
    shared = load(model, fuse=fuse)
    layouts = list(micro_batches(shared, rows))
    before = peak_from_here()
    update(shared, layouts)
    return peak() - before


def peak_from_here() -> float:
    """Forget the peak so far; GiB in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """GiB: what torch allocated on a GPU, resident memory on Linux without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) / 2**20


if __name__ == "__main__":
    main()
