"""What stands on top of the shared trunk: log-probs of the policy and reference, scalars of value and reward.

Both heads get packed positions, (K, H) with one row for each response token, so that no head ever touches padding or
prompts.
"""

from __future__ import annotations

import warnings
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_toolkit.distributed.zero3 import share_parameters
from rlhf_toolkit.errors import RunWarning

LOWEST = torch.finfo(torch.float32).min


class Tile(NamedTuple):
    """Bounds of what is worked on at a time: ``elements`` of any of its matrices, ``positions``, and ``tokens`` of the
    vocabulary."""

    elements: int
    positions: int
    tokens: int


CPU_TILE = Tile(2**20, 512, 1024)  # 2 MiB of fp32 logits stay in the caches (bench/head.py)
GPU_TILE = Tile(2**24, 2048, 8192)  # 64 MiB of fp32 logits: few, large kernels


class LanguageModelHead(nn.Module):
    """Log-probs and entropy of the base's own output layer in fp32, a tile of positions and vocabulary at a time.

        z = softcap(scale (h W^T + b)) / temperature
        logprob = z[target] - logsumexp(z)
        entropy = logsumexp(z) - sum softmax(z) z

    Beside (K, H) matrices such as ``hidden`` itself, no tensor has more than ``CPU_TILE.elements`` (on other devices
    ``GPU_TILE.elements``) in either direction (``TokenScores``). The output layer stays the base's own module; it is
    used here, not owned.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        output_layer = base.get_output_embeddings()
        self._output_layer = [output_layer]  # in a list: nn.Module must not register it a second time
        share_parameters(self, output_layer.parameters(recurse=False))
        config = base.config.get_text_config()
        if config.model_type == "hyperclovax":  # multiplies by the name that divides elsewhere
            self.scale = float(config.logits_scaling)
        elif config.model_type == "mpt":  # names a logit_scale that transformers' model does not apply
            self.scale = 1.0
        else:  # Cohere's logit_scale, or one over Granite's logits_scaling
            scale = getattr(config, "logit_scale", None)  # which may be named and None
            self.scale = float((1.0 if scale is None else scale) / getattr(config, "logits_scaling", 1.0))
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

    def apply_(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Transform ``raw`` in place; also return softcap's dz/draw up to the factor ``slope``, None for 1."""
        if self.softcap is None:
            return (raw.mul_(self.slope) if self.slope != 1.0 else raw), None
        raw = raw.mul_(self.scale / self.softcap).tanh_()
        bend = 1 - raw.square()
        return raw.mul_(self.softcap / self.temperature), bend

    @property
    def slope(self) -> float:
        """dz/draw where no softcap bends it."""
        return self.scale / self.temperature


class TokenScores(torch.autograd.Function):
    """Log-prob and entropy of each position, with their gradients worked out while the logits are at hand.

    Each output is one number a position, so its gradient in ``hidden`` is one vector a position:

        d logprob / d h = ((onehot(target) - p) slope) W,    d entropy / d h = (-p (log p + entropy) slope) W

    Forward computes these (K, H) vectors tile by tile (``RunningScores``) and backward only scales them by the incoming
    numbers. Nothing of size V and nothing of the output layer is kept, and no logits are computed twice.
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
        vectors = (1 + entropy_gradient) if ctx.needs_input_grad[0] else 0
        (positions, width), space = tile_shape(hidden), Workspace(hidden.device)
        outputs: list[tuple[torch.Tensor, ...]] = []
        for h, t in zip(hidden.split(positions), targets.split(positions), strict=True):
            running = RunningScores(h, t, transform, space, vectors=vectors)
            for start in range(0, weight.shape[0], width):
                part = None if bias is None else bias[start : start + width]
                running.add(weight[start : start + width], part, start)
            outputs.append((*running.scores(), *running.gradients(weight)))
        logprobs, entropies, *kept = (torch.cat(column) for column in zip(*outputs, strict=True))
        ctx.save_for_backward(*kept)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, d_logprobs: torch.Tensor, d_entropies: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Scale the kept vectors by what comes back for each position."""
        vectors = ctx.saved_tensors
        d_hidden = vectors[0] * d_logprobs[:, None]
        if len(vectors) > 1:
            d_hidden = d_hidden.addcmul_(vectors[1], d_entropies[:, None])
        return d_hidden.to(vectors[0].dtype), None, None, None, None, None


