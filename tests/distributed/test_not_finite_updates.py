"""An update in which a number is not finite changes no bit, on all ranks together, and the run goes on as if it had not
been there. What is planted is planted on one rank alone; the oracle is a run that never makes those updates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.trainers.kept_batches import read_kept_batch
from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task

PLANTED = {2: "a loss is NaN", 4: "a gradient is NaN", 5: "a loss is infinite", 6: "logits are NaN"}
"""By number of the update, from 0, of two rollouts of four. An infinite loss has finite gradients here."""
WATCH = '''
import hashlib, json, os
from pathlib import Path

import torch
from rlhf_toolkit.distributed.zero3 import own_part
from rlhf_toolkit.trainers.ppo import PPOTrainer
from tests.support.tiny import REWARD

exec(REWARD)
PLANTED, RANK = {planted}, int(os.environ.get("RANK", "0"))
LAST = int(os.environ.get("WORLD_SIZE", "1")) - 1
real_step, real_loss, real_save = PPOTrainer.training_step, PPOTrainer.micro_batch_loss, PPOTrainer.save_model


def digest(trainer):
    """Of what this rank holds: parameters, or its shards of them, the optimizer's moments and its counts."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
        optimizer = optimizer.optimizer
    held = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters() if p.requires_grad]
    moments = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    tensors = [t.detach().cpu().float().contiguous().numpy().tobytes() for t in [*held, *optimizer.state, *moments]]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def weights(trainer):
    """The same of parameters alone, without the padding of shards, which is whatever lay in memory."""
    parts = [own_part(p)[0].contiguous().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def note(trainer, kind):
    rates = trainer.lr_scheduler.get_last_lr()
    line = {{"kind": kind, "digest": digest(trainer), "weights": weights(trainer), "rates": rates}}
    with (Path(__file__).parent / f"rank{{RANK}}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")


def step(self, model, inputs, num_items_in_batch=None):
    note(self, "before")
    never = {never} and self.state.global_step in PLANTED
    loss = torch.zeros(()) if never else real_step(self, model, inputs, num_items_in_batch)
    note(self, "after")
    return loss


def micro_batch_loss(self, model, part, *, first=False):
    fault = PLANTED.get(self.state.global_step) if RANK == LAST else None
    handles = []
    if fault == "logits are NaN":
        spoil = lambda module, args, output: output * float("nan")
        handles = [self.model.causal_lm.base_model.norm.register_forward_hook(spoil)]
    loss = real_loss(self, model, part, first=first)
    for handle in handles:
        handle.remove()
    if fault == "a loss is NaN":
        loss = loss * float("nan")
    if fault == "a loss is infinite":
        loss = loss + float("inf")
    if fault == "a gradient is NaN":
        trained = next(p for p in self.model.parameters() if p.requires_grad)
        handle = trained.register_hook(lambda gradient: handle.remove() or gradient * float("nan"))
    return loss


def save(self, *args, **kwargs):
    note(self, "end")
    return real_save(self, *args, **kwargs)


PPOTrainer.training_step, PPOTrainer.micro_batch_loss, PPOTrainer.save_model = step, micro_batch_loss, save
'''
CHANGES = {
    "ppo.num_rollouts": 2,
    "ppo.num_ppo_epochs": 2,
    "ppo.mini_batches": 2,
    "rollout.responses_per_prompt": 2,
    "update.weight_decay": 0.1,  # would move parameters that have no gradient
    "update.schedule": "linear",
    "update.micro_batch_tokens": 64,
}


def a_run(
    folder: Path, processes: int, stage: int | None, *, never: bool, **changes: Any
) -> list[list[dict[str, Any]]]:
    """What each rank noted of a run in which the updates of ``PLANTED`` are spoiled, or ``never`` made."""
    folder.mkdir()
    task = merged(write_task(folder), CHANGES | changes)
    (folder / "reward.py").write_text(WATCH.format(planted=PLANTED, never=never))
    run_recipe(write_experiment(folder / "run.yaml", task), processes=processes, stage=stage).succeeded()
    files = [folder / f"rank{rank}.jsonl" for rank in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(
    ("processes", "stage", "dtype"),
    [(1, None, "float32"), (2, 3, "bfloat16"), (2, 2, "float32")],
    ids=["one process", "two ranks, ZeRO-3", "two ranks, ZeRO-2"],
)
def test_an_update_that_is_not_finite_is_as_if_it_had_not_been(
    tmp_path: Path, processes: int, stage: int | None, dtype: str
) -> None:
    found = a_run(tmp_path / "spoiled", processes, stage, never=False, **{"model.dtype": dtype})
    expected = a_run(tmp_path / "never", processes, stage, never=True, **{"model.dtype": dtype})
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert len(ours) == 2 * 8 + 1
        for number, (before, after) in enumerate(zip(ours[0:-1:2], ours[1::2], strict=True)):
            same = before["digest"] == after["digest"]
            # Without DeepSpeed it is Trainer that steps, after this.
            assert same or (stage is not None and number not in PLANTED), f"rank {rank}, update {number}"
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            for name in ("weights", "rates"):
                assert one[name] == other[name], f"rank {rank}, {name} {one['kind']} update {number // 2}"
        assert len({line["digest"] for line in ours}) == 8 - len(PLANTED) + 1, "the other updates were made"
    lines = [json.loads(line) for line in (tmp_path / "spoiled/run/log.jsonl").read_text().splitlines()]
    assert [line.get("train/not_finite_updates") for line in lines if line["kind"] == "train"] == [1.0, 3.0]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)), "JSON has no NaN"
    for number, fault in PLANTED.items():
        kept = read_kept_batch(tmp_path / f"spoiled/run/skipped/step-{number + 1}")
        assert {rank for rank, _ in kept.places} == set(range(processes))
        assert sum(len(part["row"]) for part in kept.parts) == 8
        in_loss = "loss" in fault or "logits" in fault
        wrong = {rank for (rank, _), loss in zip(kept.places, kept.losses, strict=True) if not math.isfinite(loss)}
        assert wrong == ({processes - 1} if in_loss else set()), fault
