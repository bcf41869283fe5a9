"""Tokenizers with chat templates that end the assistant's turns, and ChatML written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes.sentiment.fetch_model import default_folder
from tests.support.builders import tiny_tokenizer

TURNS = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}</s> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Of whole words, for ``tiny_tokenizer``: ``<user> hello <assistant> world </s>``."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
"""ChatML with tools, calls of them and a switch for thinking, as Qwen3 has it; every earlier turn stays as it was."""
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOL_FOLDER = default_folder()


def word_tokenizer(chat_template: str | None = TURNS, **options: Any) -> PreTrainedTokenizerFast:
    """Whole words, as ``tiny_tokenizer`` has them."""
    return tiny_tokenizer(chat_template=chat_template, **options)


def byte_tokenizer(
    chat_template: str | None = CHATML, *, merges: Sequence[tuple[str, str]] = (), eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and its descendants': bytes, ``merges`` of them, and the special tokens of ChatML;
    with another ``eos``, a base model's, that one as well."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*dict.fromkeys(["<|im_start|>", "<|im_end|>", eos])])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, chat_template=chat_template, eos_token=eos
    )


def chatml_tokenizers() -> dict[str, tuple[PreTrainedTokenizerBase, str | None]]:
    """Tokenizers that speak ChatML, and the system message their template writes where a conversation has none: a tiny
    one, and SmolLM2's where a recipe has fetched it."""
    found: dict[str, tuple[PreTrainedTokenizerBase, str | None]] = {
        "tiny": (byte_tokenizer(), None),
        "tiny with merges": (byte_tokenizer(merges=[("e", "l"), ("l", "o"), ("el", "lo"), ("Ġ", "t")]), None),
    }
    if SMOL_FOLDER.is_dir():
        found["SmolLM2"] = (AutoTokenizer.from_pretrained(SMOL_FOLDER), SMOL_SYSTEM)
    return found


def chatml(messages: Sequence[dict[str, Any]], default_system: str | None) -> str:
    """The text of a conversation, by a plain loop, up to the last end-of-turn token."""
    text = ""
    if default_system is not None and messages[0]["role"] != "system":
        text += "<|im_start|>system\n" + default_system + "<|im_end|>\n"
    for message in messages:
        text += "<|im_start|>" + message["role"] + "\n" + message["content"] + "<|im_end|>\n"
    return text[:-1]


def said(role: str, content: str) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def ask(*contents: str) -> list[dict[str, Any]]:
    """Messages of user, assistant, user, ... in turn."""
    return [said("assistant" if number % 2 else "user", content) for number, content in enumerate(contents)]
