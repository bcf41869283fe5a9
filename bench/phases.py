"""Peak bytes of tensors in each phase of a run on two ranks, against the planner's estimate.

    python bench/phases.py        # result in bench/results/phases.json; about 6 minutes

Every operation is watched, and every storage that it made or used counts until it is gone, as an allocator on a GPU
would count it; the process's own memory, which has libraries and the allocator's habits in it, does not come in.
Micro-batches are full, as the estimate takes them to be. Runs are of a random Llama under ZeRO-3 and ZeRO-2, two ranks
on the CPU; all phases are those of PPO's own loop. A model this small does not reach DeepSpeed's bounds on what
streaming keeps gathered, so that one of the streamed runs has smaller ones.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import SMOLLM, arguments, experiment, fetch_smollm, keep, prepared, rounded
from ranks import on_ranks, worker_or_bench
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANKS = 2
PHASES = ("start", "window", "role pass", "update")
SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CHANGES = {
    "ppo.num_rollouts": 3,  # from the second on ZeRO-3 knows the order of layers and the optimizer has its moments
    "ppo.mini_batches": 2,
    "ppo.first_ratio_tolerance": 100.0,
    "rollout.prompts_per_rollout": 32,
    "rollout.max_new_tokens": 40,
    "update.micro_batch_tokens": 1408,
    "update.packing": "off",
    "model.lora_rank": 8,
}


class Case(NamedTuple):
    """A run under ZeRO ``stage`` with ``changes`` of its experiment; ``bounds``: of what ZeRO-3 keeps gathered and of
    what it gathers ahead, in elements, instead of DeepSpeed's own."""

    stage: int
    changes: dict[str, Any]
    bounds: tuple[int, int] | None = None


# While streaming, ZeRO-3 learns the order of an update in its second micro-batch and gathers ahead from the third on.
STREAMED = {"rollout.mode": "stream", "update.micro_batch_tokens": 704}
CASES = {
    "ZeRO-3, window": Case(3, {}),
    "ZeRO-2": Case(2, {}),
    "ZeRO-3, window, checkpointing": Case(3, {"model.gradient_checkpointing": True}),
    "ZeRO-2, merged weights": Case(2, {"rollout.weights": "merged"}),
    "ZeRO-3, window, value on the policy's trunk": Case(
        3, {"model.value_on": "policy_trunk", "update.micro_batch_tokens": 704}
    ),
    "ZeRO-3, window, few slots": Case(3, {"rollout.slots": 6}),
    "ZeRO-3, streamed": Case(3, STREAMED),
    "ZeRO-3, streamed, small bounds": Case(3, STREAMED, (6 * 10**6, 10**6)),
}


def main() -> None:
    worker_or_bench(arguments(__doc__), worker, bench)


def bench(options: Any) -> None:
    """Every case: measured, estimated, and their ratio."""
    figures = rounded(all_cases(CASES))
    print(as_markdown(figures))
    keep("phases", figures, ranks=RANKS)


def as_markdown(figures: list[dict[str, Any]]) -> str:
    """The table of docs/zero3.md: estimated over measured, and MB measured."""
    lines = [["run", *PHASES], ["---"] * (1 + len(PHASES))]
    for found in figures:
        pairs = ((found["estimate_over_peak"][phase], found["peak"][phase] / 1e6) for phase in PHASES)
        lines.append([found["case"], *(f"{ratio:.2f} of {peak:.0f}" for ratio, peak in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def all_cases(cases: dict[str, Case]) -> list[dict[str, Any]]:
    """One figure for each case."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        return [figure(name, case, folder) for name, case in cases.items()]


def figure(name: str, case: Case, folder: str) -> dict[str, Any]:
    """The largest of the ranks' peaks in each phase, what was expected, and expected over measured."""
    job = {"model": folder, "changes": {**CHANGES, **case.changes}, "bounds": case.bounds}
    found = on_ranks(__file__, job, ranks=RANKS, stage=case.stage)
    ratios = {phase: found["estimate"][phase] / found["peak"][phase] for phase in PHASES}
    return {"case": name, **found, "estimate_over_peak": ratios}


def write_model(folder: Path) -> None:
    """A Llama with random weights in bfloat16, and SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm())
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE, **ends)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- on each rank ----------------------------------------------------------------------------------------------------


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages that an operation has made or used and that are still there, and the most there were in
    each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.now, self.peaks = PHASES[0], 0, dict.fromkeys((*PHASES, "between"), 0)
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        """Weights in a kernel's own order have no storage to ask: then it is the tensor that counts."""
        owner: Any = tensor.untyped_storage() if tensor.layout == torch.strided else tensor
        key, size = owner._cdata if owner is not tensor else id(tensor), owner.nbytes
        size = size() if callable(size) else size
        if key in self._known or not size:
            return

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        self._known[key] = weakref.ref(owner, gone)
        self.now += size

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, peaks count for ``phase``."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose peaks count for ``phase``."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        return inside


def worker(job: dict[str, Any]) -> None:
    """Run the experiment with every storage watched; rank 0 writes the peaks and the estimate."""
    from rlhf_toolkit.distributed.collectives import all_gather

    if job["bounds"]:
        set_bounds(*job["bounds"])
    live = LiveTensors()
    sections = experiment(SMOLLM, Path(job["folder"]), {"model.name": job["model"], **job["changes"]})
    with live:
        run = prepared(sections, stops=False)
        watch(run, live)
        run.train()
    ranks = all_gather({phase: live.peaks[phase] for phase in PHASES})
    if run.topology.is_main:
        peak = {phase: max(rank[phase] for rank in ranks) for phase in PHASES}
        sampler = run.trainer.maker.scored_sampler.sampler
        placed = {name: getattr(sampler.placement, name) for name in ("mode", "slots", "prefill_tokens")}
        found = {"peak": peak, "estimate": sampler.estimate.phases(sampler.placement), "placement": placed}
        Path(job["result"]).write_text(json.dumps(found))


def set_bounds(live: int, prefetched: int) -> None:
    """What ZeRO-3 may keep gathered and gather ahead, in elements, for the engine and the estimate alike."""
    from rlhf_toolkit.distributed import topology
    from rlhf_toolkit.rollout import sizes

    for module in (topology, sizes):
        vars(module).update(LIVE_PARAMETERS=live, PREFETCHED_PARAMETERS=prefetched)


def watch(run: Any, live: LiveTensors) -> None:
    """Tell ``live`` which phase is under way. The start ends when the first rollout opens."""
    from rlhf_toolkit.rollout import scored_sampler

    sampler, trainer = run.trainer.maker.scored_sampler.sampler, run.trainer
    opened = sampler.opened

    @contextmanager
    def opened_window(model: Any) -> Iterator[Any]:
        sampler.place(model)
        live.phase = "window"
        with opened(model) as shared:
            yield shared
        live.phase = "between"

    sampler.opened = opened_window
    watched = live.watched("role pass", vars(scored_sampler)["run_role_pass"])
    vars(scored_sampler)["run_role_pass"] = watched
    trainer.training_step = live.watched("update", trainer.training_step)


if __name__ == "__main__":
    main()
