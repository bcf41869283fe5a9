"""The text of what a policy has written: what rewards, environments and samples read of a response's tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

ROLES_OF_TOKENS = tuple(f"{role}_token_id" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def response_texts(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, left_out: Collection[int] | None = None
) -> list[str]:
    """The text of each of ``rows`` of token ids, without the ids ``left_out``; None leaves out every token that the
    tokenizer calls special.

    Tags of a format, channels and calls of tools may be special tokens: to read them is to leave out no more than what
    ends a response and what pads it (``ends_and_padding``).
    """
    if left_out is None:
        return list(tokenizer.batch_decode(rows, skip_special_tokens=True))
    said = [[token for token in row if token not in left_out] for row in rows]
    return list(tokenizer.batch_decode(said, skip_special_tokens=False))


def unread_tokens(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> dict[str, int]:
    """The special tokens in ``rows`` that nobody reads by default, with how many rows hold them, the most first.

    Those that end a response or stand around and between texts (bos, unk, sep and their like) are no tags of anybody's
    and are not among them.
    """
    known = [getattr(tokenizer, name) for name in ROLES_OF_TOKENS]
    ends, found = {*stop_ids, *known}, Counter(token for row in rows for token in {*row})
    hidden = {
        token: str(tokenizer.decode([token], skip_special_tokens=False))
        for token in found.keys() - ends
        if not tokenizer.decode([token], skip_special_tokens=True)
    }
    return {hidden[token]: count for token, count in found.most_common() if hidden.get(token)}


def ends_and_padding(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> frozenset[int]:
    """The ids that are no part of a text even where special tokens are: those that end a response, in every turn of it,
    and the tokenizer's own pad token. What else batches may be padded with can be a word."""
    pad = tokenizer.pad_token_id
    return frozenset({*stop_ids, *(() if pad is None else (int(pad),))})
