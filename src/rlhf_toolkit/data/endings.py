"""Whether what the chat template writes behind an assistant's text is a token that ends a response.

A model answers as the template has it: where the end of a turn is no stop token, responses run to their budget.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import Message, render, rendered_ids, template_name
from rlhf_toolkit.data.templates import NOTHING
from rlhf_toolkit.errors import DataError, shortened

ANSWER, NEXT = "So it is.", "And then?"


def check_turn_end(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] = NOTHING,
    *,
    index: int,
    stop_ids: Collection[int],
    stop_strings: Sequence[str] = (),
    chosen: bool = False,
) -> str | None:
    """Render an assistant's answer to ``messages``, the prompt of row ``index``, and look at what stands behind it.

    None where that holds a stop token or string, or the template does not take an answer there. DataError where it
    holds another special token. It is a warning where the stop tokens were ``chosen`` (``model.eos_token``), where
    there are stop strings, which may end a response before its turn ends, and where the template writes nothing behind
    an answer.
    """
    given = [*messages[:-1]] if messages[-1]["role"] == "assistant" else [*messages]
    answered = [*given, {"role": "assistant", "content": ANSWER}]
    found = []
    for more in ([], [{"role": "user", "content": NEXT}]):  # some end a turn with the name of who speaks next
        try:
            text = render([*answered, *more], tokenizer, values, index=index, add_generation_prompt=False)
        except DataError:
            continue
        behind = text.rpartition(ANSWER)[2].partition(NEXT)[0]
        found.append(rendered_ids(behind, tokenizer))
        if {*found[-1]} & {*stop_ids} or any(string in behind for string in stop_strings):
            return None
    if not found:
        return None
    token = special_token(found[0], tokenizer)
    if token is None:
        return (
            f"{template_name(tokenizer)} writes no stop token ({stop_names(stop_ids, tokenizer)}) behind the "
            "assistant's text: it does not show how a response ends, and the model has to know it by itself"
        )
    told = (
        f"{template_name(tokenizer)} ends the assistant's turn with {shortened(token, 80)}, which is no stop token "
        f"({stop_names(stop_ids, tokenizer)})"
    )
    if chosen or stop_strings:
        unless = " unless it writes a stop string" if stop_strings else ""
        return f"{told}: a model that answers as the template has it runs to its budget{unless}; {way_out(token)}"
    raise DataError(
        f"{told}: responses would not end there, but run to their budget; {way_out(token)}, or data.chat_template: "
        "false with prompts as strings for a base model"
    )


def special_token(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first of ``ids`` that is no part of a text, as its token."""
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    found = next((each for each in ids if each in special), None)
    return None if found is None else str(tokenizer.convert_ids_to_tokens(found))


def stop_names(stop_ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Stop tokens for people."""
    return (
        ", ".join(shortened(tokenizer.convert_ids_to_tokens(stop), 80) for stop in sorted(stop_ids)) or "there is none"
    )


def way_out(token: str) -> str:
    """What to do where ``token`` ends the assistant's turn."""
    return f"set model.eos_token: {shortened(token, 80)}"
