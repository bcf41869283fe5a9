"""Chat messages: what counts as one, the text a template makes of them, and the token ids of a text.

Special tokens are put in once: a chat template writes its own into the text, for plain text the tokenizer adds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.json_files import DEEPEST, is_deeper
from rlhf_toolkit.data.template_files import TemplateFile
from rlhf_toolkit.data.template_values import without_none
from rlhf_toolkit.data.templates import NOTHING, TemplateFailed, rendered
from rlhf_toolkit.data.tokenizers import require_chat_template, tokenising
from rlhf_toolkit.errors import DataError, shortened
from rlhf_toolkit.texts import printable

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def is_message(value: Any) -> bool:
    """True for a mapping with role and content as strings; beside calls of tools the content may be missing."""
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    calls = value.get("tool_calls")
    return isinstance(value.get("content"), str) or (
        value.get("content") is None
        and isinstance(calls, list)
        and bool(calls)
        and all(isinstance(call, Mapping) for call in calls)
    )


def is_message_list(value: Any) -> bool:
    """True for a list of one or more messages."""
    return isinstance(value, list) and bool(value) and all(is_message(message) for message in value)


def messages_of(value: Any, *, index: int, column: str) -> list[Message]:
    """``value`` of ``column`` in row ``index`` as messages whose roles are known, each with a content; arguments of
    calls that are JSON are what it says, as templates want them. DataError where it is no such list."""
    if not is_message_list(value):
        raise DataError(
            f"row {index}: {column} {shortened(value)} is not a list of messages with role and content as strings; "
            "repair that row"
        )
    for message in value:
        if message["role"] not in ROLES:
            raise DataError(
                f"row {index}: {column} has a message of unknown role {shortened(message['role'])}; the roles are "
                f"{', '.join(ROLES)}: rename it"
            )
        if message.get("weight") not in (None, 0, 1):
            raise DataError(
                f"row {index}: {column} has a message of weight {shortened(message['weight'])}; it is 1, or 0 for one "
                "that is not trained on"
            )
    return [_complete(message) for message in value]


def _complete(message: Mapping[str, Any]) -> Message:
    found = {name: value for name, value in message.items() if value is not None}
    if "tool_calls" in found:
        found["tool_calls"] = [with_arguments(without_none(call)) for call in found["tool_calls"]]
    return {**found, "content": found.get("content", "")}


def with_arguments(call: Message) -> Message:
    """A call of a tool, whose arguments are a mapping also where they came as its JSON."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    with suppress(ValueError, RecursionError):
        arguments = json.loads(function["arguments"])
        if isinstance(arguments, dict) and not is_deeper(arguments, DEEPEST):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def says_nothing(message: Message) -> bool:
    """Whether an assistant's message has neither text nor calls of tools."""
    return not message["content"].strip() and not message.get("tool_calls")


def is_trained(message: Message) -> bool:
    """Whether a conversation trains on this message: it is the assistant's, and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def user_message(text: str, system_prompt: str | None) -> list[Message]:
    """A string prompt as one user message, after ``system_prompt`` if there is one."""
    return with_system([{"role": "user", "content": text}], system_prompt)


def with_system(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """``messages`` after a system message of ``system_prompt``, unless there is none or they bring their own."""
    own = any(message["role"] in ("system", "developer") for message in messages)
    return [*messages] if system_prompt is None or own else [{"role": "system", "content": system_prompt}, *messages]


def prompt_messages(value: Any, system_prompt: str | None, *, index: int) -> list[Message]:
    """A prompt, string or messages, as messages. DataError where it is neither, or ends with the assistant's."""
    if isinstance(value, str):
        return user_message(value, system_prompt)
    messages = with_system(messages_of(value, index=index, column="prompt"), system_prompt)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"row {index}: prompt ends with the assistant's message {shortened(messages[-1]['content'], 80)}; move it "
            "to the response, or put the user's next message behind it"
        )
    return messages


def response_messages(value: Any, column: str, *, index: int) -> list[Message]:
    """A response, string or messages, as messages. DataError where it is neither, or begins with another role."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = messages_of(value, index=index, column=column)
    if messages[0]["role"] != "assistant":
        raise DataError(
            f"row {index}: {column} begins with a message of role {messages[0]['role']!r}, not the assistant's; move "
            "it to prompt, or put the whole conversation into one column"
        )
    return messages


def check_order(messages: Sequence[Message], *, index: int) -> None:
    """Raise DataError unless somebody speaks before the assistant, and the assistant has the last word."""
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise DataError(
            f"row {index}: the last message is of role {roles[-1]!r}, not the assistant's: there is no response to "
            "train on; add it, or take away what follows the assistant's last message"
        )
    if not {"user", "tool"} & set(roles[: roles.index("assistant")]):
        raise DataError(
            f"row {index}: the assistant speaks first, to nobody (roles {roles[:4]}); put a user's message before it, "
            "or remove that one"
        )


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] = NOTHING,
    *,
    index: int,
    add_generation_prompt: bool,
) -> str:
    """The chat template's text of ``messages`` and ``values`` (``template_values``), special tokens written out.
    DataError where it rejects them.

    Keys that ``datasets`` fills with None are left out; ``apply_chat_template`` does so since transformers 5.24.
    """
    require_chat_template(tokenizer)
    stated = [{k: value for k, value in message.items() if value is not None and k != "weight"} for message in messages]
    try:
        return rendered(tokenizer, stated, values, add_generation_prompt=add_generation_prompt)
    except TemplateFailed as error:
        roles = shortened([message["role"] for message in messages])
        raise DataError(
            f"row {index}: {template_name(tokenizer)} rejects messages of roles {roles}: "
            f"{printable(str(error), longest=400)}; change them or drop data.system_prompt"
        ) from error


def prompt_text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] = NOTHING,
    *,
    index: int,
) -> str:
    """The text that a response to ``messages`` continues: the template's, with its generation prompt.

    An assistant's message at the end is the beginning of the response (a prefill): it stands behind the generation
    prompt as it is, and nothing closes it. DataError where nobody speaks before it, or as ``render`` raises it.
    """
    beginning = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    if beginning is None:
        return render(messages, tokenizer, values, index=index, add_generation_prompt=True)
    if not {"user", "tool"} & {message["role"] for message in messages[:-1]}:
        raise DataError(
            f"row {index}: the prompt has nothing but the assistant's message {shortened(beginning, 80)}, to nobody; "
            "put a user's message before it"
        )
    return render(messages[:-1], tokenizer, values, index=index, add_generation_prompt=True) + str(beginning)


def rendered_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids of a rendered text, which has its special tokens already."""
    with tokenising(tokenizer):
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids of a plain text that goes on: with the tokenizer's bos, once, and without an eos it appends, also
    where that is not the one of ``tokenizers.end_with``.

    One that also separates, as BERT's ``[SEP]`` does, belongs to the text and stays.
    """
    bare = rendered_ids(text, tokenizer)
    if bare and bare[0] == tokenizer.bos_token_id:
        return bare
    with tokenising(tokenizer):
        full = tuple(tokenizer(text).input_ids)
    ends = {*tokenizer.all_special_ids} - {tokenizer.sep_token_id, tokenizer.cls_token_id}
    appended = len(full) > len(bare) and full[-1] in ends and bare[-1:] != full[-1:]
    return full[:-1] if appended else full


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """How an error calls the chat template."""
    if isinstance(tokenizer.chat_template, TemplateFile):
        return f"the chat template {tokenizer.chat_template.path}"
    return f"the chat template of {tokenizer.name_or_path or 'the model'}"
