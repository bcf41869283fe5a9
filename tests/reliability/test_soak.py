"""What the soak and the small disk judge by; the runs themselves are ``python -m``."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.reliability.small_disk import MEBIBYTES
from tests.reliability.soak import Sample, ends, growth_faults, read
from tests.reliability.strike import fill


def samples(memory: list[int], files: list[int] | None = None, processes: list[int] | None = None) -> list[Sample]:
    flat = [7] * len(memory)
    columns = zip(memory, files or flat, processes or flat, strict=True)
    return [Sample(rank, step, step, *values) for step, values in enumerate(columns) for rank in "01"]


def test_growth_is_seen_and_noise_is_not() -> None:
    g = random.Random(0)
    flat = [500 * 2**20 + g.randrange(2**20) for _ in range(300)]
    assert growth_faults("flat", samples(flat)) == []
    leaking = [value + step * 2**16 for step, value in enumerate(flat)]  # 19 MiB at the end, 3.4%
    assert [fault.split(":")[0] for fault in growth_faults("leak", samples(leaking))] == [
        "leak, rank 0",
        "leak, rank 1",
    ]
    opened = [20 + step // 100 for step in range(300)]
    assert len(growth_faults("files", samples(flat, opened))) == 2
    assert len(growth_faults("processes", samples(flat, None, opened))) == 2


def test_a_cut_line_of_samples_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    path.write_text(json.dumps(["0", 1, 1, 5, 6, 7]) + '\n["0", 2, 2')
    assert read(path) == [Sample("0", 1, 1, 5, 6, 7)]
    assert ends([1.0, 2.0, 3.0]) == (1.0, 3.0)


def test_a_filler_leaves_what_it_is_told(tmp_path: Path) -> None:
    """On a small disk of its own, where the machine lets us make one."""
    script = (
        "import os, pathlib, sys; from tests.reliability.strike import fill; "
        "disk = pathlib.Path(sys.argv[1]); fill(disk / 'filler', 8192); "
        "free = os.statvfs(disk); print(free.f_bavail * free.f_frsize)"
    )
    mount = 'mount -t tmpfs -o size=4m none "$1" && python -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), script]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no mount namespaces")
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) == 8192
    assert MEBIBYTES > 256 and fill.__doc__
