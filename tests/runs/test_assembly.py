"""Settings that would do nothing are refused before anything is loaded: in one line, with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS
from rlhf_toolkit.algorithms.policy_losses import POLICY_LOSSES
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.settings.configs import PPOConfig
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.runs.assembly import check_algorithm, estimator_of, policy_loss_of
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.runs.run import Run
from tests.support.tiny import merged, write_task
from tests.trainers.test_fine_tuning import prepared

OWN = """
def plain(rewards, mask):
    return rewards, rewards


def with_values(rewards, mask, values):
    return rewards - values, rewards


def with_end(rewards, mask, bootstrap):
    return rewards, rewards


def loss(logprobs, mask):
    return -logprobs


def picky_loss(logprobs, mask, selected):
    return -logprobs
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def refused(**settings: Any) -> str:
    """The message, of one line."""
    with pytest.raises(ConfigError) as caught:
        check_algorithm(PPOConfig(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"advantage": "grpo", "gamma": 0.9},
            "ppo.gamma=0.9 does nothing under ppo.advantage=grpo; leave it at 1.0",
        ),
        (
            {"advantage": "vapo", "gae_lambda": 0.9},
            "ppo.gae_lambda=0.9 does nothing under ppo.advantage=vapo; leave it at 0.95",
        ),
        (
            {"policy_loss": "gpg", "clip_range_high": 0.3},
            "ppo.clip_range_high=0.3 does nothing under ppo.policy_loss=gpg; leave it at 0.2",
        ),
        (
            {"policy_loss": "gspo", "dual_clip": 3.0},
            "ppo.dual_clip=3.0 does nothing under ppo.policy_loss=gspo; leave it at None",
        ),
    ],
)
def test_a_setting_that_the_function_does_not_take(settings: dict[str, Any], message: str) -> None:
    assert refused(**settings) == message


@pytest.mark.parametrize(("name", "value"), [("truncated", "bootstrap"), ("value_warmup_rollouts", 2)])
@pytest.mark.parametrize("advantage", ["grpo", "remax", "reinforce_plus_plus"])
def test_what_needs_a_value_function(advantage: str, name: str, value: Any) -> None:
    assert refused(advantage=advantage, **{name: value}) == (
        f"ppo.{name}={value} needs a value function, but ppo.advantage={advantage} trains none; drop it, or use "
        "advantage: gae"
    )
    check_algorithm(PPOConfig(advantage="vapo", **{name: value}))


def test_a_bootstrap_that_nobody_takes(own: str) -> None:
    assert refused(advantage=f"{own}:with_values", truncated="bootstrap") == (
        f"ppo.truncated=bootstrap does nothing under ppo.advantage={own}:with_values, which takes no bootstrap; use "
        "terminal or mask, or give the function that parameter"
    )
    check_algorithm(PPOConfig(advantage=f"{own}:with_values", truncated="mask"))


def test_there_is_no_bootstrap_without_values(own: str) -> None:
    assert refused(advantage=f"{own}:with_end").startswith(
        "ppo.advantage: with_end needs bootstrap; set it in ppo.advantage_kwargs, give it a default, or use one of "
    )


def test_whitening_over_mini_batches_needs_whitening() -> None:
    assert refused(advantage="grpo", whiten_over="mini_batch", mini_batches=2) == (
        "ppo.whiten_over=mini_batch does nothing: ppo.advantage=grpo is not whitened; set whiten_advantages: true, or "
        "leave it at rollout"
    )
    check_algorithm(PPOConfig(advantage="grpo", whiten_over="mini_batch", whiten_advantages=True))
    check_algorithm(PPOConfig(advantage="gae", whiten_over="mini_batch"))
    assert refused(whiten_over="mini_batch", whiten_advantages=False).startswith(
        "ppo.whiten_over=mini_batch does nothing"
    )


def test_weights_need_a_loss_that_takes_them(own: str) -> None:
    assert refused(policy_loss=f"{own}:loss", importance_correction="token") == (
        f"ppo.importance_correction=token weighs tokens, but ppo.policy_loss={own}:loss takes no weights; set the "
        "correction to none, or give the function that parameter"
    )
    for name in POLICY_LOSSES:
        kwargs = {"beta": 0.1} if name == "dro" else {}
        check_algorithm(PPOConfig(policy_loss=name, policy_loss_kwargs=kwargs, importance_correction="token"))


def test_nobody_selects_tokens_for_a_loss_of_ones_own(own: str) -> None:
    assert refused(policy_loss=f"{own}:picky_loss") == (
        f"ppo.policy_loss={own}:picky_loss takes selected, but tokens are selected for kl_cov, clip_cov only; choose "
        "them in the function"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": "gea"}, "ppo.advantage='gea'; did you mean gae?; known are gae, grpo, "),
        ({"policy_loss": "ppo"}, "ppo.policy_loss='ppo'"),
        ({"advantage_kwargs": {"epsilon": 1e-6}}, "ppo.advantage_kwargs.epsilon: gae has no such parameter"),
        ({"policy_loss": "dro"}, "ppo.policy_loss: dro needs beta; set it in ppo.policy_loss_kwargs"),
        ({"policy_loss": "kl_cov", "policy_loss_kwargs": {"shar": 0.1}}, "ppo.policy_loss_kwargs.shar: kl_cov has no"),
    ],
)
def test_names_and_constants_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    assert refused(**settings).startswith(message)


def test_constants_go_to_the_loss_or_to_what_selects_its_tokens() -> None:
    loss = policy_loss_of(PPOConfig(policy_loss="kl_cov", policy_loss_kwargs={"share": 0.5, "kl_cov_coef": 0.7}))
    assert loss.kwargs == {"kl_cov_coef": 0.7} and loss.select is not None
    assert policy_loss_of(PPOConfig()).select is None


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_a_critic_is_trained_where_the_estimator_takes_values(name: str) -> None:
    assert estimator_of(PPOConfig(advantage=name)).needs("values") == (name in ("gae", "vapo"))


@pytest.mark.parametrize(
    ("settings", "in_estimator"),
    [
        ({"advantage": "gae"}, True),
        ({"advantage": "grpo"}, False),
        ({"advantage": "grpo", "whiten_advantages": True}, True),
        ({"advantage": "gae", "whiten_advantages": False}, False),
        ({"advantage": "gae", "whiten_over": "mini_batch", "mini_batches": 2}, False),
        ({"advantage": "gae", "whiten_over": "mini_batch", "mini_batches": 1}, True),
    ],
)
def test_what_is_whitened_with_the_rollout(settings: dict[str, Any], in_estimator: bool) -> None:
    """A rollout's only mini-batch is the rollout."""
    assert estimator_of(PPOConfig(**settings)).whiten == in_estimator


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
