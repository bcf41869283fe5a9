"""Whether two computations of the same log-probs differ by more than rounding: against plain arithmetic and planted
differences."""

from __future__ import annotations

import statistics

import pytest
import torch

from rlhf_toolkit.algorithms.deviation import Deviation

TOKENS = 400
GENERATOR = torch.Generator().manual_seed(0)
EXPECTED = -torch.rand(TOKENS, generator=GENERATOR).mul(4)
ROUNDING = 0.04


def noise(size: float, seed: int) -> torch.Tensor:
    return size * torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed))


def deviation(difference: torch.Tensor) -> Deviation:
    return Deviation.between(EXPECTED + difference, EXPECTED)


MEASURED = deviation(noise(ROUNDING, 1))


def test_the_statistics_are_those_of_plain_arithmetic() -> None:
    difference = noise(0.5, 2)
    found = deviation(difference)
    sizes = sorted(abs(d) for d in ((EXPECTED + difference).double() - EXPECTED.double()).tolist())
    assert found.mean == pytest.approx(statistics.fmean(sizes))
    assert found.median == pytest.approx(sizes[(TOKENS - 1) // 2]) and found.largest == pytest.approx(sizes[-1])
    assert found.high == pytest.approx(sizes[int(0.9 * (TOKENS - 1))])
    expected = EXPECTED.double().tolist()
    slope, _ = statistics.linear_regression(expected, ((EXPECTED + difference).double() - EXPECTED.double()).tolist())
    assert found.slope == pytest.approx(slope)


def test_rounding_is_no_error_whatever_its_largest_token() -> None:
    assert deviation(noise(ROUNDING, 3)).beyond(MEASURED) is None
    one = noise(ROUNDING, 3)
    one[7] += 3.0
    assert deviation(one).beyond(MEASURED) is None
    assert deviation(torch.zeros(TOKENS)).beyond(deviation(torch.zeros(TOKENS))) is None


def test_what_is_larger_than_rounding_is_told_with_what_rounding_explains() -> None:
    told = deviation(noise(4 * ROUNDING, 4)).beyond(MEASURED)
    assert told is not None and "where rounding on this machine explains" in told
    assert deviation(torch.full((TOKENS,), 2e-4)).beyond(deviation(torch.zeros(TOKENS))) is not None


def test_a_temperature_shows_in_the_slope_where_its_size_is_that_of_rounding() -> None:
    stretched = noise(ROUNDING, 5) + 0.07 * (EXPECTED - EXPECTED.mean())
    found = deviation(stretched)
    assert found.mean < 3 * MEASURED.mean
    assert "in proportion to the log-probs (slope +0.067)" in (found.beyond(MEASURED) or "")


def test_a_tolerance_of_the_users_bounds_the_mean() -> None:
    found = deviation(torch.full((TOKENS,), 0.5))
    assert found.above(0.51) is None
    assert found.above(0.49) == "0.5 on average, more than 0.49"


def test_of_few_tokens_nothing_is_said_and_of_a_few_more_rounding_is_no_fault() -> None:
    assert deviation(torch.full((TOKENS,), 9.0)).beyond(MEASURED) is not None
    for count in (1, 2, 3, 15, 16, 20, 40):
        generator = torch.Generator().manual_seed(count)
        for _ in range(300):
            found, expected = (torch.rand(count, generator=generator) for _ in range(2))
            # Laplace: heavier tails than a normal's, as rounding has
            rounded = torch.distributions.Laplace(0.0, ROUNDING * 0.8).icdf(found.clamp(1e-3, 1 - 1e-3))
            assert Deviation.between(4 * expected + rounded, 4 * expected).beyond(MEASURED) is None, count
    assert Deviation.between(EXPECTED[:15] + 9.0, EXPECTED[:15]).beyond(MEASURED) is None
    assert Deviation.between(EXPECTED[:16] + 9.0, EXPECTED[:16]).beyond(MEASURED) is not None


def test_no_tokens_deviate_by_nothing() -> None:
    assert Deviation.between(torch.zeros(0), torch.zeros(0)).beyond(MEASURED) is None
