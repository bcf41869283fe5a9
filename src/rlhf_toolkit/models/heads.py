"""What stands on top of the shared trunk: log-probs of the policy and reference, scalars of value and reward.

Both heads get packed positions, (K, H) with one row for each response token, so that no head ever touches padding or
prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_toolkit.distributed.zero3 import share_parameters

CHUNK_ELEMENTS = 2**24  # logits in flight: 64 MiB in fp32


class LanguageModelHead(nn.Module):
    """Log-probs and entropy of the base's own output layer in fp32, a chunk of positions at a time.

        z = softcap(scale (h W^T + b)) / temperature,    logprob = z[target] - logsumexp(z),    entropy = logsumexp(z) -
        sum softmax(z) z

    No tensor larger than ``CHUNK_ELEMENTS`` exists in either direction (``TokenScores``). The output layer stays the
    base's own module; it is used here, not owned.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        output_layer = base.get_output_embeddings()
        self._output_layer = [output_layer]  # in a list: nn.Module must not register it a second time
        share_parameters(self, output_layer.parameters(recurse=False))
        config = base.config.get_text_config()
        self.scale = _logit_scale(config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` (K, H) and ``targets`` (K,) to log-probs (K,) and entropies (K,), both fp32.

        Without ``entropy_gradient`` the entropies are numbers to look at: no gradient flows through them, and none is
        computed.
        """
        layer = self._output_layer[0]
        transform = LogitTransform(self.scale, self.softcap, temperature)
        return TokenScores.apply(hidden, layer.weight, layer.bias, targets, transform, entropy_gradient)

    def next_token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` (B, H) to logits (B, V) in fp32, rounded to the base's dtype on the way; for decoding.

        A contiguous matrix: the output layer would copy its weight for a slice of three dimensions.
        """
        logits, _ = LogitTransform(self.scale, self.softcap, 1.0).apply_(
            self._output_layer[0](hidden.contiguous()).float()
        )
        return logits


class LogitTransform(NamedTuple):
    """What a model does to its raw logits: z = softcap(scale raw) / temperature."""

    scale: float
    softcap: float | None
    temperature: float

    def apply_(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Transform ``raw`` in place; also return dz/draw, a number where that is constant."""
        raw = raw.mul_(self.scale) if self.scale != 1.0 else raw
        if self.softcap is None:
            slope: torch.Tensor | float = self.scale / self.temperature
        else:
            raw = raw.div_(self.softcap).tanh_()
            slope = (1 - raw.square()) * (self.scale / self.temperature)
            raw = raw.mul_(self.softcap)
        return (raw.div_(self.temperature) if self.temperature != 1.0 else raw), slope


class TokenScores(torch.autograd.Function):
    """Log-prob and entropy of each position, with their gradients worked out while the logits are at hand.

    Each output is one number a position, so its gradient in ``hidden`` is one vector a position:

        d logprob / d h = ((onehot(target) - p) slope) W,    d entropy / d h = (-p (log p + entropy) slope) W

    Forward computes these (K, H) vectors chunk by chunk and backward only scales them by the incoming numbers. Nothing
    of size V is kept and no logits are computed twice.
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
        """Log-probs and entropies (K,); the gradient's vectors are kept for backward."""
        wants_gradient = ctx.needs_input_grad[0]
        product = _fp32_product(weight)
        outputs: list[tuple[torch.Tensor, ...]] = []
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
            raw = product(h)
            logits, slope = transform.apply_(raw if bias is None else raw.add_(bias))
            logp = logits.sub_(logits.logsumexp(-1, keepdim=True))
            p = logp.exp()
            logprobs, entropies = logp.gather(-1, t[:, None]).squeeze(-1), -torch.linalg.vecdot(p, logp)
            vectors: list[torch.Tensor] = []
            if wants_gradient and entropy_gradient:
                vectors.append((logp.add_(entropies[:, None]).mul_(p).neg_() * slope).to(weight.dtype) @ weight)
            if wants_gradient:
                d_logits = p.neg_().scatter_add_(-1, t[:, None], torch.ones_like(logprobs)[:, None]).mul_(slope)
                vectors.insert(0, d_logits.to(weight.dtype) @ weight)
            outputs.append((logprobs, entropies, *vectors))
        logprobs, entropies, *vectors = (torch.cat(column) for column in zip(*outputs, strict=True))
        ctx.save_for_backward(*vectors)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, d_logprobs: torch.Tensor, d_entropies: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Scale the kept vectors by what comes back for each position."""
        vectors = ctx.saved_tensors
        d_hidden = vectors[0] * d_logprobs[:, None].to(vectors[0].dtype)
        if len(vectors) > 1:
            d_hidden = d_hidden + vectors[1] * d_entropies[:, None].to(vectors[1].dtype)
        return d_hidden, None, None, None, None, None


def _logit_scale(config: PretrainedConfig) -> float:
    """What a model multiplies its raw logits by: Cohere's ``logit_scale``, or one over Granite's ``logits_scaling``."""
    if config.model_type == "hyperclovax":  # multiplies by the name that divides elsewhere
        return float(config.logits_scaling)
    if config.model_type == "mpt":  # names a logit_scale that transformers' model does not apply
        return 1.0
    return float(getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0))


def _fp32_product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """``h -> h @ weight.T`` accumulated and returned in fp32, whatever the dtype of ``weight`` (V, H).

    bf16 logits near 20 are 0.125 apart, which is noise of that size in every log-prob; fp32 costs only this one
    product. A GPU does it without a copy of the weight.
    """
    if weight.is_cuda and weight.dtype != torch.float32:
        return lambda hidden: torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    whole = weight.float()
    return lambda hidden: hidden.to(whole.dtype) @ whole.t()


class ScalarHead(nn.Module):
    """One fp32 number for each position, w h + b: a value or a reward. Starts at zero, so that the first advantages are
    the rewards.

    Source: zero or small initialisation, "The N+ Implementation Details of RLHF with PPO" (2024), detail on value
        heads.
    """

    def __init__(self, hidden_size: int, *, initial_std: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))  # DeepSpeed cannot broadcast a tensor without dimensions
        if initial_std > 0:
            nn.init.normal_(self.weight, std=initial_std)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` (K, H) to (K,), fp32."""
        return hidden.float() @ self.weight + self.bias
