"""Peak memory of sampling, scoring and updating, by the micro-batch's tokens and by the roles that run.

    python bench/memory.py        # result in bench/results/memory.json; about 4 minutes

One process for each line: on a CPU its peak resident memory, on a GPU what torch allocated. What a phase adds is its
peak less that of the model loaded and idle.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, experiment, keep, models, peak_memory_gib, prepared, rounded
from ranks import on_ranks, worker_or_bench

TOKENS = (1024, 2048, 4096)
ROLES = {"policy": ("policy",), "+value": ("policy", "value"), "+reference": ("policy", "value", "reference")}
WIDTH = 128
PHASES = ("idle", "rollout", "scoring", "update")


def main() -> None:
    worker_or_bench(arguments(__doc__), worker, bench)


def bench(options: Any) -> None:
    """Every model of the set."""
    figures = [line for model in models(options.set) for line in lines(model)]
    keep("memory", rounded(figures))


def lines(model: str) -> list[dict[str, Any]]:
    """One line for each phase, number of tokens and set of roles."""
    idle = measure(model, "idle", 0, "policy")
    rollout = measure(model, "rollout", 16 * WIDTH, "policy")
    passes = [
        measure(model, phase, tokens, roles)
        for phase, tokens, roles in itertools.product(("scoring", "update"), TOKENS, ROLES)
        if (phase, roles) != ("update", "+reference")  # the update never runs the reference
    ]
    return [{**line, "added_gib": line["peak_gib"] - idle["peak_gib"]} for line in (idle, rollout, *passes)]


def measure(model: str, phase: str, tokens: int, roles: str) -> dict[str, Any]:
    """Peak memory of a process that loads the model and runs one phase."""
    job = {"model": model, "phase": phase, "tokens": tokens, "roles": roles}
    return {**job, **on_ranks(__file__, job, ranks=1, stage=None)}


def worker(job: dict[str, Any]) -> None:
    """Run one phase once; the peak is the process's, and beside a rollout's stands the planner's estimate of it."""

    changes = {"rollout.max_new_tokens": WIDTH // 2, "update.micro_batch_tokens": max(job["tokens"], 4096)}
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(experiment(job["model"], Path(folder, "run"), changes), stops=False)
        trainer = run.trainer
        shared = trainer.model.to(run.topology.device)
        estimates = {}
        if job["phase"] == "rollout":
            from rlhf_toolkit.types import PromptBatch

            batch, sampler = PromptBatch(tuple(trainer.collector.prompts[:16]), (0,) * 16), trainer.collector.sampler
            estimates["estimate_gib"] = sampler.place(shared).needed / 2**30
            with sampler.opened(shared):
                sampler.decode(shared, batch, trainer.collector.sampling, stream=(0,))
        elif job["phase"] != "idle":
            forward(shared, job["tokens"] // WIDTH, ROLES[job["roles"]], gradient=job["phase"] == "update")
    Path(job["result"]).write_text(json.dumps({"peak_gib": peak_memory_gib(), **estimates}))


def forward(shared: Any, rows: int, roles: tuple[str, ...], *, gradient: bool) -> None:
    """One pass of ``roles`` over rows of WIDTH tokens, half of them response, and its backward for an update."""
    import torch

    from rlhf_toolkit.data.layout import packed

    half = torch.full((rows,), WIDTH // 2)
    layout = packed(torch.randint(100, 1000, (rows, WIDTH)), half, half).to(next(shared.parameters()).device)
    with torch.set_grad_enabled(gradient):
        out = shared(layout, roles=roles)
        if gradient:
            sum(out[name].sum() for name in ("policy_logprobs", "values") if name in out).backward()


if __name__ == "__main__":
    main()
