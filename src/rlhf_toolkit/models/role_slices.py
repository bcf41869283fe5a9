"""Role slices: one forward pass of the base serves several roles.

The rows of a batch are laid out role after role, ``[policy rows | value rows | reference rows]``. Every adapted linear
computes the base product once for all rows and then adds each role's low-rank delta to that role's own slice:

    y[rows of role] = x[rows of role] W^T + b + s_role (x[rows of role] A_role^T) B_role^T

Nothing is ever switched, so ``requires_grad``, ZeRO's partitioning and gradient checkpointing never disagree about
which adapter a number came from (docs/architecture.md, decision 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear

from rlhf_toolkit.distributed.zero3 import share_parameters
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.quantised import Matrix, QuantisedLinear, matrix_of


class RoleRows(NamedTuple):
    """Rows ``start`` to ``stop`` of the batch play ``role``."""

    role: str
    start: int
    stop: int


class RoleSlices:
    """Which rows play which role in the forward pass under way; shared by every adapted linear of one model."""

    def __init__(self) -> None:
        self._layout: tuple[RoleRows, ...] | None = None

    @contextmanager
    def layout(self, roles: Sequence[str], rows: int) -> Iterator[None]:
        """Inside, the batch has ``rows`` rows for each of ``roles``, in that order."""
        with self._using(tuple(RoleRows(role, i * rows, (i + 1) * rows) for i, role in enumerate(roles))):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` for ``torch.utils.checkpoint``: recomputation in backward runs under the layout of its
        forward."""
        return nullcontext(), self._using(self._layout)

    def of(self, x: torch.Tensor) -> tuple[RoleRows, ...]:
        """The layout in units of ``x.shape[0]``; a module that flattens (B, T, H) to (B T, H) row by row is
        understood."""
        if self._layout is None:
            raise ModelError(
                "an adapted layer ran outside SharedBase.forward, so no role is known; call the model itself"
            )
        rows = self._layout[-1].stop
        if x.shape[0] % rows:
            raise ModelError(
                f"an adapted layer got {x.shape[0]} rows for a batch of {rows}: it reorders or drops rows, as routed "
                "experts do, so role slices cannot reach it; name it in model.exclude_modules"
            )
        repeat = x.shape[0] // rows
        return tuple(RoleRows(role, start * repeat, stop * repeat) for role, start, stop in self._layout)

    @contextmanager
    def _using(self, layout: tuple[RoleRows, ...] | None) -> Iterator[None]:
        previous, self._layout = self._layout, layout
        try:
            yield
        finally:
            self._layout = previous


