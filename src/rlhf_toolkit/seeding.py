"""Seeds derived from names instead of carried in hidden state.

A stream that is a function of ``(seed, rollout, prompt, sample)`` is the same whatever the number of ranks, the order
of the work or the point at which a run was resumed. That is what makes results independent of how the work is cut.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*names: int | str) -> int:
    """A 63-bit seed that depends on every name and on their order, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def derived_generator(*names: int | str) -> torch.Generator:
    """A CPU generator at the beginning of the stream that ``names`` stand for."""
    return torch.Generator().manual_seed(derive_seed(*names))
