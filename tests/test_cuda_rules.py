"""The toolkit keeps a GPU's rules, which ``tests/cuda_rules`` imitates, and mistakes against them are caught.

In a process of their own: the pretended device stays for the rest of a process.
"""

from __future__ import annotations

import sys

import pytest
import torch.utils.backend_registration

from tests.cuda_rules.planted import PLANTED
from tests.support.launch import SECONDS, run

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)


def test_the_toolkit_keeps_a_gpus_rules_and_mistakes_that_only_a_gpu_would_show_are_caught() -> None:
    finished = run([sys.executable, "-m", "tests.cuda_rules.planted"], seconds=SECONDS).succeeded()
    caught = [line for line in finished.output.splitlines() if line.startswith("caught ")]
    assert len(caught) == len(PLANTED), finished.output[-4000:]
