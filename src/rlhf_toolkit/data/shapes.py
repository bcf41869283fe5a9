"""Columns of other tools as prompts and chat messages: Alpaca's, ShareGPT's, and Anthropic's transcripts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rlhf_toolkit.data.chat import Message, is_message, messages_of, user_message
from rlhf_toolkit.errors import DataError, shortened

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's ``from``, and the role of that message."""
BESIDE = {"conversations": ("system",), "instruction": ("input", "system")}
"""Columns that are read with another where they are there."""
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def columns_read(column: str, columns: Collection[str]) -> str:
    """``column`` and those of ``columns`` that are read with it, for a log: ``instruction, input``."""
    return ", ".join([column, *(name for name in BESIDE.get(column, ()) if name in columns)])


def alpaca_prompt(row: Mapping[str, Any], *, index: int) -> str | list[Message]:
    """``instruction`` and, behind a line break, ``input`` where it has text; messages where ``system`` has text.

    DataError where one of them is no string, or earlier turns stand in a column ``history``.
    """
    if row.get("history"):
        raise DataError(
            f"row {index}: history {shortened(row['history'], 80)} is not read; give whole conversations in a column "
            "messages or conversations"
        )
    text = "\n".join(part for part in (_text(row, "instruction", index), _text(row, "input", index)) if part.strip())
    system = _text(row, "system", index)
    return user_message(text, system) if system.strip() else text


def sharegpt_messages(row: Mapping[str, Any], *, index: int) -> list[Message]:
    """The column ``conversations`` as messages, behind the one that ``system`` makes where it has text.

    DataError where there are two system messages, and as ``turns_of`` does.
    """
    messages, system = turns_of(row["conversations"], "conversations", index=index), _text(row, "system", index)
    if not system.strip():
        return messages
    if messages[0]["role"] == "system":
        raise DataError(
            f"row {index}: system {shortened(system, 80)} stands beside conversations with a system message of their "
            "own; remove one of the two"
        )
    return [{"role": "system", "content": system}, *messages]


def turns_of(value: Any, column: str, *, index: int) -> list[Message]:
    """A turn or a list of turns, of ``from`` and ``value`` or of ``role`` and ``content``, as messages.

    DataError where one has neither, or an unknown speaker.
    """
    messages: list[Message] = []
    for turn in value if isinstance(value, list) else [value]:
        if is_message(turn):
            messages.append(dict(turn))
            continue
        if not (isinstance(turn, Mapping) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise DataError(
                f"row {index}: {column} has the turn {shortened(turn)}, but from and value have to be strings; "
                "repair it"
            )
        if turn["from"] not in SPEAKERS:
            raise DataError(
                f"row {index}: {column} has a turn from {shortened(turn['from'])}; those who speak are "
                f"{', '.join(SPEAKERS)}: rename it"
            )
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return messages_of(messages, index=index, column=column)


def is_transcript(value: Any) -> bool:
    """True for a string that begins with ``Human:`` or ``Assistant:``."""
    return isinstance(value, str) and TURN.match(value) is not None


def transcript_messages(value: Any, column: str, *, index: int) -> list[Message]:
    """``\\n\\nHuman: ...\\n\\nAssistant: ...`` as messages, whitespace around each taken away.

    DataError where the text does not begin with a turn.
    """
    if not is_transcript(value):
        raise DataError(
            f"row {index}: {column} {shortened(value, 80)} does not begin with Human: or Assistant:, as a transcript "
            "beside another does; repair that row"
        )
    parts = TURN.split(value)
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _text(row: Mapping[str, Any], column: str, index: int) -> str:
    """The string in ``column``, empty where there is none. Only ``instruction`` must be there."""
    value = row.get(column)
    if value is None and column != "instruction":
        return ""
    if not isinstance(value, str):
        raise DataError(f"row {index}: {column} {shortened(value)} is not a string; repair that row")
    return value
