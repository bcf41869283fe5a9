"""How long a sequence a model can read, and what happens beyond."""

from __future__ import annotations

from transformers import PretrainedConfig

from rlhf_toolkit.errors import ConfigError

TABLES = ("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt", "openai-gpt", "opt")
"""Kinds of models whose positions are a table: beyond its end reading fails. The test tries each of them."""


def longest_context(config: PretrainedConfig) -> int | None:
    """The tokens that the model's config says it can read; None where positions have no end, as with ALiBi."""
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return None
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return limit if isinstance(limit, int) else None


def check_context(name: str, config: PretrainedConfig, tokens: int, *, what: str, way_out: str) -> str | None:
    """A warning where a sequence of ``tokens``, which ``what`` names, is longer than the model ``name`` was made for;
    None where it fits.

    Raises ConfigError for the kinds in ``TABLES``: reading beyond the table fails, and on a GPU the process cannot go
    on. Rotary positions do go on, but nobody has trained them.
    """
    limit = longest_context(config)
    if limit is None or tokens <= limit:
        return None
    if config.get_text_config().model_type in TABLES:
        raise ConfigError(
            f"{what} has {tokens} tokens, but {name} was made for at most {limit}, where its table of positions ends; "
            f"{way_out}"
        )
    return (
        f"{what} has {tokens} tokens, but {name} was made for at most {limit}: beyond them nothing was trained; "
        f"{way_out}, unless you mean it"
    )
