"""From a loss per token to one number, the same however the mini-batch was cut."""

from __future__ import annotations

from torch import Tensor

from rlhf_toolkit.algorithms.masking import masked_sum
from rlhf_toolkit.errors import ConfigError, DataError

AGGREGATION_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def aggregate(per_token: Tensor, mask: Tensor, *, mode: str, tokens: int, sequences: int, width: float) -> Tensor:
    """Reduce a loss to this piece's share of the whole mini-batch's value: the shares of all pieces add up to it.

    ``sum_b sum_t loss_bt / d_b`` over the mask, where d_b is

    - ``token-mean``: ``tokens``; every token counts alike (DAPO, arXiv 2503.14476, section 3.3);
    - ``seq-mean-token-sum``: ``sequences``; every sequence's sum counts alike;
    - ``seq-mean-token-mean``: ``sequences * (real tokens of row b)``; every sequence counts alike, so that a token of
      a long one counts less (GRPO, arXiv 2402.03300);
    - ``seq-mean-token-sum-norm``: ``sequences * width``; a constant (Dr. GRPO, arXiv 2503.20783).

    Shapes: per_token, mask (B, R) -> scalar. ``tokens`` and ``sequences`` count the real tokens and the non-empty
    sequences of the *whole* mini-batch over all its micro-batches and ranks, and ``width`` is one number for all of it
    (R of the rollout, or any scale): a count taken from the piece would make the update depend on the cut.
    Raises ``ConfigError`` for an unknown mode, ``DataError`` for a count below 1: the mean of nothing.
    """
    if mode not in AGGREGATION_MODES:
        raise ConfigError(f"mode={mode!r} is not a loss aggregation; choose one of {', '.join(AGGREGATION_MODES)}")
    if min(tokens, sequences, width) < 1:
        raise DataError(f"{tokens=}, {sequences=}, {width=}: each must be at least 1; the mini-batch has no real token")
    denominators: dict[str, float | Tensor] = {
        "token-mean": tokens,
        "seq-mean-token-sum": sequences,
        "seq-mean-token-mean": sequences * mask.sum(dim=1).clamp(min=1),
        "seq-mean-token-sum-norm": sequences * width,
    }
    return (masked_sum(per_token, mask, dim=1) / denominators[mode]).sum()
