"""A trained tensor that no loss reaches is named at the first update, in every kind of run, before anything moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers import first_gradients
from rlhf_toolkit.trainers.first_gradients import FirstGradients
from tests.support.launch import run_recipe
from tests.support.roles import tiny_shared
from tests.support.tiny import REWARD, merged, write_experiment, write_task
from tests.trainers.test_fine_tuning import prepared as prepared_adapter
from tests.trainers.test_full_fine_tuning import prepared as prepared_whole

NAMED = (
    r"^model\.layers\.0\.mlp\.unused\.lora_A\.{role}\.weight has had no gradient in the first update, one of {count} "
    r"such tensors: the model does not call model\.layers\.0\.mlp\.unused, or reads its weight itself, so that it "
    r"would never learn; set model\.exclude_modules: \[unused\]$"
)
PLANT = """
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

own = LlamaMLP.__init__


def with_more(self, config):
    own(self, config)
    self.unused = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


LlamaMLP.__init__ = with_more
"""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer in every MLP of Llama that nobody calls: all-linear adapts it."""
    own: Any = LlamaMLP.__init__

    def with_more(self: Any, config: Any) -> None:
        own(self, config)
        self.unused = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    monkeypatch.setattr(LlamaMLP, "__init__", with_more)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def ppo(folder: Path, **changes: Any) -> Any:
    return prepare(experiment_from_dict(merged(write_task(folder), changes)))


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("kind", ["ppo", "sft", "reward_model", "dpo"])
def test_an_adapted_layer_that_is_not_called_is_named_before_anything_moves(tmp_path: Path, kind: str) -> None:
    run: Any = ppo(tmp_path) if kind == "ppo" else prepared_adapter(tmp_path, kind)
    before = weights(run.trainer.model)
    role, count = {"ppo": ("policy", 8), "reward_model": ("reward", 4)}.get(kind, ("policy", 4))
    with pytest.raises(ModelError, match=NAMED.format(role=role, count=count)):
        run.train()
    after = weights(run.trainer.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("planted")
def test_its_way_out_is_one(tmp_path: Path) -> None:
    prepared_adapter(tmp_path, "sft", **{"model.exclude_modules": ["unused"]}).train()


@pytest.mark.usefixtures("planted")
def test_a_model_trained_as_a_whole_is_told_of_a_layer_that_is_not_called(tmp_path: Path) -> None:
    run = prepared_whole(tmp_path)
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.mlp\.unused\.weight .*one of 2 such.* train an adapter"):
        run.train()


@pytest.mark.usefixtures("planted")
def test_two_ranks_under_zero3_both_stop(tmp_path: Path) -> None:
    """The plant is in the file of the reward, which every rank reads before it loads the model."""
    task = write_task(tmp_path)
    (tmp_path / "reward.py").write_text(PLANT + REWARD)
    found = run_recipe(write_experiment(tmp_path / "run.yaml", task), processes=2, stage=3, seconds=120)
    assert found.status == 1 and "model.layers.0.mlp.unused.lora_A.policy.weight has had no gradient" in found.output
    assert "of 8 such tensors" in found.output and not list((tmp_path / "run").glob("checkpoint-*"))


def test_zeros_count_and_so_does_what_another_rank_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's A while B is zero; a value whose loss is multiplied by 0; a tensor that only another rank's rows reach."""
    shared = tiny_shared()
    first, *others = [name for name, p in shared.named_parameters() if p.requires_grad]

    def told(*seen: list[str]) -> None:
        """What this rank and others lack."""
        monkeypatch.setattr(first_gradients, "all_gather", lambda mine: [mine, *seen])
        watch = FirstGradients()
        watch.watch(shared)
        watch.watch(shared)  # the update is made again
        sum(0.0 * shared.get_parameter(name).sum() for name in others).backward()  # type: ignore[union-attr]
        watch.check()
        watch.watch(shared)
        watch.check()

    told(others)
    with pytest.raises(ModelError, match=r"lora_A\.policy\.weight has had no gradient .* one of 1 such"):
        told([first, *others])
    assert all(p._backward_hooks is None or not p._backward_hooks for p in shared.parameters())
