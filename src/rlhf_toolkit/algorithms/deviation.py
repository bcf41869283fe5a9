"""How far two computations of the same log-probs lie apart, and whether rounding explains it.

A product's last bits depend on the kernel that computes it, and the kernel on the number of rows, the processor and the
number of threads. In bfloat16 one rounding more or less early in a model moves every log-prob by some hundredths, a few
by some tenths. So no bound on the largest difference tells a mistake from a machine. What rounding does to this model
is measured instead, and a difference is judged by its mean and its quantiles against that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 3.0
"""Two right computations differ by 0.9 to 1.3 times what is measured (bfloat16, SmolLM2, four kinds of processor), a
temperature of 0.9 on one side by 3.5 to 4.5 times."""
FLOOR = 1e-4  # of a log-prob: what float32 needs where the measured rounding is smaller still
LARGEST_SLOPE = 0.02  # 0.07 to 0.1 where a temperature of 0.9 is applied on one side only
STANDARD_ERRORS = 4.0
FEWEST = 16  # rounding as it is measured passes for a fault in 4 % of draws of 4 tokens, 0.3 % of 8, none of 16


@dataclass(frozen=True)
class Deviation:
    """What d = found - expected looks like over the tokens of two computations of the same log-probs.

    ``mean``, ``median`` and ``high`` (the 90 % quantile) are of abs(d), ``largest`` is for the log alone. ``slope`` is
    that of d over the expected log-probs, cov(d, expected) / var(expected): a temperature on one side stretches the
    log-probs, rounding does not. ``slope_error`` is the standard error that it has by chance. ``count`` is K.
    """

    mean: float
    median: float
    high: float
    largest: float
    slope: float
    slope_error: float
    count: int

    @classmethod
    def between(cls, found: Tensor, expected: Tensor) -> Deviation:
        """Of two tensors (K,) of log-probs; all 0 where there are none."""
        if not found.numel():
            return cls(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
        difference, centred = found.double() - expected.double(), expected.double() - expected.double().mean()
        size, variation = difference.abs(), centred.square().sum()
        slope = (difference * centred).sum() / variation if variation > 0 else torch.zeros(())
        remaining = (difference - difference.mean() - slope * centred).square().sum() / max(len(difference) - 2, 1)
        error = (remaining / variation).sqrt() if variation > 0 else torch.zeros(())
        ordered = size.sort().values  # Tensor.quantile takes at most 2^24 numbers
        half, nine_tenths = (ordered[int(share * (len(ordered) - 1))].item() for share in (0.5, 0.9))
        return cls(size.mean().item(), half, nine_tenths, ordered[-1].item(), slope.item(), error.item(), len(ordered))

    def beyond(self, rounding: Deviation) -> str | None:
        """What about this deviation rounding does not explain, in words, or None.

        ``rounding`` is between two right computations here: the statistics of abs(d) may be ``FACTOR`` times as large
        as theirs, and the slope ``LARGEST_SLOPE`` beside what chance makes of it. Of fewer than ``FEWEST`` tokens
        nothing is said: their mean and quantiles are no statistics.
        """
        if self.count < FEWEST:
            return None
        for name, words in (("mean", "on average"), ("median", "in the median"), ("high", "at the 90 % quantile")):
            found, explained = getattr(self, name), FACTOR * getattr(rounding, name) + FLOOR
            if found > explained:
                return f"{found:.3g} {words}, where rounding on this machine explains {explained:.2g}"
        by_chance = STANDARD_ERRORS * max(self.slope_error, rounding.slope_error) + FACTOR * abs(rounding.slope)
        if abs(self.slope) > LARGEST_SLOPE + by_chance:
            return (
                f"{self.mean:.3g} on average and in proportion to the log-probs (slope {self.slope:+.3f}), where "
                f"rounding explains a slope of {LARGEST_SLOPE + by_chance:.2g}"
            )
        return None

    def above(self, tolerance: float) -> str | None:
        """The same against a bound on the mean that the user has set."""
        return None if self.mean <= tolerance else f"{self.mean:.3g} on average, more than {tolerance:g}"
