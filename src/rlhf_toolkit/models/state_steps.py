"""A decoded token of a gated delta net, written into its state in place.

    S <- exp(g) S,    d = beta (v - k S),    S <- S + k^T d,    o = q S

for each head, with S (K, V) in float32 and the rows q, k (K,), v, d (V,). transformers' own function in PyTorch makes
six tensors of the state's size on the way and takes some five times as long. Source: Yang, Kautz & Hatamizadeh (2024),
arXiv:2412.06464, equation 10.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

RULE = "torch_recurrent_gated_delta_rule"
"""What every family's module of transformers calls the function that its layers call for one token."""
EPSILON = 1e-6  # of the norm of queries and keys, as there


@contextmanager
def steps_in_place(model: nn.Module) -> Iterator[None]:
    """Inside, gated delta nets of ``model`` write the state of a token in place, to rounding the same numbers. Where
    the package of their kernels is installed, those run as they are."""
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    own = [(home, getattr(home, RULE)) for home in homes if hasattr(home, RULE) and find_spec("fla") is None]
    try:
        for home, rule in own:
            setattr(home, RULE, partial(delta_step, rule))
        yield
    finally:
        for home, rule in own:
            setattr(home, RULE, rule)


def delta_step(
    own: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """``query`` and ``key`` (n, 1, heads of keys, K), ``value`` (n, 1, heads, V), ``g`` and ``beta`` (n, 1, heads) to
    the output (n, 1, heads, V) and ``initial_state`` (n, heads, K, V), which is written to. Whatever else it is called
    with goes to ``own``, transformers' function."""
    state, normed = initial_state, options.get("use_qk_l2norm_in_kernel")
    plain = state is not None and state.dtype == torch.float32 and state.is_contiguous() and not torch.is_grad_enabled()
    if state is None or not (plain and normed and query.shape[1] == 1):
        return own(query, key, value, g=g, beta=beta, initial_state=initial_state, **options)
    rows, heads, width, depth = state.shape
    q, k = (_unit(each.float()).repeat_interleave(heads // each.shape[2], dim=2) for each in (query, key))
    q, k, v = (each.reshape(rows * heads, 1, -1) for each in (q * width**-0.5, k, value.float()))
    s = state.view(rows * heads, width, depth).mul_(g.float().exp().reshape(-1, 1, 1))
    delta = torch.baddbmm(v, k, s, alpha=-1).mul_(beta.float().reshape(-1, 1, 1))
    s.baddbmm_(k.transpose(1, 2), delta)
    return torch.bmm(q, s).view(rows, 1, heads, depth).to(query.dtype), state


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)
