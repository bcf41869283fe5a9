"""What training asks of a tokenizer: an id to pad with, the ids that stop a response, and a chat template.

Nothing here changes the tokenizer or the size of an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from transformers import AddedToken, PreTrainedTokenizerBase

from rlhf_toolkit.errors import ConfigError, DataError, described, nearest, shortened

SPARE = re.compile(r"[<\[]\|?(reserved|unused|extra_)", re.IGNORECASE)
"""Tokens that a vocabulary keeps in reserve: ``<|reserved_special_token_0|>``, ``<unused0>``, ``[unused1]``."""


def pad_token_id(tokenizer: PreTrainedTokenizerBase, *, stop_ids: Collection[int], vocab_size: int) -> int:
    """An id to fill padded positions with: the tokenizer's own, or one that is not a stop id. Nothing is resized.

    Any id is safe, even EOS or one that occurs in text: masks are made from lengths, never from token ids, so padding
    is neither attended to nor trained on. It only has to have a row in the embedding, hence ``vocab_size``, the rows
    there. Without a pad token the choice is unk, then a token in reserve, then bos, then the lowest id; stop ids are
    avoided so that a padded batch is easy to read. DataError where no id is left.
    """
    own = tokenizer.pad_token_id
    if own is not None and own < vocab_size:
        return int(own)
    spare = sorted(number for token, number in tokenizer.get_vocab().items() if SPARE.match(token))
    for candidate in chain([tokenizer.unk_token_id], spare, [tokenizer.bos_token_id], range(vocab_size)):
        if candidate is not None and candidate < vocab_size and candidate not in stop_ids:
            return candidate
    raise DataError(
        f"no id to pad with: all of the vocab_size={vocab_size} ids of {_name(tokenizer)} are stop tokens "
        f"{sorted(stop_ids)}; give the tokenizer a pad_token below vocab_size"
    )


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config_eos: int | list[int] | None,
    *,
    also: Collection[int] = (),
    stop_strings: Sequence[str] = (),
) -> tuple[int, ...]:
    """The ids that end a response, sorted: the tokenizer's EOS together with those of the model's generation config,
    and ``also`` those.

    DataError where there is none, unless ``stop_strings`` end responses instead.
    """
    configured = [generation_config_eos] if isinstance(generation_config_eos, int) else generation_config_eos or []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tuple(sorted({int(i) for i in (*own, *configured, *also)}))
    if not ids and not stop_strings:
        raise DataError(
            f"no stop token: {_name(tokenizer)} and its generation config have eos_token_id=None, so that responses "
            "could never finish; set model.eos_token, or use rollout.stop_strings"
        )
    return ids


def end_with(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, vocab_size: int) -> tuple[int, ...]:
    """Make the first of ``tokens`` the tokenizer's EOS, and all of them special: one id wherever a text has them, and
    no part of what rewards read. Returns their ids; no vocabulary grows.

    ConfigError, by the setting model.eos_token, for one that is not in the vocabulary or has no row of ``vocab_size``.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if vocabulary.get(token, vocab_size) >= vocab_size:
            near = nearest(token, [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
            raise ConfigError(
                f"model.eos_token={shortened(token, 80)} is no token of {_name(tokenizer)}"
                f"{near or '; name the one that ends a turn in its chat template'}"
            )
    special = [AddedToken(token, special=True, normalized=False) for token in tokens]  # type: ignore[no-untyped-call]
    tokenizer.add_special_tokens({"eos_token": special[0]})
    tokenizer.add_tokens(special[1:], special_tokens=True)  # type: ignore[arg-type]
    return tuple(vocabulary[token] for token in tokens)


@contextmanager
def tokenising(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Around calls of ``tokenizer``: DataError where its own code panics.

    tokenizer.json may hold any regular expression. The library gives up one that tries too long, and then raises what
    is no Exception, so that nobody else would turn it into a line.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{_name(tokenizer)} cannot tokenise a text ({described(error)}); repair the patterns of its "
            "tokenizer.json, or use another model"
        ) from error


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{_name(tokenizer)} has no chat template; set data.chat_template: false and give prompts as strings, "
            "or use a model that has one"
        )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer of {tokenizer.name_or_path or 'an unnamed model'}"
