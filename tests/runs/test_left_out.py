"""Updates that are left out, in whole runs of one process: by a reward, in a deferred experience, in supervised runs,
and how many in a row end a run. On ranks: tests/distributed/test_not_finite_updates.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import zeros

from rlhf_toolkit.runs.inspection import inspect_batch
from rlhf_toolkit.trainers.kept_batches import MOST_KEPT, KeptBatch, read_kept_batch
from tests.support.forked import RecipeProcesses
from tests.support.launch import ROOT, run_recipe
from tests.support.tiny import merged, write_experiment, write_task
from tests.trainers.test_fine_tuning import KINDS, sections

UNDECIDED = """

def undecided(prompts, responses, **columns):
    scores = [len(response) / 10 for response in responses]
    return [float("nan") if prompt.startswith("w0") else score for prompt, score in zip(prompts, scores)]
"""
LOSSES = """
from rlhf_toolkit.trainers.ppo import PPOTrainer

real = PPOTrainer.micro_batch_loss


def spoiled(self, model, part, *, first=False):
    loss = real(self, model, part, first=first)
    return loss * float("nan") if self.state.global_step in {steps} else loss


PPOTrainer.micro_batch_loss = spoiled
"""
VALUES = """
from rlhf_toolkit.trainers.ppo import PPOTrainer

real = PPOTrainer.role_outputs


def spoiled(self, model, part):
    outputs = real(self, model, part)
    if self.state.global_step == 1:
        outputs["token_values"] = outputs.token_values * float("inf")
    return outputs


PPOTrainer.role_outputs = spoiled
"""
SUPERVISED = """
import runpy, sys
from rlhf_toolkit.trainers.fine_tuner import FineTuner

real = FineTuner.compute_loss


def spoiled(self, model, inputs, *args, **kwargs):
    loss = real(self, model, inputs, *args, **kwargs)
    return loss * float("nan") if self.state.global_step == 1 else loss


