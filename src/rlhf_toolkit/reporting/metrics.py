"""The metrics of a rollout, from the whole rollout of all ranks. Formulas and healthy ranges: docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.importance import Correction, effective_sample_share, mean_weight
from rlhf_toolkit.algorithms.kl import kl_penalty
from rlhf_toolkit.algorithms.masking import masked_mean, masked_sum
from rlhf_toolkit.algorithms.repetition import repeated_share
from rlhf_toolkit.types import Experience, RolloutTokens


def spread(name: str, values: Tensor) -> dict[str, float]:
    """Mean, max and min of ``values`` under ``name``; nothing where there are none."""
    if not len(values):
        return {}
    values = values.float()
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }


def rollout_metrics(
    experience: Experience, *, scores: Tensor, raw_scores: Tensor, rewards: Tensor, finished: Tensor
) -> dict[str, float]:
    """What sampling and the role pass gave. ``scores`` (n,) after shaping and ``rewards`` (n, R) after the KL are of
    the responses that have a score. Without a value role nothing is said about values."""
    mask = experience.response_mask
    advantages, returns = experience.advantages[mask], experience.returns[mask]
    metrics = {
        **spread("critic/score", scores),
        **spread("critic/raw_score", raw_scores),
        **spread("critic/rewards", rewards.sum(1)),
        **spread("critic/advantages", advantages),
        **spread("critic/returns", returns),
        **spread("response_length", experience.response_lengths),
        "response_length/clip_ratio": (~finished).float().mean().item(),
        "response_length/repetition": repetition(experience),
        **spread("prompt_length", experience.prompt_lengths),
    }
    if experience.values is not None:
        values = experience.values[mask]
        metrics |= spread("critic/values", values)
        metrics["critic/vf_explained_var"] = explained_variance(values, returns)
    return metrics


def repetition(tokens: RolloutTokens) -> float:
    """The mean over responses of ``repeated_share``, of the tokens that the policy wrote."""
    place = tokens.prompt_lengths[:, None] + torch.arange(tokens.token_mask.shape[1])
    responses = tokens.sequences.gather(1, place.clamp(max=tokens.sequences.shape[1] - 1))
    return repeated_share(responses, tokens.token_mask).mean().item()


def reward_metrics(
    parts: Mapping[str, Tensor], kept: Tensor, failures: Mapping[str, int], scores: Tensor, groups: Tensor
) -> dict[str, float]:
    """Each reward's mean where there are several, how many calls failed and responses were dropped, and the share of
    prompts whose responses all have one score: a group-relative estimator learns nothing from them."""
    metrics = {}
    for name, part in parts.items():
        there = part[~part.isnan()]
        if len(parts) > 1 and len(there):
            metrics[f"reward/{name}"] = there.mean().item()
        if failures.get(name):
            metrics[f"reward/{name}_failures"] = float(failures[name])
    if not kept.all():
        metrics["reward/dropped"] = float((~kept).sum())
    if groups.unique().numel() < len(groups):
        uniform = uniform_groups(scores, groups, kept)
        metrics["reward/uniform_groups"] = len(uniform) / groups.unique().numel()
    return metrics


def uniform_groups(scores: Tensor, groups: Tensor, kept: Tensor) -> list[int]:
    """The groups of several responses whose scores, as far as they have one (``kept``), are all the same."""
    found = []
    for group in groups.unique().tolist():
        own = scores[(groups == group) & kept]
        if int((groups == group).sum()) > 1 and len(own.unique()) <= 1:
            found.append(group)
    return found


def policy_metrics(
    *,
    old_logprobs: Tensor,
    entropies: Tensor,
    rollout_logprobs: Tensor,
    token_mask: Tensor,
    trained: Tensor,
    ref_logprobs: Tensor | None = None,
    drawn_logprobs: Tensor | None = None,
    kl_estimator: str,
    correction: Correction,
) -> dict[str, float]:
    """What the policy's pass over a whole rollout says, before any update; all (B, R).

    The numbers are the role pass's, or the update's own where that pass left the policy out. ``trained`` marks the
    tokens of the loss. Without ``ref_logprobs`` the distances to the reference are not there, nor the weights without
    a correction, nor the distance to what tokens were drawn from without ``drawn_logprobs``.
    """
    gap = (rollout_logprobs - old_logprobs).abs()
    metrics = {
        "actor/entropy": masked_mean(entropies, token_mask).item(),
        "rollout/logprob_gap_mean": masked_mean(gap, token_mask).item(),
        "rollout/logprob_gap_max": gap[token_mask].max().item(),
    }
    if ref_logprobs is not None:
        metrics["actor/reward_kl_penalty"] = penalty_kl(old_logprobs, ref_logprobs, token_mask, kl_estimator)
        metrics |= reference_kl(old_logprobs, ref_logprobs, token_mask)
    if drawn_logprobs is not None:
        metrics["rollout/drawn_kl"] = masked_mean(drawn_logprobs - rollout_logprobs, token_mask).item()
    sampler = rollout_logprobs if drawn_logprobs is None else drawn_logprobs
    weights = correction.weights(old_logprobs, sampler, trained)
    if weights is not None:
        metrics["rollout/importance_mean"] = mean_weight(weights, trained).item()
        metrics["rollout/importance_capped"] = correction.cut_share(weights, trained).item()
        metrics["rollout/importance_ess"] = effective_sample_share(weights, trained).item()
    return metrics


def penalty_kl(old_logprobs: Tensor, ref_logprobs: Tensor, token_mask: Tensor, estimator: str) -> float:
    """The mean KL of a rollout by ``estimator``: over a response's tokens first and then over responses, as in verl."""
    kl = kl_penalty(old_logprobs, ref_logprobs, token_mask, estimator=estimator)
    return (kl.sum(1) / token_mask.sum(1)).mean().item()


def reference_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """KL of the policy to the reference: k1 a response (summed over its tokens) and k3 a token."""
    difference = torch.where(mask, logprobs - ref_logprobs, 0.0)
    k3 = torch.expm1(-difference) + difference
    return {
        "actor/ref_kl": masked_sum(difference, mask).item() / len(mask),
        "actor/ref_kl_k3": masked_mean(k3, mask).item(),
    }


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / (var(returns) + 1e-5); 1 is a perfect value function, 0 one that says nothing."""
    if len(returns) < 2:
        return 0.0
    return (1 - (returns - values).var() / (returns.var() + 1e-5)).item()
