"""A recipe with faults planted into it: ``faulty.py RECIPE --config X.yaml``; ``faults.json`` beside the YAML has them.

Each fault is a dict: ``rank``; ``where``, the pass in whose second layer it happens (``update``, ``backward``,
``sampling``, ``roles``), or ``build``, where the model is made; ``number``, which of these passes on that rank, from 0;
``deed``, a name in ``DEEDS``.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_toolkit.models.shared_base import SharedBase


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")


def fail() -> None:
    raise LookupError("nobody knows")


DEEDS = {
    "memory": run_out_of_memory,
    "raise": fail,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stall": lambda: time.sleep(1000),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class Plant:
    """Counts the passes of this rank by kind, and does the deeds."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        mine = [fault for fault in faults if fault["rank"] == int(os.environ.get("RANK", "0"))]
        self.deeds = {(fault["where"], fault["number"]): DEEDS[fault["deed"]] for fault in mine}
        self.passes: dict[str, int] = {}
        self.where = ""

    def watch(self) -> None:
        """Look at every pass of every SharedBase."""
        build, sample = SharedBase.__init__, SharedBase.next_token_logits

        def init(model: SharedBase, *arguments: Any, **options: Any) -> None:
            build(model, *arguments, **options)
            self.deeds.get(("build", 0), lambda: None)()
            layers = [module for name, module in model.named_modules() if name.endswith(".layers.1")]
            layers[0].register_forward_pre_hook(self._before)
            layers[0].register_forward_hook(self._after)

        def next_token_logits(model: SharedBase, *arguments: Any, **options: Any) -> Any:
            self.where = "sampling"
            try:
                return sample(model, *arguments, **options)
            finally:
                self.where = ""

        SharedBase.__init__, SharedBase.next_token_logits = init, next_token_logits  # type: ignore[method-assign,assignment]

    def _before(self, module: torch.nn.Module, arguments: Any) -> None:
        where = self.where or ("update" if torch.is_grad_enabled() else "roles")
        number = self.passes[where] = self.passes.get(where, -1) + 1
        self.deeds.get((where, number), lambda: None)()

    def _after(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        deed = self.deeds.get(("backward", self.passes.get("update", 0)))
        states = output[0] if isinstance(output, tuple) else output
        if deed is not None and states.requires_grad:
            states.register_hook(lambda gradient: deed())


if __name__ == "__main__":
    del sys.argv[0]
    config = Path(sys.argv[sys.argv.index("--config") + 1])
    Plant(json.loads(config.with_name("faults.json").read_text())).watch()
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
