"""Every recipe for a GPU fits on the hardware that its README names; and what an experiment says of its passes is what
the cutting of real rollouts makes of them."""

from __future__ import annotations

import re
import sys
from random import Random
from typing import Any

import pytest
import yaml
from transformers import Qwen2Config

from rlhf_toolkit.data.packing import packed_micro_batches, padded_micro_batches
from rlhf_toolkit.models.quantised import Quantisation
from rlhf_toolkit.planning.memory import Placement, place
from rlhf_toolkit.planning.sizes import kept_bytes
from rlhf_toolkit.rollout.sizes import RolloutSize, needs_of, sharding
from rlhf_toolkit.runs.algorithm import resolve
from rlhf_toolkit.runs.memory import rollout_size
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict, load_experiment
from tests.support.launch import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from common import GPU_SHAPES
from placements import CARD, COMMUNICATOR, CONTEXT, size_of

ON_A_CPU = "SmolLM2-135M"
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": GPU_SHAPES["0.5b"],
    "Qwen/Qwen2.5-1.5B-Instruct": GPU_SHAPES["1.5b"],
    "Qwen/Qwen2.5-7B-Instruct": GPU_SHAPES["7b"],
}


def gpu_recipes() -> list[str]:
    """Of PPO, by the model's name."""
    files = [path for path in sorted((ROOT / "recipes").glob("*/*.yaml")) if "rollout" in path.read_text()]
    return [
        f"{p.parent.name}/{p.name}" for p in files if ON_A_CPU not in yaml.safe_load(p.read_text())["model"]["name"]
    ]


def hardware(recipe: str) -> tuple[int, int, int]:
    """Cards, their GB and the ZeRO stage, as the README starts the recipe."""
    readme = (ROOT / "recipes" / recipe).with_name("README.md").read_text()
    (launch,) = re.findall(rf"--config_file (\S+) recipes/ppo\.py --config recipes/{recipe}", readme)
    config = yaml.safe_load((ROOT / launch).read_text())
    (said, gb) = re.findall(r"Meant for (\w+) GPUs? of (\d+) GB", readme)[0]
    assert config["num_processes"] == {"one": 1, "two": 2, "four": 4}[said]
    return config["num_processes"], int(gb), config.get("deepspeed_config", {}).get("zero_stage", 0)


def held_out(recipe: str) -> int:
    """Problems, as the README counts them."""
    readme = (ROOT / "recipes" / recipe).with_name("README.md").read_text()
    return int(re.findall(r"([\d,]+)(?: test problems,)? held[ -]out", readme)[0].replace(",", ""))


def placed(recipe: str, held_out: int, *, shares_heads: bool, changes: dict[str, Any] | None = None) -> Placement:
    ranks, gb, stage = hardware(recipe)
    experiment: Experiment = load_experiment(ROOT / "recipes" / recipe, changes)
    shape = SHAPES[experiment.model.name].settings()
    quantisation = Quantisation(experiment.model.quantization)
    model = size_of(Qwen2Config(vocab_size=151936, **shape), experiment.model.lora_rank, quantisation)
    how = sharding(model, ranks=ranks, stage=stage, on_cpu=False)
    longest = experiment.data.max_prompt_tokens
    size = rollout_size(experiment, resolve(experiment), longest, ranks=ranks, held_out=held_out, packing=True)
    needs = needs_of(model, how, RolloutSize(**{**vars(size), "shares_heads": shares_heads}), "exact")
    free = CARD * gb // 24 - CONTEXT - COMMUNICATOR - kept_bytes(model, how, moments=False)
    return place(needs, free=free, rows=size.rows, mode="auto", slots=None, sharded=how.sharded)


