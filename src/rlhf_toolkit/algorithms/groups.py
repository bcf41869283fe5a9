"""Statistics of the groups of a batch: the rows that answer the same prompt.

``groups`` (B,) int64 gives each row a number, and equal numbers are one group, in whatever order the rows stand. Every
result is (B,), the statistic of each row's own group, in float64: so equal scores deviate from their mean by exactly 0,
where in float32 the mean of three times 1.7 is not 1.7, and a division by the deviation blows that error up.
"""

from __future__ import annotations

from torch import Tensor


def group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """Sum x over each row's group. Shapes: x, groups (B,) -> (B,) float64."""
    numbers, index = groups.unique(return_inverse=True)
    return x.new_zeros(len(numbers)).double().index_add(0, index, x.double())[index]


def group_sizes(groups: Tensor) -> Tensor:
    """Count the rows of each row's group. Shapes: groups (B,) -> (B,) float64."""
    return group_sums(groups.new_ones(groups.shape), groups)


def group_means(x: Tensor, groups: Tensor) -> Tensor:
    """Average x over each row's group. Shapes: x, groups (B,) -> (B,) float64."""
    return group_sums(x, groups) / group_sizes(groups)


def group_deviations(x: Tensor, groups: Tensor) -> Tensor:
    """Estimate the standard deviation of x in each row's group: unbiased, and 0 in a group of one row.

    Shapes: x, groups (B,) -> (B,) float64.
    """
    squares = (x.double() - group_means(x, groups)).square()
    return (group_sums(squares, groups) / (group_sizes(groups) - 1).clamp(min=1)).sqrt()


def left_alone(groups: Tensor, kept: Tensor) -> Tensor:
    """Mark the rows that are ``kept`` while all others of their group, at least one, are not.

    A row that never had company is not marked.

    Shapes: groups (B,), kept (B,) bool -> (B,) bool.
    """
    return kept & (group_sizes(groups) > 1) & (group_sums(kept, groups) == 1)
