"""Tiny stand-ins for what a hub would serve, built in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("a", "b", "c", "hello", "world", "be", "brief", "<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(
    *,
    words: Sequence[str] = WORDS,
    unk: str | None = "<unk>",
    bos: str | None = None,
    eos: str | None = "</s>",
    pad: str | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    appends_eos: bool = False,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: the special tokens given have the first ids, ``words`` the next ones.

    With ``bos`` it puts that token before plain text, as Llama's does, and with ``appends_eos`` the ``eos`` behind it.
    """
    named = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": pad}
    special = {name: token for name, token in named.items() if token is not None}
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special.values(), *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [token for token in (bos, eos if appends_eos else None) if token is not None]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*around[: bos is not None], "$A", *around[bos is not None :]]),
            special_tokens=[(token, vocabulary[token]) for token in around],
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, chat_template=chat_template, **special, **options
    )