class RunningScores:
    """One pass over the vocabulary for a chunk of positions: online softmax, and its products with the output layer.

    With m the largest logit so far, e = exp(z - m) and sums over the tokens so far *without the target*, it keeps

        sum e,    sum e (z - m),    sum e bend W,    sum e (z - m) bend W

    and rescales them when m grows. The target is added at the end: 1 - p[target] is then a sum of its own and not a
    difference of nearly equal numbers, however certain the target is.

    Source: online softmax, Milakov & Gimelshein (2018), arXiv:1805.02867, algorithm 3.

    Args:
        hidden: (C, H).
        targets: (C,).
        space: where matrices lie that are needed for one tile only.
        vectors: how many gradients are wanted: 0, 1 (log-prob) or 2 (also entropy).
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        transform: LogitTransform,
        space: Workspace,
        *,
        vectors: int,
    ) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.widens = widens(hidden.device, hidden.dtype)
        self.hidden = hidden if self.widens else hidden.to(self.dtype)
        self.out_dtype, self.targets, self.transform, self.space = hidden.dtype, targets, transform, space
        zeros = torch.zeros(len(targets), dtype=self.dtype, device=hidden.device)
        self.largest = torch.full_like(zeros, LOWEST)  # not -inf: the first step would subtract it from itself
        self.sum, self.sum_z, self.target_z, self.target_bend = zeros, zeros, zeros, torch.ones_like(zeros)
        self.products = [zeros.new_zeros(hidden.shape) for _ in range(vectors)]

    def add(self, weight: torch.Tensor, bias: torch.Tensor | None, start: int) -> None:
        """Take in the tokens ``start`` and following, whose rows of the output layer are ``weight`` and ``bias``."""
        z, bend = self.logits(weight, bias)
        here, index = self.targets_in(start, len(weight))
        self.target_z = torch.where(here, z.gather(-1, index).squeeze(-1), self.target_z)
        largest = torch.maximum(self.largest, z.amax(-1))
        growth = largest - self.largest
        factor = (-growth).exp()
        self.sum_z = (self.sum_z - growth * self.sum) * factor
        self.sum = self.sum * factor
        if len(self.products) > 1:
            self.products[1].addcmul_(self.products[0], growth[:, None], value=-1).mul_(factor[:, None])
        if self.products:
            self.products[0].mul_(factor[:, None])
        self.largest = largest
        z.sub_(self.largest[:, None])
        e = torch.exp(z, out=self.space.matrix("e", z.shape, z.dtype))
        e.scatter_(-1, index, e.gather(-1, index).masked_fill_(here[:, None], 0))
        z.mul_(e)
        self.sum, self.sum_z = self.sum + e.sum(-1), self.sum_z + z.sum(-1)
        if self.products and bend is not None:
            self.target_bend = torch.where(here, bend.gather(-1, index).squeeze(-1), self.target_bend)
            e, z = e.mul_(bend), z.mul_(bend)
        for product, of_tokens in zip(self.products, (e, z), strict=False):
            self.add_product(product, of_tokens, weight)

    def logits(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z of the tokens whose rows of the output layer these are, with softcap's bend (``LogitTransform.apply_``).

        h W^T is in fp32: bf16 logits near 20 are 0.125 apart, which is noise of that size in every log-prob. Where the
        device does not give products of bf16 factors in fp32, the factors must be fp32.
        """
        if self.widens and weight.dtype != self.dtype:
            raw = torch.mm(self.hidden, weight.t(), out_dtype=self.dtype)
        else:
            if weight.dtype != self.dtype:
                weight = self.space.matrix("weight", weight.shape, self.dtype).copy_(weight)
            shape = torch.Size((len(self.hidden), len(weight)))
            raw = torch.mm(self.hidden, weight.t(), out=self.space.matrix("z", shape, self.dtype))
        return self.transform.apply_(raw if bias is None else raw.add_(bias))

    def targets_in(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which targets are among ``count`` tokens from ``start`` on (C,), and their places there (C, 1)."""
        index = self.targets - start
        return (index >= 0) & (index < count), index.clamp(0, count - 1)[:, None]

    def add_product(self, product: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor) -> None:
        """Add ``factor @ weight`` to ``product``."""
        if weight.dtype == self.dtype:
            product.addmm_(factor, weight)
            return
        rounded = self.space.matrix("factor", factor.shape, weight.dtype).copy_(factor)
        if self.widens:
            product.add_(torch.mm(rounded, weight, out_dtype=self.dtype))
        else:
            product.add_(torch.mm(rounded, weight, out=self.space.matrix("product", product.shape, weight.dtype)))

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies (C,), after the last tile."""
        z, e, total = self._with_target()
        return z - total.log(), total.log() - (self.sum_z + e * z) / total

    def normaliser(self) -> torch.Tensor:
        """logsumexp(z) (C,), after the last tile."""
        _, _, total = self._with_target()
        return self.largest + total.log()

    def gradients(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The gradients' vectors (C, H) in the dtype of ``hidden``; ``weight`` is the whole output layer (V, H)."""
        if not self.products:
            return []
        z, e, total = self._with_target()
        target_rows, scale = weight[self.targets], (self.transform.slope / total)[:, None]
        vectors = [(self.sum * self.target_bend)[:, None] * target_rows - self.products[0]]
        if len(self.products) > 1:
            offset = self.scores()[1] - total.log()
            of_target = (e * (z + offset) * self.target_bend)[:, None] * target_rows
            vectors.append(-(self.products[1] + offset[:, None] * self.products[0] + of_target))
        return [vector.mul_(scale).to(self.out_dtype) for vector in vectors]

    def _with_target(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The target's z - m and e, and the sum with it."""
        z = self.target_z - self.largest
        e = z.exp()
        return z, e, self.sum + e


@cache
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``device`` multiplies factors of ``dtype`` into products in fp32 (``torch.mm`` with ``out_dtype``): tried
    once, since cards, builds and versions of PyTorch differ, with a warning where a GPU refuses. A CPU does not."""
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    try:
        return bool((torch.mm(ones, ones.t(), out_dtype=torch.float32) == 8).all())
    except torch.OutOfMemoryError:  # a full card says nothing about what it can
        raise
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"{device} gives no float32 products of {dtype} factors ({reason}); the output layer's factors are cast, "
            "which is slower",
            RunWarning,
            stacklevel=2,
        )
        return False


class Workspace:
    """Matrices that tile after tile uses again: on a CPU the page faults of new ones take a quarter of the time
    (bench/head.py)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The matrix ``name``, with whatever it held; the first shape asked for is the largest."""
        if name not in self._flat:
            self._flat[name] = torch.empty(shape.numel(), dtype=dtype, device=self.device)
        return self._flat[name][: shape.numel()].view(shape)


def tile_shape(hidden: torch.Tensor) -> tuple[int, int]:
    """How many positions and tokens to take at a time: logits, fp32 rows of the output layer and the running
    (positions, H) products all stay within the bound, and the chunks of positions are of equal size."""
    (count, size), tile = hidden.shape, CPU_TILE if hidden.device.type == "cpu" else GPU_TILE
    most, _ = tile_of(size, tile)
    positions = max(1, ceil(count / max(1, ceil(count / most))))
    return positions, max(1, min(tile.tokens, tile.elements // max(positions, size)))


def tile_of(size: int, tile: Tile) -> tuple[int, int]:
    """The most positions taken at a time where states have ``size`` numbers, and the tokens beside so many."""
    positions = max(1, min(tile.positions, tile.elements // size))
    return positions, max(1, min(tile.tokens, tile.elements // max(positions, size)))


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
