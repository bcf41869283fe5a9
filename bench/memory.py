"""Peak memory of sampling, role pass and update, by the micro-batch's tokens and by the roles that run; and of whole
runs with all four roles against the policy alone.

    python bench/memory.py        # result in bench/results/memory.json; about 5 minutes

One process for each line: on a CPU its peak resident memory, on a GPU what torch allocated. What a phase adds is its
peak less that of the model loaded and idle. On a CPU large blocks go back to the system as soon as they are freed;
glibc would keep some of them, by chance more in one process than in another.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from common import SMOKE, arguments, experiment, keep, model_folder, models, peak_memory_gib, prepared, rounded
from ranks import on_ranks, worker_or_bench

TOKENS = (256,) if SMOKE else (1024, 2048, 4096)
PASSES = ("update",) if SMOKE else ("role pass", "update")  # the whole runs score too
ROLES = {"policy": ("policy",), "+value": ("policy", "value"), "+reference": ("policy", "value", "reference")}
WIDTH = 128
RUN_TOKENS = 1024
RUN = {
    "rollout.prompts_per_rollout": 2 if SMOKE else 16,
    "rollout.responses_per_prompt": 2,
    "ppo.mini_batches": 2,  # in the second update the optimizer's moments are there
    "update.micro_batch_tokens": RUN_TOKENS,
}


def main() -> None:
    worker_or_bench(arguments(__doc__), worker, bench)


def bench(options: Any) -> None:
    """Every model of the set."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    names = models(options.set)
    runs = [whole_runs(model) for model in names]
    keep("memory", rounded([line for model in names for line in lines(model)]), runs=rounded(runs))


def whole_runs(model: str) -> dict[str, Any]:
    """A run of PPO with policy, value, reference and reward, each an adapter of its own, over one of the policy alone:
    same rollout, same micro-batch; with the interpreter and its libraries and without."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(__file__, {"model": model, "phase": "adapters", "adapters": folder}, ranks=1, stage=None)
        alone = {"ppo.advantage": "grpo", "ppo.kl_coef": 0.0}
        together = {"model.policy_adapter": f"{folder}/policy", "reward.adapter": f"{folder}/reward"}
        policy, four = (
            on_ranks(
                __file__,
                {"model": model, "phase": "run", "changes": {**RUN, **changes}},
                ranks=1,
                stage=None,
                seconds=1200,
            )
            for changes in (alone, together)
        )
    own = [one["peak_gib"] - one["libraries_gib"] for one in (policy, four)]
    return {
        "model": model,
        "micro_batch_tokens": RUN_TOKENS,
        "policy": policy,
        "four_roles": four,
        "ratio": four["peak_gib"] / policy["peak_gib"],
        "ratio_without_libraries": own[1] / own[0],
    }


def lines(model: str) -> list[dict[str, Any]]:
    """One line for each phase, number of tokens and set of roles."""
    idle = measure(model, "idle", 0, "policy")
    rollout = measure(model, "rollout", 16 * WIDTH, "policy")
    passes = [
        measure(model, phase, tokens, roles)
        for phase, tokens, roles in itertools.product(PASSES, TOKENS, ROLES)
        if (phase, roles) != ("update", "+reference")  # the update never runs the reference
        and (roles == "+value" or not SMOKE)
    ]
    return [{**line, "added_gib": line["peak_gib"] - idle["peak_gib"]} for line in (idle, rollout, *passes)]


def measure(model: str, phase: str, tokens: int, roles: str) -> dict[str, Any]:
    """Peak memory of a process that loads the model and runs one phase."""
    job = {"model": model, "phase": phase, "tokens": tokens, "roles": roles}
    return {**job, **on_ranks(__file__, job, ranks=1, stage=None)}


def worker(job: dict[str, Any]) -> None:
    """Run one phase once; the peak is the process's, and beside a rollout's stands the planner's estimate of it."""
    parts = {"adapters": write_adapters, "run": run_whole}
    found = parts[job["phase"]](job) if job["phase"] in parts else run_phase(job)
    Path(job["result"]).write_text(json.dumps(found))


def write_adapters(job: dict[str, Any]) -> dict[str, Any]:
    """A policy to start from and a reward with its head, of rank 16 like those that the run makes."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from rlhf_toolkit.models.roles import POLICY, REWARD
    from rlhf_toolkit.models.shared_base import NOWHERE, SharedBase

    base = AutoModelForCausalLM.from_pretrained(model_folder(job["model"]), dtype=torch.bfloat16)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    roles = (POLICY, REWARD)
    shared = SharedBase(base, dict.fromkeys(roles, adapter), trained=roles, value_on=NOWHERE)
    for parameter in shared.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.01)
    shared.save_pretrained(job["adapters"])
    return {}


def run_whole(job: dict[str, Any]) -> dict[str, Any]:
    """A run from preparation to its end, and what the process held before it began."""
    import rlhf_toolkit.runs.ppo  # noqa: F401  all libraries

    libraries = peak_memory_gib()
    run = prepared(experiment(job["model"], Path(job["folder"]), job["changes"]), stops=False)
    run.train()
    roles = sorted(set(run.trainer.model.peft_config))
    return {
        "adapters": roles,
        "libraries_gib": libraries,
        "peak_gib": peak_memory_gib(),
        "bases": bases_held(run.trainer.model),
    }


def bases_held(shared: Any) -> float:
    """How many copies of the base lie in this process: all storages of tensors that have the shape and dtype of one of
    its matrices, over the base's own."""
    import torch

    frozen = [p for name, p in shared.named_parameters() if "lora_" not in name and p.dim() > 1]
    kinds = {(p.shape, p.dtype) for p in frozen}
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    alike = [each for each in tensors if (each.shape, each.dtype) in kinds]
    held, own = (
        sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in group}.values())
        for group in (alike, frozen)
    )
    return held / own


def run_phase(job: dict[str, Any]) -> dict[str, Any]:
    """The model loaded and idle, or one rollout, role pass or update."""
    changes = {"rollout.max_new_tokens": WIDTH // 2, "update.micro_batch_tokens": max(job["tokens"], 4096)}
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(experiment(job["model"], Path(folder, "run"), changes), stops=False)
        trainer = run.trainer
        shared = trainer.model.to(run.topology.device)
        estimates = {}
        if job["phase"] == "rollout":
            from rlhf_toolkit.types import PromptBatch

            batch, sampler = (
                PromptBatch(tuple(trainer.maker.source.prompts[:16]), (0,) * 16),
                trainer.maker.scored_sampler.sampler,
            )
            estimates["estimate_gib"] = sampler.place(shared).needed / 2**30
            with sampler.opened(shared):
                sampler.decode(shared, batch, trainer.maker.scored_sampler.sampling, stream=(0,))
        elif job["phase"] != "idle":
            forward(shared, job["tokens"] // WIDTH, ROLES[job["roles"]], gradient=job["phase"] == "update")
    return {"peak_gib": peak_memory_gib(), **estimates}


def forward(shared: Any, rows: int, roles: tuple[str, ...], *, gradient: bool) -> None:
    """One pass of ``roles`` over rows of WIDTH tokens, half of them response, and its backward for an update."""
    import torch

    from rlhf_toolkit.data.layout import packed_layout

    half = torch.full((rows,), WIDTH // 2)
    layout = packed_layout(torch.randint(100, 1000, (rows, WIDTH)), half, half).to(next(shared.parameters()).device)
    with torch.set_grad_enabled(gradient):
        out = shared(layout, roles=roles)
        if gradient:
            sum(out[name].sum() for name in ("policy_logprobs", "values") if name in out).backward()


if __name__ == "__main__":
    main()
