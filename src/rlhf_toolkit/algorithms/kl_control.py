"""Who decides the KL coefficient: a constant, or a controller that steers towards a target.

Both offer ``coefficient``, which shapes this rollout's rewards, and ``update(kl, count)``, called after that. The
number in ``coefficient`` is all the state there is: save it, and set it again to resume.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_toolkit.errors import ConfigError

ERROR_BOUND = 0.2
"""The relative error of one update is clamped to +-0.2, so that one odd rollout cannot move the coefficient far."""


@dataclass
class FixedKL:
    """A coefficient that never changes."""

    coefficient: float

    def update(self, kl: float, count: int) -> None:
        """Leave the coefficient as it is."""


@dataclass
class AdaptiveKL:
    """A coefficient that grows while the measured KL is above ``target`` and shrinks while it is below.

    ``coefficient *= 1 + clamp(kl / target - 1, +-0.2) * count / horizon``: after ``horizon`` sequences the coefficient
    has changed by at most about a factor e^0.2.

    Raises ``ConfigError`` for a target or horizon that is not positive.
    Source: Ziegler et al., arXiv 1909.08593, section 2.2; constants as in verl's ``AdaptiveKLController``.
    """

    coefficient: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        """Check the two settings that are divided by."""
        if self.target <= 0 or self.horizon <= 0:
            raise ConfigError(f"target={self.target}, horizon={self.horizon}: an adaptive KL needs both above 0")

    def update(self, kl: float, count: int) -> None:
        """Take in the mean KL per sequence (nats) of ``count`` sequences, over all ranks.

        Raises ``ConfigError`` for a count so far beyond the horizon that the coefficient could turn negative.
        """
        if count * ERROR_BOUND >= self.horizon:
            raise ConfigError(f"count={count} sequences per update need a horizon above {count * ERROR_BOUND:g}")
        # In this order a NaN goes through to the coefficient, where it is seen; min first would turn it into +0.2.
        error = min(max(kl / self.target - 1, -ERROR_BOUND), ERROR_BOUND)
        self.coefficient *= 1 + error * count / self.horizon
