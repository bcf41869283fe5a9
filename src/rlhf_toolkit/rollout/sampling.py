"""Choosing the next token, in fp32, from uniform numbers that the caller derived.

Inverse-CDF sampling with one uniform number for each (sequence, position) makes a row's tokens a function of its own
logits and its own random stream: neither the batch it sits in nor the rank it runs on matters.
"""

from __future__ import annotations

import torch


def choose_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor | None, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token for each row: ``logits`` (B, V), ``uniforms`` (B,) in [0, 1) to tokens (B,) and log-probs (B,)
    fp32.

    ``uniforms`` None takes the most likely token. The log-prob is that of the whole tempered distribution, log
    softmax(logits / temperature), which the training path computes too; top-k and top-p only restrict what can be
    drawn.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    if uniforms is None:
        tokens = logprobs.argmax(-1)
    else:
        weights = _restricted(logprobs.exp(), top_k=top_k, top_p=top_p)
        cumulative = weights.double().cumsum(-1)  # fp32 would lose the tail of a vocabulary of 150,000
        threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _restricted(probabilities: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Zero what top-k and top-p exclude, top-k first.

    Top-k keeps the k likeliest tokens and those as likely as the k-th. Top-p keeps the smallest set of likeliest tokens
    with mass ``top_p``, at least one.
    """
    if top_k and top_k < probabilities.shape[-1]:
        smallest = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= smallest, 0.0)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered
        keep = mass_before < top_p * ordered.sum(-1, keepdim=True)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.where(keep, 0.0))
    return probabilities
