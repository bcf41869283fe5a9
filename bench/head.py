"""Log-probs, entropies and their gradient of one micro-batch: tiles of positions and vocabulary (models/heads.py)
against rows of whole logits, 2^24 elements at a time.

    python bench/head.py        # result in bench/results/head.json

Shapes: SmolLM2-135M's output layer, 768 response tokens, bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from common import SMOKE, arguments, keep, paired_medians

from rlhf_toolkit.models import heads
from rlhf_toolkit.models.heads import LogitTransform, Tile, TokenScores

POSITIONS, VOCABULARY, HIDDEN = (48, 4096, 64) if SMOKE else (768, 49152, 576)
ROWS = 2**24 // VOCABULARY
SIDES = ((128, 512), (256, 1024), (384, 512), (384, 2048), (384, 4096), (768, 1024))
PLAIN = LogitTransform(1.0, None, 1.0)


def main() -> None:
    arguments(__doc__).parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, dtype=torch.bfloat16)
    weight = (torch.randn(VOCABULARY, HIDDEN) / 20).bfloat16()
    targets = torch.randint(VOCABULARY, (POSITIONS,))
    figures = [compare(hidden, weight, targets, gradient=gradient) for gradient in (False, True)]
    keep("head", [*figures, *(other_tile(hidden, weight, targets, *sides) for sides in SIDES)])


def compare(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> dict[str, Any]:
    """Median milliseconds both ways, and their ratio."""
    h = hidden.clone().requires_grad_(gradient)

    def rows() -> None:
        vectors = whole_rows(hidden, weight, targets, gradient=gradient)[2:]
        if gradient:
            _ = vectors[0] * 2

    def tiles() -> None:
        logprobs, _ = TokenScores.apply(h, weight, None, targets, PLAIN, False)
        if gradient:
            logprobs.sum().backward()

    before, after = paired_medians(rows, tiles, repeats=5)
    return {"gradient": gradient, "whole_rows_ms": before, "tiles_ms": after, "ratio": after / before}


def other_tile(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, positions: int, tokens: int
) -> dict[str, Any]:
    """Milliseconds with gradient in tiles of ``positions`` x ``tokens`` instead of the default, and their ratio."""
    h, default = hidden.clone().requires_grad_(), heads.CPU_TILE

    def run(tile: Tile) -> None:
        heads.CPU_TILE = tile
        TokenScores.apply(h, weight, None, targets, PLAIN, False)[0].sum().backward()

    usual, other = paired_medians(lambda: run(default), lambda: run(Tile(2**24, positions, tokens)), repeats=5)
    heads.CPU_TILE = default
    return {"tile": [positions, tokens], "default_ms": usual, "tile_ms": other, "ratio": other / usual}


def whole_rows(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, gradient: bool
) -> list[torch.Tensor]:
    """Rows of fp32 logits of the whole vocabulary, from one fp32 copy of the weight."""
    in_full, outputs = weight.float(), []
    for h, t in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits = h.float() @ in_full.t()
        logp = logits.sub_(logits.logsumexp(-1, keepdim=True))
        p = logp.exp()
        columns = [logp.gather(-1, t[:, None]).squeeze(-1), -torch.linalg.vecdot(p, logp)]
        if gradient:
            d_logits = p.neg_().scatter_add_(-1, t[:, None], torch.ones(len(t), 1))
            columns.append(d_logits.to(weight.dtype) @ weight)
        outputs.append(columns)
    return [torch.cat(column) for column in zip(*outputs, strict=True)]


if __name__ == "__main__":
    main()
