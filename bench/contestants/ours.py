"""Contestant of ``bench/versus_trl.py``: this toolkit, one process, one rollout with its update at each request.

    python bench/contestants/ours.py JOB.json

The job holds ``model``, ``folder`` (of the run) and ``changes`` to the experiment (``common.experiment``).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import experiment, peak_memory_gib, prepared, versions
from contestants.protocol import Server

MANY = 1000  # rollouts: more than anyone asks for


def main() -> None:
    server = Server()
    from transformers import TrainerCallback

    job = json.loads(Path(sys.argv[1]).read_text())
    sections = experiment(job["model"], Path(job["folder"]), {**job["changes"], "ppo.num_rollouts": MANY})
    run = prepared(sections, stops=False)
    clock = run.trainer.maker.scored_sampler.clock

    class Steps(TrainerCallback):
        """Trainer logs once for each rollout, after its last update: there the next one waits to be asked for."""

        began = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            server.answer(ready=True, versions=versions())
            self.await_request()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            phases = {name.partition("/")[2]: value for name, value in logs.items() if name.startswith("timing_s/")}
            server.answer(
                seconds=time.perf_counter() - self.began,
                phases={name: seconds for name, seconds in phases.items() if name != "step"},
                peak_gib=peak_memory_gib(),
                response_length=logs["response_length/mean"],
                score=logs["critic/score/mean"],
            )
            self.await_request()

        def await_request(self) -> None:
            server.wait()
            clock.take()
            self.began = time.perf_counter()

    run.trainer.add_callback(Steps())
    run.train()


if __name__ == "__main__":
    main()