FineTuner.compute_loss = spoiled
runpy.run_path({recipe!r}, run_name="__main__")
"""


def a_run(folder: Path, recipe: RecipeProcesses, patch: str, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    task = merged(write_task(folder), changes)
    if "functions" in task["reward"]:
        del task["reward"]["function"]
    (folder / "reward.py").write_text((folder / "reward.py").read_text() + patch)
    return recipe.run("--config", str(write_experiment(folder / "run.yaml", task)))


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)), "JSON has no NaN"
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("asked", [{}, {"on_failure": "skip"}], ids=["by itself", "skip"])
def test_a_reward_that_is_not_finite_leaves_out_the_updates_with_its_responses(
    tmp_path: Path, recipe: RecipeProcesses, asked: dict[str, str]
) -> None:
    changes = {
        "reward.functions": [{"function": f"{tmp_path}/reward.py:undecided", **asked}],
        "ppo.mini_batches": 4,
        "ppo.num_rollouts": 3,  # each prompt once
        "run.most_not_finite": 12,
        "run.samples": 8,
    }
    a_run(tmp_path, recipe, UNDECIDED, **changes).succeeded()
    lines, samples = records(tmp_path), (tmp_path / "run/samples.jsonl").read_text().splitlines()
    scores = [(json.loads(line)["prompt"], json.loads(line)["score"]) for line in samples]
    bad = [prompt for prompt, score in scores if score is None]
    assert bad and all(prompt.startswith("w0") for prompt in bad) and "NaN" not in "".join(samples)
    assert len(bad) == sum(prompt.startswith("w0") for prompt, _ in scores)
    for line, begin in zip(lines, (0, 8, 16), strict=True):
        told = [score for _, score in scores[begin : begin + 8] if score is not None]
        assert line["critic/score/mean"] == pytest.approx(sum(told) / len(told), abs=1e-5)
    kept = [read_kept_batch(path) for path in (tmp_path / "run/skipped").iterdir()]
    rows = [math.isnan(value) for batch in kept for part in batch.parts for value in part["advantages"][:, 0].tolist()]
    assert sum(rows) == len(bad), "every such response is in an update that was left out"
    assert sum(line.get("train/not_finite_updates", 0) for line in lines) == len(kept) <= len(bad)
    assert all(any(part["advantages"].isnan().any() for part in batch.parts) for batch in kept)
    assert {batch.why for batch in kept} == {"train/loss is nan, since reward undecided gave no finite score"}


ESTIMATORS = ("gae", "grpo", "rloo", "reinforce_plus_plus", "remax")


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_a_reward_that_never_gives_a_finite_number_ends_the_run_by_its_name(
    tmp_path: Path, recipe: RecipeProcesses, advantage: str
) -> None:
    changes = {
        "reward.functions": [{"function": f"{tmp_path}/reward.py:never"}],
        "ppo.advantage": advantage,
        "ppo.num_rollouts": 4,
        "rollout.responses_per_prompt": 2,
        "run.most_not_finite": 1,
    }
    never = "\n\ndef never(prompts, responses, **columns):\n    return [float('inf')] * len(responses)\n"
    finished = a_run(tmp_path, recipe, never, **changes)
    (line,) = [line for line in finished.output.splitlines() if line.startswith("NotFiniteError: ")]
    expected = "NotFiniteError: train/loss is nan, since reward never gave no finite score at step 2: "
    assert finished.status == 1 and line.startswith(expected) and "rlhf inspect" in line


def test_a_deferred_experience_is_kept_whole(tmp_path: Path, recipe: RecipeProcesses) -> None:
    a_run(tmp_path, recipe, VALUES, **{"update.micro_batch_tokens": 512, "ppo.num_rollouts": 3}).succeeded()
    assert [line.get("train/not_finite_updates") for line in records(tmp_path)] == [None, 1.0, None]
    (folder,) = (tmp_path / "run/skipped").iterdir()
    (part,) = read_kept_batch(folder).parts
    assert len(part["row"]) == 8 and "old_logprobs" in part and not part["values"].isfinite().any()
    assert "values is not finite: it was so" in inspect_batch(folder).findings[0].words


def test_too_many_in_a_row_end_the_run_and_a_good_one_between_them_does_not(
    tmp_path: Path, recipe: RecipeProcesses
) -> None:
    changes = {"ppo.num_rollouts": 3, "ppo.mini_batches": 2, "run.most_not_finite": 1, "run.save_every": 1}
    finished = a_run(tmp_path / "good", recipe, LOSSES.format(steps="(0, 2, 4)"), **changes)
    finished.succeeded()
    assert [line["train/not_finite_updates"] for line in records(tmp_path / "good")] == [1.0] * 3
    assert "step 3 was left out: train/loss is nan; look at its batch with rlhf inspect " in finished.output
    finished = a_run(tmp_path / "bad", recipe, LOSSES.format(steps="(0, 2, 3)"), **changes)
    (line,) = [line for line in finished.output.splitlines() if line.startswith("NotFiniteError: ")]
    expected = (
        "NotFiniteError: train/loss is nan at step 4: all weights that lie here are finite, 2 updates in a row were"
    )
    assert finished.status == 1 and line.startswith(expected) and "rlhf inspect" in line
    assert [path.name for path in (tmp_path / "bad/run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("kind", KINDS)
def test_supervised_runs_leave_updates_out_too(tmp_path: Path, kind: str) -> None:
    experiment = merged(sections(tmp_path, kind, {}), {f"{kind}.batch_size": 4, "data.evaluation": None})
    script = tmp_path / "recipe.py"
    script.write_text(SUPERVISED.format(recipe=str(ROOT / f"recipes/{kind}.py")))
    run_recipe(write_experiment(tmp_path / "run.yaml", experiment), recipe=str(script)).succeeded()
    lines = records(tmp_path)
    assert [line.get("train/not_finite_updates") for line in lines][:3] == [None, 1.0, None] and len(lines) >= 3
    assert f"{kind}/loss" not in lines[1] and "train/loss" not in lines[1] and "train/loss" in lines[2]
    found = inspect_batch(tmp_path / "run/skipped/step-2")
    assert found.batch.kind == kind and not found.findings and all(map(math.isfinite, found.losses))


def test_no_more_than_a_few_batches_are_kept_and_none_beyond_its_size(tmp_path: Path) -> None:
    parts = [{"sequences": zeros(3, 10)} for _ in range(4)]
    places, losses = [(0, 0), (0, 1), (1, 0), (1, 1)], [1.0, 2.0, math.nan, 3.0]
    batch = KeptBatch("ppo", 1, parts, places, losses, "why")
    few = batch.within(2 * 120)
    assert few.places == [(1, 0), (0, 0)] and few.left_out == 2, "first those whose loss is not finite"
    assert batch.within(119).parts == []
    for step in range(1, MOST_KEPT + 3):
        place = KeptBatch("ppo", step, parts, places, losses, "why").write(tmp_path, None)
        assert (place is None) == (step > MOST_KEPT)
    assert len(list((tmp_path / "skipped").iterdir())) == MOST_KEPT
    again = KeptBatch("ppo", 2, parts[:1], places[:1], losses[:1], "why").write(tmp_path, None)
    assert again is not None and len(read_kept_batch(again).parts) == 1, "a resumed run replaces its own"
