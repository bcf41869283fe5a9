"""From scores and role outputs to rewards and advantages, over the whole rollout of all ranks. Arithmetic:
docs/ppo_details.md and docs/algorithms.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.groups import left_alone
from rlhf_toolkit.algorithms.kl import kl_penalty
from rlhf_toolkit.algorithms.masking import centre_and_scale
from rlhf_toolkit.algorithms.rewards import missing_eos_penalty, shape_rewards, soft_overlong_penalty, whiten_scores
from rlhf_toolkit.errors import ConfigError, DataError
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import VALUE
from rlhf_toolkit.plugins import arguments_for, takes
from rlhf_toolkit.rollout.sampled import Sampled

OFFERED = ("rewards", "mask", "values", "groups", "baselines", "bootstrap", "gamma", "gae_lambda")
"""What an advantage estimator may take, by the names of its parameters."""


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator with its constants: ``function(rewards=..., mask=..., ...)`` to (advantages, returns).

    It takes of ``OFFERED`` what its parameters name: a value role is trained where it takes ``values``, and a greedy
    response to every prompt is sampled and scored where it takes ``baselines``. ``whiten``: advantages are centred and
    scaled afterwards. Raises ConfigError where ``kwargs`` do not fit the function.
    """

    function: Callable[..., tuple[Tensor, Tensor]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    whiten: bool = False

    def __post_init__(self) -> None:
        without_value = [name for name in OFFERED if name != "bootstrap"]
        offered = OFFERED if self.needs("values") else without_value
        arguments_for(self.function, dict.fromkeys(offered), self.kwargs, setting="ppo.advantage")

    def needs(self, name: str) -> bool:
        """Whether it takes ``name``, one of ``OFFERED``."""
        return takes(self.function, name)

    def __call__(self, offered: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Advantages and returns (B, R) in the rewards' dtype, checked; not whitened. Raises ConfigError for another
        shape."""
        given = arguments_for(self.function, offered, self.kwargs, setting="ppo.advantage")
        result: Any = self.function(**given)
        shape = offered["rewards"].shape
        tensors = isinstance(result, tuple) and all(isinstance(part, Tensor) for part in result)
        if not tensors or [part.shape for part in result] != [shape, shape]:
            raise ConfigError(
                f"ppo.advantage: {getattr(self.function, '__name__', self.function)} must return (advantages, "
                f"returns), each a tensor of shape {tuple(shape)}"
            )
        advantages, returns = result
        return advantages.to(offered["rewards"].dtype), returns.to(offered["rewards"].dtype)


@dataclass(frozen=True)
class ScoreShaping:
    """What happens to scores before they become rewards, in this order: penalties, clip, scale, whitening."""

    missing_eos_penalty: float = 0.0
    overlong_buffer: int = 0
    overlong_penalty: float = 0.0
    clip: float | None = None
    scale: float = 1.0
    whiten: bool = False

    def __call__(self, sampled: Sampled, *, budget: int) -> Tensor:
        """(B,) scores of a rollout whose responses have at most ``budget`` tokens."""
        scores = self.before_whitening(sampled, budget=budget)
        if self.whiten:  # a dropped response has no score that could count
            scores = torch.where(sampled.kept, whiten_scores(scores, of=scores[sampled.kept]), scores)
        return scores

    def before_whitening(self, sampled: Sampled, *, budget: int) -> Tensor:
        """(B,) the same scores, not whitened."""
        scores = missing_eos_penalty(sampled.raw_scores, sampled.finished, penalty=self.missing_eos_penalty)
        if self.overlong_buffer:
            scores = scores + soft_overlong_penalty(
                sampled.response_lengths, max_length=budget, buffer=self.overlong_buffer, factor=self.overlong_penalty
            )
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        return scores * self.scale

    def baselines(self, greedy: Sampled, sampled: Sampled, *, budget: int) -> Tensor:
        """(B,) scores of ``greedy`` on the scale of those of ``sampled``: whitened by the statistics of these."""
        scores = self.before_whitening(greedy, budget=budget)
        if not self.whiten:
            return scores
        return whiten_scores(scores, of=self.before_whitening(sampled, budget=budget)[sampled.kept])


@dataclass(frozen=True)
class Shaping:
    """How scores become rewards and advantages. ``reward_scale`` multiplies rewards of tokens, as scores were."""

    estimator: Estimator
    gamma: float
    gae_lambda: float
    kl_in_reward: bool
    kl_estimator: str
    truncated: str
    reward_scale: float

    def rewards(self, scores: Tensor, sampled: Sampled, outputs: RoleOutputs, *, kl_coef: float | None) -> Tensor:
        """(B, R): rewards of tokens and, on the last token, of the response, less the KL; ``kl_coef`` None: no KL."""
        tokens, kl = sampled.token_mask, torch.zeros_like(sampled.rollout_logprobs)
        if kl_coef is not None:
            old, ref = outputs.policy_logprobs, outputs.reference_logprobs
            kl = kl_penalty(old, ref, tokens, estimator=self.kl_estimator)
        rewards = shape_rewards(scores, kl, tokens, kl_coef=kl_coef or 0.0)
        return rewards + torch.where(tokens, sampled.token_rewards, 0.0) * self.reward_scale

    def trained(self, sampled: Sampled) -> Tensor:
        """(B, R) bool, the tokens of the loss: without responses that were dropped and, with ``truncated: mask``,
        without those that were cut off. Spoiled ones are there, so that their update is left out."""
        rows = sampled.kept & sampled.finished if self.truncated == "mask" else sampled.kept
        rows = rows | sampled.spoiled
        trained = sampled.token_mask & rows[:, None]
        if int(trained.sum()) >= 2:  # the whitening needs two
            return trained
        if self.truncated == "mask" and not (sampled.kept & sampled.finished).any():
            raise DataError(
                "rollout.max_new_tokens cut off the responses of a rollout, and ppo.truncated=mask leaves "
                f"{int(trained.sum())} tokens to train on; raise max_new_tokens or use truncated: bootstrap"
            )
        raise DataError(
            f"{int((~sampled.kept).sum())} of {len(sampled.kept)} responses of a rollout were dropped, since their "
            f"reward failed, which leaves {int(trained.sum())} tokens to train on; repair the reward, or set its "
            "on_failure to score"
        )

    def advantages(
        self, rewards: Tensor, trained: Tensor, sampled: Sampled, outputs: RoleOutputs
    ) -> tuple[Tensor, Tensor]:
        """Advantages, whitened over the tokens ``trained`` where the estimator asks for it, and returns; each (B, R).

        A response cut by the budget ends as if it were finished (terminal), goes on with the value of its last state
        (bootstrap), or is left out of the loss and of the whitening (mask). A response without a score takes no part in
        its group's statistics, and the only one left of a group has the advantage 0, as if its group were uniform: its
        score says nothing about it that another response could be measured by. That of a spoiled one is NaN.
        """
        offered = {"rewards": rewards, "mask": sampled.token_mask, "groups": sampled.groups}
        if sampled.baselines is not None:
            offered["baselines"] = sampled.baselines
        if outputs.says(VALUE):
            final = outputs.final_values
            cut_off = final if self.truncated == "bootstrap" else torch.zeros_like(final)
            offered |= {"values": outputs.token_values, "bootstrap": torch.where(sampled.finished, 0.0, cut_off)}
        kept = {name: column[sampled.kept] for name, column in offered.items()}
        found = self.estimator({**kept, "gamma": self.gamma, "gae_lambda": self.gae_lambda})
        advantages, returns = (torch.zeros_like(rewards) for _ in found)
        advantages[sampled.kept], returns[sampled.kept] = found
        if self.estimator.needs("groups"):
            advantages[left_alone(sampled.groups, sampled.kept)] = 0.0
        if self.estimator.whiten:
            advantages = centre_and_scale(advantages, trained & ~sampled.spoiled[:, None])
        return advantages.masked_fill(sampled.spoiled[:, None], torch.nan), returns
