"""The tokenizer and the stop tokens that lie beside an adapter: those that it was trained with, where a run had others
than its base's (``data.chat_template`` as a file, ``model.eos_token``), or where another tool leaves them there."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.loading import generation_eos_of, load_tokenizer

GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"
NEEDED = ("tokenizer.json", "tokenizer_config.json")
"""One of them is there where a tokenizer is."""
TOKENIZER_FILES = (
    *("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken"),
)
"""Patterns of the names under which transformers saves one."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in ``folder``; none where they are not all of one."""
    if not any((folder / name).is_file() for name in NEEDED):
        return []
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES)]


def stops_beside(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """The stop tokens that are named beside the adapter in ``folder``; ``config`` is the base's."""
    if not (folder / GENERATION_CONFIG).is_file():
        return ()
    found = generation_eos_of(str(folder), config)
    return (found,) if isinstance(found, int) else tuple(found or ())


def own_tokenizer(
    folder: Path, config: PretrainedConfig, *, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase | None, tuple[int, ...]]:
    """The tokenizer beside the adapter in ``folder``, None where there is none, and the stop tokens that are named
    there. ``config`` is the base's. Raises ModelError where a token has no row in the base's embedding."""
    stops = stops_beside(folder, config)
    if not tokenizer_files(folder):
        return None, stops
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    rows = config.get_text_config().vocab_size
    largest = max((*tokenizer.get_vocab().values(), *stops), default=0)
    if largest >= rows:
        raise ModelError(
            f"{folder} has a tokenizer with the token {largest}, but its base has rows for {rows} tokens; give the "
            "base that it was trained on, or take the tokenizer's files out of that folder to use the base's"
        )
    return tokenizer, stops
