"""The language-model head of a model that is trained as a whole: its output layer has a gradient, too."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_toolkit.models.heads import (
    LanguageModelHead,
    LogitTransform,
    RunningScores,
    Workspace,
    tile_shape,
    widens,
)


class TrainedHead(LanguageModelHead):
    """Log-probs and entropy as LanguageModelHead gives them, with a gradient for the output layer's weight and bias.
    Embeddings tied to it add theirs."""

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` (K, H) and ``targets`` (K,) to log-probs (K,) and entropies (K,), both fp32."""
        layer = self._output_layer[0]
        transform = LogitTransform(self.scale, self.softcap, temperature)
        return TrainedTokenScores.apply(hidden, layer.weight, layer.bias, targets, transform, entropy_gradient)


class TrainedTokenScores(torch.autograd.Function):
    """``TokenScores`` with the gradient of the output layer:

        dz = dlogprob (onehot(target) - p) - dentropy p (log p + entropy),    dh = dz/draw W,    dW = (dz/draw)^T h

    dW is a sum over positions, weighted by what comes back for each of them, so nothing can be worked out in forward:
    backward computes the logits a second time, tile by tile. Of the vocabulary's size there is nothing but dW itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies (K,). What is kept has one number for each position, beside ``hidden``."""
        (positions, width), space = tile_shape(hidden), Workspace(hidden.device)
        outputs: list[tuple[torch.Tensor, ...]] = []
        for rows in _tiles(len(hidden), positions):
            running = RunningScores(hidden[rows], targets[rows], transform, space, vectors=0)
            for tile in _tiles(len(weight), width):
                running.add(_factor(weight[tile], hidden), None if bias is None else bias[tile], tile.start)
            outputs.append((*running.scores(), running.normaliser()))
        logprobs, entropies, normaliser = (torch.cat(column) for column in zip(*outputs, strict=True))
        ctx.transform, ctx.entropy_gradient = transform, entropy_gradient
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropies)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, d_logprobs: torch.Tensor, d_entropies: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """The gradients of ``hidden``, weight and bias."""
        hidden, weight, bias, targets, normaliser, entropies = ctx.saved_tensors
        (positions, width), space = tile_shape(hidden), Workspace(hidden.device)
        d_hidden, d_weight = (torch.zeros_like(x, dtype=normaliser.dtype) for x in (hidden, weight))
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=normaliser.dtype)
        for rows in _tiles(len(hidden), positions):
            running = RunningScores(hidden[rows], targets[rows], ctx.transform, space, vectors=0)
            of_entropy = (d_entropies[rows], entropies[rows]) if ctx.entropy_gradient else None
            for tile in _tiles(len(weight), width):
                factor = _factor(weight[tile], hidden)
                z, bend = running.logits(factor, None if bias is None else bias[tile])
                dz = _d_logits(running, z, tile.start, normaliser[rows], d_logprobs[rows], of_entropy)
                d_raw = (dz if bend is None else dz.mul_(bend)).mul_(ctx.transform.slope)
                running.add_product(d_hidden[rows], d_raw, factor)
                running.add_product(d_weight[tile], d_raw.t(), running.hidden)
                if d_bias is not None:
                    d_bias[tile] += d_raw.sum(0)
        return d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None


def _d_logits(
    running: RunningScores,
    z: torch.Tensor,
    start: int,
    normaliser: torch.Tensor,
    d_logprobs: torch.Tensor,
    of_entropy: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """The gradient (C, W) of ``z``, the logits of the tokens ``start`` and following, in place of them.

    ``of_entropy``: what comes back for the entropies, and the entropies.
    """
    log_p = z.sub_(normaliser[:, None])
    p = torch.exp(log_p, out=running.space.matrix("e", z.shape, z.dtype))
    if of_entropy is None:
        dz = p.mul_(-d_logprobs[:, None])
    else:
        d_entropies, entropies = of_entropy
        dz = log_p.add_(entropies[:, None]).mul_(d_entropies[:, None]).add_(d_logprobs[:, None]).mul_(p).neg_()
    here, index = running.targets_in(start, z.shape[1])
    return dz.scatter_add_(-1, index, torch.where(here, d_logprobs, 0)[:, None])


def _factor(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Rows of the fp32 weight as they are multiplied: a GPU has fast products of half-precision factors."""
    return weight.to(hidden.dtype) if widens(hidden.device, hidden.dtype) else weight


def _tiles(count: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]
