"""Settings that would do nothing are refused before anything is loaded: in one line, with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS
from rlhf_toolkit.algorithms.policy_losses import POLICY_LOSSES
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.runs import algorithm as algorithm_module
from rlhf_toolkit.runs.algorithm import Algorithm, resolve
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.configs import DataConfig, ModelConfig, PPOConfig, RewardConfig, RolloutConfig
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.tiny import merged, write_task

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


def resolved(
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    reward: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    **ppo: Any,
) -> Algorithm:
    """The algorithm of an experiment with these settings, those of ``ppo`` by their bare names."""
    return resolve(
        Experiment(
            model=ModelConfig(name="m", **(model or {})),
            data=DataConfig(train="d", **(data or {})),
            reward=RewardConfig(function="f:f", **(reward or {})),
            rollout=RolloutConfig(**(rollout or {})),
            ppo=PPOConfig(**ppo),
        )
    )


def refused(**settings: Any) -> str:
    """The message, of one line."""
    with pytest.raises(ConfigError) as caught:
        resolved(**settings)
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
    resolved(advantage="vapo", **{name: value})


def test_a_bootstrap_that_nobody_takes(own: str) -> None:
    assert refused(advantage=f"{own}:with_values", truncated="bootstrap") == (
        f"ppo.truncated=bootstrap does nothing under ppo.advantage={own}:with_values, which takes no bootstrap; use "
        "terminal or mask, or give the function that parameter"
    )
    resolved(advantage=f"{own}:with_values", truncated="mask")


def test_there_is_no_bootstrap_without_values(own: str) -> None:
    assert refused(advantage=f"{own}:with_end").startswith(
        "ppo.advantage: with_end needs bootstrap; set it in ppo.advantage_kwargs, give it a default, or use one of "
    )


def test_whitening_over_mini_batches_needs_whitening() -> None:
    assert refused(advantage="grpo", whiten_over="mini_batch", mini_batches=2) == (
        "ppo.whiten_over=mini_batch does nothing: ppo.advantage=grpo is not whitened; set whiten_advantages: true, or "
        "leave it at rollout"
    )
    resolved(advantage="grpo", whiten_over="mini_batch", whiten_advantages=True)
    resolved(advantage="gae", whiten_over="mini_batch")
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
        resolved(policy_loss=name, policy_loss_kwargs=kwargs, importance_correction="token")


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
    algorithm = resolved(policy_loss="kl_cov", policy_loss_kwargs={"share": 0.5, "kl_cov_coef": 0.7})
    loss = algorithm.loss.policy_loss
    assert loss.kwargs == {"kl_cov_coef": 0.7} and loss.select is not None
    assert algorithm.over_mini_batch.select is loss.select and algorithm.needs.old_logprobs
    plain = resolved()
    assert plain.loss.policy_loss.select is plain.over_mini_batch.select is None and not plain.needs.old_logprobs


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_a_critic_is_trained_where_the_estimator_takes_values(name: str) -> None:
    algorithm = resolved(advantage=name)
    assert algorithm.trains_value == algorithm.shaping.estimator.needs("values") == (name in ("gae", "vapo"))


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
    algorithm = resolved(**settings)
    over_mini_batches = settings.get("whiten_over") == "mini_batch" and not in_estimator
    assert (algorithm.shaping.estimator.whiten, algorithm.over_mini_batch.whiten) == (in_estimator, over_mini_batches)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "value_on", "roles"), [("gae", "adapter", 2), ("gae", "policy_trunk", 1), ("grpo", "adapter", 1)]
)
def test_roles_of_an_update_share_its_tokens(advantage: str, value_on: str, roles: int) -> None:
    algorithm = resolved(advantage=advantage, model={"value_on": value_on})
    assert (algorithm.update_roles, algorithm.role_tokens) == (roles, 4096 // roles)


def test_every_run_begins_with_a_controller_of_its_own() -> None:
    algorithm = resolved(kl_coef=0.3, kl_target=0.1, kl_horizon=500)
    first, second = algorithm.new_kl_control(), algorithm.new_kl_control()
    first.update(1.0, 32)
    assert first.coefficient > second.coefficient == 0.3
    fixed = resolved(kl_coef=0.3).new_kl_control()
    fixed.update(1.0, 32)
    assert fixed.coefficient == 0.3


# ---- functions around them, found before anything is loaded ----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"curriculum": "near"}}, "data.curriculum='near'; did you mean near_target?"),
        (
            {"data": {"curriculum": "near_target", "curriculum_kwargs": {"aim": 0.5}}},
            "data.curriculum_kwargs.aim: near_target has no such parameter",
        ),
        ({"rollout": {"environment": "no.py:f"}}, "rollout.environment='no.py:f': there is no file no.py"),
        (
            {"data": {"evaluation": "e"}, "reward": {"passes_at": 1.0, "answer": "no.py:f"}},
            "reward.answer='no.py:f': there is no file no.py",
        ),
    ],
)
def test_functions_around_the_algorithm_are_found_first(settings: dict[str, Any], message: str) -> None:
    assert refused(**settings).startswith(message)


def test_nothing_is_around_it_where_no_setting_asks_for_it() -> None:
    algorithm = resolved()
    assert (algorithm.curriculum, algorithm.environment, algorithm.passing) == (None, None, None)


EVERYTHING = """
import pathlib

with pathlib.Path(__file__).with_name("executed").open("a") as file:
    file.write("x")


def estimator(rewards, mask):
    return rewards, rewards


def loss(logprobs, old_logprobs, advantages, mask):
    return -advantages * (logprobs - old_logprobs).exp()


def curriculum(count):
    return list(range(count))


def environment(prompts, responses, turn, **columns):
    return [None] * len(prompts)


def reward(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def answers(responses):
    return responses
"""
SETTINGS = {
    "ppo.advantage": "estimator",
    "ppo.policy_loss": "loss",
    "data.curriculum": "curriculum",
    "rollout.environment": "environment",
    "reward.function": "reward",
    "reward.answer": "answers",
}


def test_a_start_resolves_once_and_executes_the_file_of_all_its_functions_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(EVERYTHING)
    changes: dict[str, Any] = {name: f"{tmp_path}/mine.py:{function}" for name, function in SETTINGS.items()}
    calls: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(algorithm_module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        return call

    names = ["estimator_of", "policy_loss_of", "curriculum_of", "environment_of", "passing_of"]
    for name in names:
        monkeypatch.setattr(algorithm_module, name, counted(name))
    changes |= {"reward.passes_at": 1.0, "data.evaluation": f"{tmp_path}/heldout.jsonl"}
    prepare(experiment_from_dict(merged(write_task(tmp_path), changes)))
    assert (tmp_path / "executed").read_text() == "x"
    assert sorted(calls) == sorted(names)
