"""What a chat template writes between two turns of the assistant: the end of one, answers, the beginning of the next.

The policy's own tokens stay as it wrote them. Only what stands behind them is rendered, so nothing of a turn that has
been written is ever rendered again, where a template might leave out its thoughts or its spaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import Message, is_message, render, rendered_ids, template_name
from rlhf_toolkit.data.templates import NOTHING
from rlhf_toolkit.errors import DataError, shortened

PLACE = "Xq7vHere2kAnswerEndsZ"
"""Stands for the turn that was just written; no template and no message has it."""
ANSWERING = ("user", "tool")
"""Roles that may answer the policy."""


def is_answer(value: Any) -> bool:
    """Whether ``value`` is a list of one message or more that may answer a turn."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(is_message(each) and isinstance(each.get("content"), str) for each in value)
        and all(each["role"] in ANSWERING for each in value)
    )


def tokens_between(
    before: Sequence[Message],
    answers: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] = NOTHING,
    *,
    index: int,
    ended_by: int | None,
) -> list[int]:
    """The tokens that follow a turn of the assistant, after the messages ``before``, until it speaks again.

    ``ended_by`` is the stop token with which the turn has ended, None where it ended by a text: the template's own is
    left out where it is that one. DataError where the template rejects the messages, or leaves one of ``answers`` out.
    """
    turn = {"role": "assistant", "content": PLACE}
    text = render([*before, turn, *answers], tokenizer, values, index=index, add_generation_prompt=True)
    _, place, behind = text.rpartition(PLACE)
    lost = next((each for each in answers if each["content"].strip() not in behind), None)
    if not place or lost is not None:
        what = "the assistant's turn" if lost is None else f"a message of role {lost['role']} behind the assistant's"
        raise DataError(
            f"row {index}: {template_name(tokenizer)} does not write {what} "
            f"({shortened('' if lost is None else lost['content'], 80)}); answer in another role, or with a text"
        )
    tokens = list(rendered_ids(behind, tokenizer))
    return tokens[1:] if ended_by is not None and tokens[:1] == [ended_by] else tokens
