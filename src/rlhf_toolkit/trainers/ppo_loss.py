"""The loss of a micro-batch: its knobs, the policy's part, the value's part, and what they say about themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_toolkit.algorithms.aggregation import aggregate
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl import kl_penalty
from rlhf_toolkit.algorithms.policy_losses import PolicyLossTerms
from rlhf_toolkit.algorithms.value_losses import clipped_value_loss
from rlhf_toolkit.data.layout import Layout
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import POLICY, VALUE
from rlhf_toolkit.plugins import arguments_for, takes
from rlhf_toolkit.types import Experience, RolloutTokens

OFFERED = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "mask",
    "clip_range_low",
    "clip_range_high",
    "dual_clip",
    "weights",
    "selected",
)
"""What a policy loss may take, by the names of its parameters."""


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss with its constants: ``function(logprobs=..., mask=..., ...)`` to PolicyLossTerms, or to a loss for
    each token (B, R).

    It takes of ``OFFERED`` what its parameters name. ``selected`` (B, R) bool is what ``select`` chooses among the
    tokens of a whole mini-batch. Raises ConfigError where ``kwargs`` do not fit the function.
    """

    function: Callable[..., PolicyLossTerms | Tensor]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    select: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        arguments_for(self.function, dict.fromkeys(OFFERED), self.kwargs, setting="ppo.policy_loss")

    def needs(self, name: str) -> bool:
        """Whether it takes ``name``, one of ``OFFERED``."""
        return takes(self.function, name)

    def __call__(self, offered: Mapping[str, Any]) -> PolicyLossTerms:
        """The loss of each token, checked. Raises ConfigError for anything but (B, R)."""
        result = self.function(**arguments_for(self.function, offered, self.kwargs, setting="ppo.policy_loss"))
        mask = offered["mask"]
        loss = result.per_token if isinstance(result, PolicyLossTerms) else result
        if getattr(loss, "shape", None) != mask.shape:
            raise ConfigError(
                f"ppo.policy_loss: {getattr(self.function, '__name__', self.function)} must return a loss for each "
                f"token, a tensor of shape {tuple(mask.shape)}, not {getattr(loss, 'shape', type(loss).__name__)}"
            )
        if isinstance(result, PolicyLossTerms):
            return result
        never = torch.zeros_like(mask)
        ratio = (offered["logprobs"] - offered["old_logprobs"]).detach().masked_fill(~mask, 0).exp()
        return PolicyLossTerms(torch.where(mask, loss, 0.0), never, never, ratio)


class LossTerms(NamedTuple):
    """A micro-batch's share of the loss, with the shares it consists of and quantities of tokens, for the meter."""

    loss: Tensor
    shares: dict[str, Tensor]
    of_tokens: dict[str, Tensor]


@dataclass(frozen=True)
class PPOLoss:
    """The knobs of the loss. See ``configs.PPOConfig`` for what each means."""

    clip_range_low: float
    clip_range_high: float
    dual_clip: float | None
    value_clip_range: float | None
    value_coef: float
    entropy_coef: float
    loss_aggregation: str
    kl_in_loss: bool
    kl_estimator: str
    value_warmup_rollouts: int
    width: int
    temperature: float
    correction: Correction
    policy_loss: PolicyLoss
    kl_stop: float | None = None

    def outputs(
        self, model: nn.Module, part: Mapping[str, Tensor], layout: Layout, *, value: bool, device: torch.device
    ) -> RoleOutputs:
        """What policy and, with ``value``, value say about a micro-batch, in one forward, laid out in rows (n, R).

        ``part`` lies on the CPU, where its layout is worked out: that reads tokens and lengths.
        """
        tokens = RolloutTokens.of(part)
        laid_out = layout(tokens.sequences, tokens.prompt_lengths, tokens.response_lengths)
        outputs: RoleOutputs = model(
            laid_out.to(device),
            roles=(POLICY, VALUE) if value else (POLICY,),
            temperature=self.temperature,
            entropy_gradient=self.entropy_coef != 0,
        )
        return outputs.as_rows(tokens.response_lengths.to(device), tokens.response_mask.shape[1])

    def reduction(self, part: Mapping[str, Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
        """From a loss per token (n, R) to this micro-batch's share of the whole mini-batch's."""
        return partial(
            aggregate,
            mask=mask,
            mode=self.loss_aggregation,
            width=self.width,
            tokens=int(part["token_count"]),
            sequences=int(part["sequence_count"]),
        )

    def terms(
        self,
        batch: Experience,
        outputs: RoleOutputs,
        old_logprobs: Tensor,
        *,
        selected: Tensor | None,
        reduce: Callable[[Tensor], Tensor],
        kl_coef: float,
        policy_weight: float,
    ) -> LossTerms:
        """``policy_weight`` (policy loss - entropy_coef entropy + kl_coef KL) + value_coef value loss.

        ``outputs`` are what policy and value say now, in rows (n, R). ``reduce`` takes a loss per token to this
        micro-batch's share of the mini-batch's. The KL is a term where ``kl_in_loss``, the value loss where the value
        is trained.
        """
        mask = batch.response_mask
        policy = self.policy_loss(
            {
                "logprobs": outputs.policy_logprobs,
                "old_logprobs": old_logprobs,
                "advantages": batch.advantages,
                "mask": mask,
                "clip_range_low": self.clip_range_low,
                "clip_range_high": self.clip_range_high,
                "dual_clip": self.dual_clip,
                "weights": self.correction.weights(old_logprobs, batch.sampler_logprobs, mask),
                "selected": selected,
            }
        )
        policy_loss, entropy = reduce(policy.per_token), reduce(outputs.policy_entropies)
        kl_loss = torch.zeros_like(policy_loss)
        if self.kl_in_loss and batch.ref_logprobs is not None:
            kl_loss = reduce(kl_penalty(outputs.policy_logprobs, batch.ref_logprobs, mask, estimator=self.kl_estimator))
        loss = policy_weight * (policy_loss - self.entropy_coef * entropy + kl_coef * kl_loss)
        shares = {"actor/pg_loss": policy_loss, "actor/kl_loss": kl_loss}
        of_tokens = {
            "actor/pg_clipfrac": policy.clipped,
            "actor/pg_clipfrac_lower": policy.dual_clipped,
            "actor/ppo_kl": old_logprobs - outputs.policy_logprobs.detach(),
        }
        if outputs.says(VALUE):
            (old_values, returns), values = batch.old_values_and_returns, outputs.token_values
            value = clipped_value_loss(values, old_values, returns, mask, value_clip_range=self.value_clip_range)
            shares["critic/vf_loss"] = reduce(value.per_token)
            loss = loss + self.value_coef * shares["critic/vf_loss"]
            of_tokens |= {"critic/vf_clipfrac": value.clipped, "critic/vpred_mean": values.detach()}
        return LossTerms(loss, shares, of_tokens)
