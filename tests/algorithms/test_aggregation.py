from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.aggregation import AGGREGATION_MODES, aggregate
from rlhf_toolkit.errors import ConfigError, DataError
from tests.support.batches import MASK, like_mask, poisoned, real, widened
from tests.support.values import there

COUNTS = {"tokens": 17, "sequences": 5, "width": 7}


def by_loop(loss: Tensor, mask: Tensor, mode: str) -> float:
    """The value of a whole mini-batch, from the mode's name read aloud."""
    rows = [[loss[at].item() for at in real(mask) if at[0] == b] for b in range(mask.size(0))]
    rows = [row for row in rows if row]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    of_row = {"seq-mean-token-sum": sum, "seq-mean-token-mean": lambda row: sum(row) / len(row),
              "seq-mean-token-sum-norm": lambda row: sum(row) / mask.size(1)}[mode]  # fmt: skip
    return sum(map(of_row, rows)) / len(rows)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token-mean", 5.0), ("seq-mean-token-sum", 10.0), ("seq-mean-token-mean", 6.0), ("seq-mean-token-sum-norm", 2.5)],
)
def test_two_rows_by_hand(mode: str, expected: float) -> None:
    # The rows are 3, 4, 5 and 8: sums 12 and 8, means 4 and 8.
    loss = torch.tensor([[3.0, 4.0, 5.0, 99.0], [99.0, 8.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    assert aggregate(loss, mask, mode=mode, tokens=4, sequences=2, width=4).item() == expected


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_agrees_with_a_plain_loop(mode: str) -> None:
    loss = like_mask(0)
    ours = aggregate(poisoned(loss), MASK, mode=mode, **COUNTS)
    assert ours.item() == pytest.approx(by_loop(loss, MASK, mode), rel=1e-5)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("cuts", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1), (3, 0, 2)])
def test_the_pieces_add_up_to_the_whole(mode: str, cuts: tuple[int, ...]) -> None:
    loss = like_mask(1)
    pieces = zip(loss.split(cuts), MASK.split(cuts), strict=True)
    total = torch.stack([aggregate(piece, mask, mode=mode, **COUNTS) for piece, mask in pieces]).sum()
    assert total.item() == pytest.approx(by_loop(loss, MASK, mode), rel=1e-5)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_narrower_pieces_add_up_too(mode: str) -> None:
    # A micro-batch of short rows is cut to its own longest response: neither padding nor width may be seen.
    loss, short = like_mask(2), [2, 3, 4]
    pieces = [(loss[:2], MASK[:2]), (loss[short, :4], MASK[short, :4])]
    total = torch.stack([aggregate(piece, mask, mode=mode, **COUNTS) for piece, mask in pieces]).sum()
    assert total.item() == pytest.approx(by_loop(loss, MASK, mode), rel=1e-5)
    padded = aggregate(widened(loss), widened(MASK), mode=mode, **COUNTS)
    assert padded.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_empty_rows_and_masked_nan_add_nothing(mode: str) -> None:
    loss, mask = poisoned(like_mask(3)), MASK.clone()
    mask[2:4] = False
    loss = loss.requires_grad_()
    total = aggregate(loss, mask, mode=mode, tokens=int(mask.sum()), sequences=3, width=7)
    assert total.item() == pytest.approx(by_loop(loss.detach(), mask, mode), rel=1e-5)
    total.backward()
    assert there(loss.grad).isfinite().all() and torch.equal(there(loss.grad).ne(0), mask)


def test_a_piece_without_a_real_token_is_zero_with_zero_gradient() -> None:
    loss = torch.full((2, 3), torch.nan, requires_grad=True)
    total = aggregate(loss, torch.zeros(2, 3, dtype=torch.bool), mode="seq-mean-token-mean", **COUNTS)
    total.backward()
    assert total.item() == 0 and torch.equal(there(loss.grad), torch.zeros(2, 3))


def test_an_unknown_mode_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="mode='mean' is not a loss aggregation; choose one of token-mean, seq-mean-"):
        aggregate(like_mask(4), MASK, mode="mean", **COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_zero_is_named(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}=0.*at least 1"):
        aggregate(like_mask(5), MASK, mode="token-mean", **{**COUNTS, name: 0})
