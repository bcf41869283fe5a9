"""A run that leaves passes out ends where one ends that ran them all, also on two ranks and when it is resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.forked import RecipeProcesses
from tests.support.launch import ROOT, run_recipe
from tests.support.tiny import merged, write_experiment, write_task
from tests.support.values import named

SCORE_EVERYTHING = """
from rlhf_toolkit.rollout import role_pass

roles = role_pass.Needs.roles
role_pass.Needs.roles = lambda self, rollout, one_forward: roles(self, rollout=0, one_forward=one_forward)
role_pass.Needs.defers = lambda self, rollout, one_forward: False
"""
OTHER_SAMPLER = """
from dataclasses import replace
from rlhf_toolkit.rollout import sampler

real_decode = sampler.decode


def decode(*args, **kwargs):
    rollout = real_decode(*args, **kwargs)
    noise = (rollout.responses * 1.7 + rollout.lengths[:, None]).sin()  # the same for a row, whatever the ranks
    return replace(rollout, rollout_logprobs=rollout.rollout_logprobs + 0.5 * noise)


sampler.decode = decode
"""
ONE_UPDATE = {"ppo.num_rollouts": 4, "ppo.kl_coef": 0.0, "ppo.entropy_coef": 0.01, "update.micro_batch_tokens": 32}
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "no KL": ({}, {"value"}),
    "KL in the loss": ({"ppo.kl_in": "loss", "ppo.kl_coef": 0.1}, {"value", "reference"}),
    "no KL, two updates": ({"ppo.mini_batches": 2}, {"policy", "value"}),
    "token weights": ({"ppo.importance_correction": "token", "ppo.first_ratio_tolerance": 1.0}, {"value"}),
    "sequence weights": (
        {
            "ppo.importance_correction": "sequence",
            "rollout.repetition_penalty": 1.2,
            "ppo.first_ratio_tolerance": 1.0,
            "ppo.truncated": "mask",
            "rollout.max_new_tokens": 20,
        },
        {"value"},
    ),
    "value on the policy's trunk": ({"model.value_on": "policy_trunk"}, {"value"}),
    "no critic": ({"ppo.advantage": "grpo", "rollout.responses_per_prompt": 2, "ppo.kl_coef": 0.0}, set()),
    "no critic, one pass, KL in the reward": (
        {
            "ppo.advantage": "rloo",
            "rollout.responses_per_prompt": 2,
            "ppo.kl_coef": 0.1,
            "update.micro_batch_tokens": 512,
        },
        {"reference"},
    ),
    "one pass": ({"update.micro_batch_tokens": 512}, set()),
    "one pass, KL in the reward": (
        {
            "update.micro_batch_tokens": 512,
            "ppo.kl_coef": 0.1,
            "ppo.kl_target": 0.01,
            "ppo.kl_horizon": 100,
            "ppo.truncated": "bootstrap",
        },
        {"reference"},
    ),
    "one pass, token weights": (
        {
            "update.micro_batch_tokens": 512,
            "ppo.importance_correction": "token",
            "rollout.top_p": 0.9,
            "ppo.first_ratio_tolerance": 1.0,
            "ppo.truncated": "mask",
            "rollout.max_new_tokens": 20,
        },
        set(),
    ),
}
NEVER_WITHOUT_A_KL = {"actor/ref_kl", "actor/ref_kl_k3", "actor/reward_kl_penalty"}
NEVER_WITHOUT_A_POLICY_PASS = {"actor/first_ratio_deviation", "actor/first_ratio_mean_deviation"}


def experiment(folder: Path, changes: dict[str, Any], *patches: str) -> Path:
    """``patches`` go into the reward's file, which every rank imports."""
    folder.mkdir(exist_ok=True)
    task = merged(write_task(folder), {**ONE_UPDATE, **changes})
    with (folder / "reward.py").open("a") as file:
        file.writelines(patches)
    return write_experiment(folder / "run.yaml", task)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "run").glob("*/*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf", "kind"))} for line in lines]


def assert_same(skipped: Path, everything: Path) -> None:
    """Parameters, and every metric that both have."""
    expected, found = trained(everything), trained(skipped)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=named(name))
    assert all(tensor.any() for name, tensor in found.items() if "lora_B" in name), "an adapter never moved"
    for one, other in zip(records(skipped), records(everything), strict=True):
        assert one.keys() <= other.keys()
        assert one == pytest.approx({name: other[name] for name in one}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_one_process_leaves_out_passes_and_trains_the_same(recipe: RecipeProcesses, tmp_path: Path, case: str) -> None:
    changes, roles = CASES[case]
    outputs = []
    for name, patches in (("skipped", ()), ("everything", (SCORE_EVERYTHING,))):
        path = experiment(tmp_path / name, changes, OTHER_SAMPLER if "weights" in case else "", *patches)
        outputs.append(recipe.run("--config", str(path)).succeeded().output)
    assert_same(tmp_path / "skipped", tmp_path / "everything")
    asked = ", ".join(r for r in ("policy", "value", "reference") if r in roles) or "nobody"
    assert (
        f"where an update is one pass, {asked}" if "one pass" in case else f"the role pass asks {asked}"
    ) in outputs[0]
    first, *later = records(tmp_path / "skipped")
    absent = first.keys() - later[0].keys()
    expected = set() if "reference" in roles else NEVER_WITHOUT_A_KL
    assert absent == expected | (set() if "policy" in roles else NEVER_WITHOUT_A_POLICY_PASS)
    assert all(record.keys() == later[0].keys() for record in later)
    documented = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE))
    assert first.keys() <= documented | {"rollout"}


def test_the_weights_matter(recipe: RecipeProcesses, tmp_path: Path) -> None:
    """Otherwise the cases above would say nothing about them."""
    changes, _ = CASES["token weights"]
    for name, more in (("with", {}), ("without", {"ppo.importance_correction": "none"})):
        path = experiment(tmp_path / name, {**changes, **more}, OTHER_SAMPLER)
        recipe.run("--config", str(path)).succeeded()
    first, *_ = records(tmp_path / "with")
    assert 0.5 < first["rollout/importance_ess"] < 0.99 and first["rollout/importance_mean"] != pytest.approx(
        1, abs=0.01
    )
    pairs = [(t, trained(tmp_path / "without")[name]) for name, t in trained(tmp_path / "with").items()]
    assert max((one - other).abs().max().item() for one, other in pairs) > 1e-3


@pytest.mark.parametrize("case", ["token weights", "value on the policy's trunk", "one pass, KL in the reward"])
def test_two_ranks_under_zero3_leave_out_passes_and_train_the_same(
    recipe: RecipeProcesses, tmp_path: Path, case: str
) -> None:
    """Against two ranks that ran every pass to 1e-6, and against one process to 1e-5, as everywhere."""
    changes, sampler = CASES[case][0], OTHER_SAMPLER if "weights" in case else ""
    changes = changes if "KL" in case else {**changes, **CASES["KL in the loss"][0]}
    for name, patches in (("skipped", ()), ("everything", (SCORE_EVERYTHING,))):
        run_recipe(experiment(tmp_path / name, changes, sampler, *patches), processes=2, stage=3).succeeded()
    assert_same(tmp_path / "skipped", tmp_path / "everything")
    recipe.run("--config", str(experiment(tmp_path / "alone", changes, sampler))).succeeded()
    found = trained(tmp_path / "skipped")
    for name, tensor in trained(tmp_path / "alone").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=named(name))
