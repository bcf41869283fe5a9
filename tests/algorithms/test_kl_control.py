from __future__ import annotations

import math

import pytest

from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.errors import ConfigError
from tests.support.offenders import for_each


def test_fixed_stays() -> None:
    control = FixedKL(0.1)
    control.update(1e9, 512)
    assert control.coefficient == 0.1


@for_each(
    "kl, expected",
    [
        (6.0, 0.5),  # on target
        (6.6, 0.5 * (1 + 0.1 * 100 / 1000)),  # a tenth above
        (5.4, 0.5 * (1 - 0.1 * 100 / 1000)),  # a tenth below
        (60.0, 0.5 * (1 + 0.2 * 100 / 1000)),  # far above: bounded
        (-60.0, 0.5 * (1 - 0.2 * 100 / 1000)),  # far below, as k1 may be: bounded
        (math.inf, 0.5 * (1 + 0.2 * 100 / 1000)),
    ],
)
def test_adaptive_by_hand(kl: float, expected: float) -> None:
    control = AdaptiveKL(0.5, target=6.0, horizon=1000)
    control.update(kl, 100)
    assert control.coefficient == pytest.approx(expected, rel=1e-12)


def test_updates_compound() -> None:
    control = AdaptiveKL(1.0, target=1.0, horizon=10)
    for _ in range(3):
        control.update(1.1, 5)
    assert control.coefficient == pytest.approx(1.05**3)


def test_the_coefficient_is_the_whole_state() -> None:
    run, resumed = AdaptiveKL(0.2, 6.0, 1000), AdaptiveKL(0.7, 6.0, 1000)
    run.update(9.0, 64)
    resumed.coefficient = run.coefficient
    run.update(3.0, 64)
    resumed.update(3.0, 64)
    assert resumed == run


def test_it_settles_where_the_kl_meets_the_target() -> None:
    # A policy whose KL is 0.3 / coefficient meets a target of 6 at a coefficient of 0.05, from either side.
    for start in (0.5, 0.005):
        control = AdaptiveKL(start, target=6.0, horizon=1000)
        for _ in range(500):
            control.update(0.3 / control.coefficient, 100)
        assert control.coefficient == pytest.approx(0.05, rel=1e-3)


def test_nan_is_not_hidden() -> None:
    control = AdaptiveKL(0.2, 6.0, 1000)
    control.update(math.nan, 10)
    assert math.isnan(control.coefficient)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 1000.0), (6.0, -1.0)])
def test_a_target_or_horizon_that_cannot_work_is_refused(target: float, horizon: float) -> None:
    with pytest.raises(ConfigError, match=f"target={target}, horizon={horizon}.*above 0"):
        AdaptiveKL(0.2, target, horizon)


def test_a_count_that_could_turn_the_sign_is_refused() -> None:
    with pytest.raises(ConfigError, match="count=1000 sequences per update need a horizon above 200"):
        AdaptiveKL(0.2, 6.0, 200.0).update(0.0, 1000)
