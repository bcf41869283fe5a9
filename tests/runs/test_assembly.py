"""What is built from an experiment keeps the sizes that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.tiny import merged, write_task
from tests.trainers.test_fine_tuning import prepared

# ---- the budget of an update's forward pass --------------------------------------------------------------------------


def largest_pass(run: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most tokens, over all rows of all roles, that went through the base in a pass with a gradient."""
    seen, shared = [0], run.trainer.model
    real = shared.forward

    def watched(layout: Any, *, roles: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(len(shared.trunks(roles)) * layout.tokens.numel())
        return real(layout, roles=roles, **options)

    monkeypatch.setattr(shared, "forward", watched)
    run.train()
    return max(seen)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model.value_on": "policy_trunk"}, {"ppo.advantage": "grpo", "rollout.responses_per_prompt": 2}],
    ids=["policy and value", "policy trunk", "no value"],
)
def test_roles_that_train_together_share_the_budget(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And use it: a value must not cost the policy alone its micro-batches."""
    run = prepare(experiment_from_dict(merged(write_task(tmp_path), {"ppo.num_rollouts": 1, **changes})))
    assert 32 < largest_pass(run, monkeypatch) <= 64


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_so_do_policy_and_reference_of_dpo(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path, kind, **{"update.micro_batch_tokens": 64})
    assert 32 < largest_pass(run, monkeypatch) <= 64
