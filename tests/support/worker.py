"""What each rank runs for ``launch.run_worker``: start the topology, call a function, save its result."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from rlhf_toolkit.distributed.topology import end_process, start


def main() -> None:
    function, folder = sys.argv[1], Path(sys.argv[2])
    topology = start(max_grad_norm=1.0)
    module, _, name = function.partition(":")
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    result = getattr(importlib.import_module(module), name)(topology, **arguments)
    torch.save(result, folder / f"result_{topology.rank}.pt")
    if topology.world_size > 1:
        end_process()


if __name__ == "__main__":
    main()
