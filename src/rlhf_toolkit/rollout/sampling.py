"""Choosing the next token, in fp32, from uniform numbers that the caller derived.

Inverse-CDF sampling with one uniform number for each (sequence, position) makes a row's tokens a function of its own
logits and its own random stream: neither the batch it sits in nor the rank it runs on matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Probabilities are summed in blocks first: a cumulative sum over a vocabulary in double precision takes 17 ms for 16
rows of 49,152 on two cores, this takes 0.2."""
JUST_BELOW_1 = 1 - 2**-53
"""The double before 1: a product with it is the double before the other factor."""


class Choice(NamedTuple):
    """Tokens (B,), their log-probs (B,) fp32 in the policy's whole tempered distribution, and in the one that they were
    drawn from: the same tensor where that is the same."""

    tokens: Tensor
    logprobs: Tensor
    drawn: Tensor


def choose_tokens(
    logits: Tensor,
    uniforms: Tensor | None,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    changed: Callable[[Tensor], Tensor] | None = None,
) -> Choice:
    """Sample one token for each row: ``logits`` (B, V) and ``uniforms`` (B,) in [0, 1).

    ``uniforms`` None takes the most likely token. Tokens are drawn from softmax(``changed(logits)`` / temperature) as
    far as top-k, top-p and min-p leave it (``_restricted``), ``changed`` as in ``logit_changes``. The log-probs that
    PPO knows are none of this: they are log softmax(logits / temperature), which the training path computes too.
    ``drawn`` is what an importance weight needs beside them (docs/ppo_details.md).
    """
    logits = logits.float()
    shifted, weights = _exponentials(logits, temperature)
    log_total = _log_total(weights)
    free = shifted
    if changed is not None:
        del weights  # a whole row less meanwhile
        free, weights = _exponentials(changed(logits), temperature)
    kept = weights if uniforms is None else _restricted(weights, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = free.argmax(-1) if uniforms is None else inverse_cdf(kept, uniforms)
    logprobs = _log_prob(shifted, tokens, log_total)
    is_whole = changed is None and kept is weights
    return Choice(tokens, logprobs, logprobs if is_whole else _log_prob(free, tokens, _log_total(kept)))


def _exponentials(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tempered logits (B, V) minus the row's largest, and what they are the logarithms of."""
    tempered = logits if temperature == 1.0 else logits / temperature
    shifted = tempered - tempered.amax(-1, keepdim=True)
    return shifted, shifted.exp()


def _log_total(weights: Tensor) -> Tensor:
    return block_sums(_in_blocks(weights)).sum(-1).log()


def _log_prob(shifted: Tensor, tokens: Tensor, log_total: Tensor) -> Tensor:
    chosen = shifted.gather(-1, tokens[:, None]).squeeze(-1)
    return (chosen.double() - log_total).float()


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds ``uniforms`` times the total: (B, V), (B,) to (B,) int64.

    Sums over blocks are in double precision; fp32 would lose the tail of a vocabulary of 150,000. A weight of 0 is
    never drawn. Where a row's weights are NaN some token comes back, never one outside the vocabulary: on a GPU an
    index that is too large would end the process.
    """
    blocks = _in_blocks(weights)
    sums = block_sums(blocks)
    starts = torch.nn.functional.pad(sums[:, :-1], (1, 0)).cumsum(-1)  # a block begins where those before it end
    total = starts[:, -1:] + sums[:, -1:]
    threshold = _below(uniforms.to(total)[:, None] * total, total)
    block = torch.searchsorted(starts, threshold, right=True) - 1
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    place = torch.searchsorted(inside, _below(threshold - starts.gather(-1, block), inside[:, -1:]), right=True)
    return (block * BLOCK + place).squeeze(-1).clamp(max=weights.shape[-1] - 1)


def block_sums(blocks: Tensor) -> Tensor:
    """(B, n, BLOCK) to (B, n) float64: within a block fp32 is exact to 1e-6."""
    return blocks.sum(-1).double()


def _in_blocks(weights: Tensor) -> Tensor:
    """(B, V) to (B, n, BLOCK), with zeros at the end."""
    padding = -weights.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(weights, (0, padding)) if padding else weights
    return padded.unflatten(-1, (-1, BLOCK))


def _below(threshold: Tensor, end: Tensor) -> Tensor:
    """``threshold``, but always less than ``end`` > 0, whatever rounding has done."""
    return torch.minimum(threshold, end * JUST_BELOW_1)


def _restricted(weights: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Zero what top-k, top-p and min-p exclude, in this order, which is transformers'; ``weights`` where all stay.

    Top-k keeps the k likeliest tokens and those as likely as the k-th. Top-p keeps the smallest set of likeliest tokens
    with mass ``top_p`` of what is left, at least one. Min-p keeps tokens that are at least ``min_p`` times as likely as
    the likeliest one. Source of the last: Nguyen et al., "Turning Up the Heat" (arXiv 2407.01082).
    """
    if top_k and top_k < weights.shape[-1]:
        smallest = weights.topk(top_k, dim=-1).values[:, -1:]
        weights = weights.where(weights >= smallest, 0.0)
    if top_p < 1.0:
        ordered, order = weights.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered
        keep = mass_before < top_p * ordered.sum(-1, keepdim=True)
        weights = torch.zeros_like(weights).scatter(-1, order, ordered.where(keep, 0.0))
    if min_p:
        weights = weights.where(weights >= min_p * weights.amax(-1, keepdim=True), 0.0)
    return weights
