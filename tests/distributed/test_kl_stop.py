"""An update that ``ppo.kl_stop`` leaves out changes no bit of what is trained, nor of the optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task

WATCH = '''
import hashlib, json, os
from pathlib import Path

from rlhf_toolkit.trainers.ppo import PPOTrainer
from tests.support.tiny import REWARD

exec(REWARD)
real_step, real_save = PPOTrainer.training_step, PPOTrainer.save_model


def digest(trainer):
    """Of what this rank holds: parameters, or its shards of them, the optimizer's moments and its counts."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
        optimizer = optimizer.optimizer
    held = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters() if p.requires_grad]
    moments = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    tensors = [t.detach().cpu().float().contiguous().numpy().tobytes() for t in [*held, *optimizer.state, *moments]]
    return hashlib.sha256(b"".join(tensors)).hexdigest(), len(moments)


def note(trainer, kind):
    found, moments = digest(trainer)
    line = {"kind": kind, "digest": found, "moments": moments, "left_out": trainer._left_out}
    with (Path(__file__).parent / f"rank{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")


def step(self, model, inputs, num_items_in_batch=None):
    note(self, "before")
    loss = real_step(self, model, inputs, num_items_in_batch)
    note(self, "after")
    return loss


def save(self, *args, **kwargs):
    note(self, "end")
    return real_save(self, *args, **kwargs)


PPOTrainer.training_step, PPOTrainer.save_model = step, save
'''


@pytest.mark.parametrize(
    ("processes", "stage"), [(1, None), (2, 3), (2, 2)], ids=["one process", "two ranks, ZeRO-3", "two ranks, ZeRO-2"]
)
def test_an_update_that_is_left_out_changes_no_bit(tmp_path: Path, processes: int, stage: int | None) -> None:
    changes = {
        "ppo.kl_stop": 0.0006,
        "ppo.num_rollouts": 2,
        "ppo.num_ppo_epochs": 2,
        "ppo.mini_batches": 2,
        "rollout.responses_per_prompt": 2,
        "update.weight_decay": 0.1,  # would move parameters that have no gradient
        "update.schedule": "linear",
    }
    task = merged(write_task(tmp_path), changes)
    (tmp_path / "reward.py").write_text(WATCH)
    run_recipe(write_experiment(tmp_path / "run.yaml", task), processes=processes, stage=stage).succeeded()
    left_out = []
    for rank in range(processes):
        lines = [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()]
        assert len(lines) == 2 * 8 + 1 and lines[-1]["moments"] >= 6, "three groups of parameters have two each"
        before, after, following = lines[0:-1:2], lines[1::2], lines[2::2]
        for number, (one, same, other) in enumerate(zip(before, after, following, strict=True)):
            if same["left_out"]:
                assert one["digest"] == same["digest"] == other["digest"], f"step {number} changed something"
            else:
                assert one["digest"] != other["digest"], f"step {number} changed nothing"
        left_out.append([line["left_out"] for line in after])
    assert all(each[:4] == [False, False, True, True] for each in left_out)
    assert all(each == left_out[0] for each in left_out)