def sliced_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    matrix: Matrix,
    slices: Sequence[tuple[int, int, float]],
    adapters: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``x`` (N, ..., in) through the base and each slice's adapter, and each slice's x A^T. It carries no gradient,
    since it works in place.

    Args:
        matrix: makes (out, in) of the base's ``weight``, whichever way that is kept.
        slices: first row, end row and scale of each adapted slice.
        adapters: A (r, in) and B (out, r) of each slice in turn.
    """
    y = linear(x, matrix(weight, x.dtype), bias)
    flat_x, flat_y = x.reshape(x.shape[0], -1, x.shape[-1]), y.view(y.shape[0], -1, y.shape[-1])
    projections = []
    for (start, stop, scale), a, b in zip(slices, adapters[::2], adapters[1::2], strict=True):
        projection = linear(flat_x[start:stop].flatten(0, 1), a.to(x.dtype))
        flat_y[start:stop].flatten(0, 1).addmm_(projection, b.to(x.dtype).t(), alpha=scale)
        projections.append(projection)
    return y, projections


class RoleLora(torch.autograd.Function):
    """The adapted linear of several roles as one function: ``x`` (N, ..., in) to (N, ..., out); adapters A (r, in), B
    (out, r).

    Products run in the base's dtype and are added in place; each adapter's gradient comes back in the adapter's dtype.
    The base is frozen, so no weight gradient is computed. As separate autograd operations the same arithmetic costs
    1.5 to 1.8 times as much time (bench/role_lora.py) and keeps an fp32 copy of every activation. A quantised weight
    becomes a matrix once for the rows of all roles, and once more in backward: no matrix is kept in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        matrix: Matrix,
        slices: Sequence[tuple[int, int, float]],
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        """The base product of all rows, and each role's delta added to its own."""
        y, projections = sliced_product(x, weight, bias, matrix, slices, adapters)
        # The parameter itself is saved, never a view of it: ZeRO-3 frees its data after forward and brings it back for
        # backward.
        ctx.save_for_backward(x, weight, *adapters, *projections)
        ctx.slices, ctx.matrix = slices, matrix
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Gradients of ``x`` and of every adapter."""
        x, weight, *rest = ctx.saved_tensors
        pairs = 2 * len(ctx.slices)
        adapters, projections = rest[:pairs], rest[pairs:]
        dx = dy @ ctx.matrix(weight, dy.dtype) if ctx.needs_input_grad[0] else None
        flat_x, flat_dy = x.reshape(x.shape[0], -1, x.shape[-1]), dy.reshape(dy.shape[0], -1, dy.shape[-1])
        gradients: list[torch.Tensor] = []
        for (start, stop, scale), a, b, projection in zip(
            ctx.slices, adapters[::2], adapters[1::2], projections, strict=True
        ):
            d_rows = flat_dy[start:stop].flatten(0, 1)
            d_projection = d_rows @ b.to(dy.dtype)
            if dx is not None:
                flat_dx = dx.view(dx.shape[0], -1, dx.shape[-1])
                flat_dx[start:stop].flatten(0, 1).addmm_(d_projection, a.to(dy.dtype), alpha=scale)
            gradients.append((d_projection.t() @ flat_x[start:stop].flatten(0, 1)).to(a.dtype) * scale)
            # Skinny from the left: in the orientation of B itself the product takes 1.7 times as long on a CPU.
            gradients.append((projection.t() @ d_rows).t().to(b.dtype, memory_format=torch.contiguous_format) * scale)
        return dx, None, None, None, None, *gradients


def route_roles(model: nn.Module, slices: RoleSlices) -> None:
    """Make every LoRA linear of ``model`` add each role's delta to that role's rows, as ``slices`` says at the time of
    the call. A quantised layer without an adapter is the same for all rows, and keeps no matrix for backward either."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.forward = _role_forward(module, slices)  # type: ignore[method-assign]
            base = module.get_base_layer()
            adapters = [next(layer.parameters()) for part in (module.lora_A, module.lora_B) for layer in part.values()]
            share_parameters(module, (*base.parameters(recurse=False), *adapters))
        elif isinstance(module, QuantisedLinear):
            module.forward = partial(_product, module, [], [])  # type: ignore[method-assign]


def _role_forward(module: LoraLinear, slices: RoleSlices) -> Any:
    base: Any = module.get_base_layer()

    def forward(x: torch.Tensor) -> torch.Tensor:
        adapted = [
            (rows, module.lora_A[rows.role], module.lora_B[rows.role])
            for rows in slices.of(x)
            if rows.role in module.lora_A
        ]
        slices_of_x = [(rows.start, rows.stop, module.scaling[rows.role]) for rows, _, _ in adapted]
        return _product(base, slices_of_x, [adapter.weight for _, a, b in adapted for adapter in (a, b)], x)

    return forward


def _product(
    base: Any, slices: Sequence[tuple[int, int, float]], adapters: Sequence[Any], x: torch.Tensor
) -> torch.Tensor:
    """``x`` through ``base`` and its ``adapters``, with a gradient where one may be asked for."""
    matrix = matrix_of(base)
    if not torch.is_grad_enabled():  # decoding: there the bookkeeping of a function is a sixth of a layer
        return sliced_product(x, base.weight, base.bias, matrix, slices, adapters)[0]
    return RoleLora.apply(x, base.weight, base.bias, matrix, slices, *adapters)  # type: ignore[no-any-return]