@pytest.mark.parametrize("shares_heads", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_every_recipe_for_a_gpu_fits_on_what_its_readme_names(shares_heads: bool) -> None:
    recipes = gpu_recipes()
    assert len(recipes) >= 5
    found = {recipe: placed(recipe, held_out(recipe), shares_heads=shares_heads) for recipe in recipes}
    assert {name: each for name, each in found.items() if each.slots < 64 or each.update > 0.95 * each.free} == {}


# ---- passes ----------------------------------------------------------------------------------------------------------

LONGEST, NEW, RANKS = 20, 30, 2
SECTIONS: dict[str, Any] = {
    "model": {"name": "any"},
    "data": {"train": "any", "max_prompt_tokens": LONGEST},
    "reward": {"function": "any:any"},
    "rollout": {"prompts_per_rollout": 16, "max_new_tokens": NEW},
}


def size_with(ppo: dict[str, Any], budget: int, *, held: int = 0, **rest: Any) -> RolloutSize:
    sections = {**SECTIONS, "ppo": ppo, "update": {"micro_batch_tokens": budget}, **rest}
    experiment: Experiment = experiment_from_dict(sections)
    return rollout_size(experiment, resolve(experiment), LONGEST, ranks=RANKS, held_out=held, packing=False)


def largest(rows: int, lengths: list[int], budget: int, *, packing: bool) -> int:
    """Tokens of the largest micro-batch of a role into which a mini-batch of ``rows`` is cut."""
    chosen = range(rows)
    if packing:
        prompts = [(row,) for row in chosen]
        batches = packed_micro_batches(chosen, lengths, prompts, ranks=RANKS, budget=budget)
        return max(sum(lengths[row] for row in batch) for share in batches for batch in share)
    batches = padded_micro_batches(chosen, lengths, ranks=RANKS, budget=budget)
    return max(len(batch) * max(lengths[row] for row in batch) for share in batches for batch in share)


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_no_pass_has_more_tokens_than_are_counted_and_full_rows_have_as_many(advantage: str) -> None:
    """Budgets below one row of each role, between, and beyond all rows: what lies beyond never occurs."""
    roles, columns, random = 2 if advantage == "gae" else 1, LONGEST + NEW, Random(0)
    for budget in (50, 99, 160, 410, 1000, 10**6):
        for mini_batches in (1, 2, 8):
            settings: dict[str, Any] = {
                "rollout": {**SECTIONS["rollout"], "responses_per_prompt": 2 if roles == 1 else 1}
            }
            size = size_with({"advantage": advantage, "mini_batches": mini_batches}, budget, **settings)
            counted, rows = size.update_tokens // roles, size.rows * RANKS // mini_batches
            assert (size.update_roles, size.role_pass_tokens, size.role_pass_roles) == (
                roles,
                size.update_tokens,
                roles,
            )
            of_role = budget // roles
            full = largest(rows, [columns] * rows, of_role, packing=False)
            assert full <= counted < full + columns
            for packing in (False, True):
                lengths = [random.randint(1, columns) for _ in range(rows)]
                assert largest(rows, lengths, of_role, packing=packing) <= counted


def test_an_evaluation_and_a_reward_adapter_score_all_their_rows_with_one_role() -> None:
    columns = LONGEST + NEW
    small = {"advantage": "gae", "mini_batches": 8}
    assert size_with(small, 10**6).role_pass_tokens == 2 * 1 * columns
    evaluated = size_with(small, 10**6, held=40)
    assert (evaluated.role_pass_tokens, evaluated.role_pass_roles) == (40 // RANKS * columns, 1)
    adapter = size_with(small, 10**6, reward={"adapter": "any"})
    assert (adapter.role_pass_tokens, adapter.role_pass_roles) == (16 // RANKS * columns, 1)


def test_a_budget_beyond_the_rollout_is_one_forward_pass_and_fits() -> None:
    """256 responses of at most 1024 tokens for four updates: 64 of two roles are a pass, and no million of tokens."""
    whole, beyond = (
        placed("gsm8k/ppo.yaml", 0, shares_heads=True, changes={"update.micro_batch_tokens": budget})
        for budget in (2 * 64 * 1024, 10**6)
    )
    assert whole == beyond
