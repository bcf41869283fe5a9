"""What stands on top of the shared trunk: log-probs of the policy and reference, scalars of value and reward.

Both heads get packed positions, (K, H) with one row for each response token, so that no head ever touches padding or prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_toolkit.distributed.zero3 import full_shape, share_parameters

CHUNK_ELEMENTS = 2**24  # logits in flight: 64 MiB in fp32


class LanguageModelHead(nn.Module):
    """Log-probs and entropy of the base's own output layer in fp32, a chunk of positions at a time.

        z = softcap(scale (h W^T + b)) / temperature,    logprob = z[target] - logsumexp(z),    entropy = logsumexp(z) - sum softmax(z) z

    Forward keeps nothing of size V; backward recomputes each chunk. So no tensor larger than ``CHUNK_ELEMENTS`` exists in either
    direction. The output layer stays the base's own module; it is used here, not owned.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        output_layer = base.get_output_embeddings()
        self._output_layer = [output_layer]  # in a list: nn.Module must not register it a second time
        share_parameters(self, output_layer.parameters(recurse=False))
        config = base.config.get_text_config()
        self.scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.vocabulary = full_shape(output_layer.weight)[0]

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` (K, H) and ``targets`` (K,) to log-probs (K,) and entropies (K,), both fp32."""
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        chunks = [
            checkpoint(self._chunk, h, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        logprobs, entropies = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._output_layer[0]
        logits = Fp32Logits.apply(hidden, layer.weight)
        if layer.bias is not None:
            logits = logits + layer.bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if temperature != 1.0:
            logits = logits / temperature
        logits = logits.log_softmax(-1)
        return logits.gather(-1, targets[:, None]).squeeze(-1), -(logits.exp() * logits).sum(-1)


class Fp32Logits(torch.autograd.Function):
    """``hidden @ weight.T`` accumulated and returned in fp32, whatever the dtype of the frozen ``weight`` (V, H).

    bf16 logits near 20 are 0.06 apart, which is noise of that size in every log-prob; fp32 costs only this one product.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = hidden.dtype
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, d_logits: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return (d_logits.to(weight.dtype) @ weight).to(ctx.dtype), None


class ScalarHead(nn.Module):
    """One fp32 number for each position, w h + b: a value or a reward. Starts at zero, so that the first advantages are the rewards.

    Source: zero or small initialisation, "The N+ Implementation Details of RLHF with PPO" (2024), detail on value heads.
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
