"""Pairs of responses to one prompt, of which one is preferred: for reward models and for DPO."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import (
    Message,
    check_order,
    messages_of,
    prompt_messages,
    response_messages,
    says_nothing,
    with_system,
)
from rlhf_toolkit.data.prompts import NO_ROWS
from rlhf_toolkit.data.responses import chat_response, checked_stop_ids, plain_response
from rlhf_toolkit.data.rows import (
    CHOSEN_IS_REJECTED,
    EMPTY_RESPONSE,
    ColumnTypes,
    DropCount,
    dropped_text,
    span_text,
    unknown_columns,
)
from rlhf_toolkit.data.shapes import (
    BESIDE,
    alpaca_prompt,
    columns_read,
    is_transcript,
    sharegpt_messages,
    transcript_messages,
    turns_of,
)
from rlhf_toolkit.data.streams import Rows, first_row
from rlhf_toolkit.data.template_values import Unread, values_text
from rlhf_toolkit.data.template_values import template_values as values_of
from rlhf_toolkit.data.templates import NOTHING
from rlhf_toolkit.errors import DataError, shortened

UNDERSTOOD = (
    "prompt, chosen, rejected",
    "chosen, rejected (whole conversations as lists of messages, or Human/Assistant transcripts)",
    "conversations, chosen, rejected (ShareGPT)",
    "instruction, chosen, rejected (Alpaca)",
)


@dataclass(frozen=True)
class Pair:
    """One row after tokenisation. ``index`` is its position in the dataset; each response ends with its stop token, and
    ``prompt_ids + chosen_ids`` are the ids of the whole conversation. ``margin`` says by how much the chosen one is
    better, in the dataset's own unit; 0.0 where it has none. ``given`` is as in ``instructions.Example``."""

    index: int
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin: float = 0.0
    given: str | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer response."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class PairSet:
    """The pairs that are kept, in the dataset's order. ``total`` counts all rows, ``dropped`` those left out, by
    reason; ``source`` says which columns were read."""

    pairs: tuple[Pair, ...]
    total: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    def summary(self) -> str:
        """One line for a log."""
        prompt, chosen, rejected = (
            span_text([len(getattr(pair, name)) for pair in self.pairs])
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        return (
            f"{len(self.pairs)} of {self.total} pairs, {prompt} tokens of prompt, {chosen} of chosen and {rejected} of "
            f"rejected response; {dropped_text(self.dropped)}" + (f"; {self.source}" if self.source else "")
        )


def tokenise_pairs(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    system_prompt: str | None = None,
    chat_template: bool = True,
    template_values: Mapping[str, Any] = NOTHING,
    stop_ids: Collection[int] | None = None,
) -> PairSet:
    """Render and tokenise every row; what is left out is counted by reason.

    Columns ``chosen`` and ``rejected``: strings or lists of messages, answers to the column ``prompt``; or whole
    conversations that differ in the last message alone, the rest being the prompt: lists of messages, or transcripts
    with ``Human:`` and ``Assistant:``, which become messages. A ``prompt`` beside whole conversations has to be what
    they begin with. The prompt may also stand in ``conversations``, a list of turns with ``from`` and ``value``, or in
    ``instruction`` and ``input``. A column ``margin`` holds finite numbers. ``system_prompt``,
    ``chat_template``, ``template_values`` and ``stop_ids`` are as in ``instructions.tokenise_examples``.

    Rows with an empty response, with equal responses, and those where the prompt and one of them are longer than
    ``max_tokens`` together, are dropped, never truncated. DataError where columns, a row or the chat template cannot be
    used, or no row is left.
    """
    first, columns = first_row(rows), rows.column_names
    if first is None:
        raise DataError(f"the dataset {NO_ROWS}")
    if not {"chosen", "rejected"} <= set(columns):
        raise unknown_columns(columns, UNDERSTOOD)
    stops, unread = checked_stop_ids(tokenizer, stop_ids), Unread(tokenizer, template_values)
    reader = _Reader(tokenizer, stops, system_prompt, chat_template, template_values, ColumnTypes(), unread)
    dropped, pairs, total = DropCount(max_tokens), [], 0
    for index, row in enumerate(rows):
        total += 1
        pair = reader.read(row, index)
        if pair is None:
            dropped.add(EMPTY_RESPONSE)
        elif pair.chosen_ids == pair.rejected_ids:
            dropped.add(CHOSEN_IS_REJECTED)
        elif dropped.fits(pair.length):
            pairs.append(pair)
    if not pairs:
        raise dropped.nothing_left()
    prompt = _prompt_column(first)
    read = [columns_read(prompt, columns)] if prompt else []
    read += ["chosen", "rejected", *(["margin"] if "margin" in columns else [])]
    return PairSet(tuple(pairs), total, dict(dropped.reasons), f"from columns {', '.join(read)}{unread.text()}")


def _prompt_column(row: Mapping[str, Any]) -> str | None:
    """Where the prompt stands; None where chosen is a list of messages that brings it, or a transcript."""
    if "prompt" in row:
        return "prompt"
    return None if isinstance(row["chosen"], list) else next((column for column in BESIDE if column in row), None)


def _as_pair(row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Give a row of ShareGPT's or Alpaca's columns, or of transcripts, what others have: prompt, chosen, rejected."""
    column, sides = _prompt_column(row), {name: row[name] for name in ("chosen", "rejected")}
    if column == "conversations":
        answers = {
            name: response_messages(
                side if isinstance(side, str) else turns_of(side, name, index=index), name, index=index
            )
            for name, side in sides.items()
        }
        return {**row, "prompt": sharegpt_messages(row, index=index), **answers}
    if column == "instruction":
        return {**row, "prompt": alpaca_prompt(row, index=index)}
    if column is None and any(is_transcript(side) for side in sides.values()):
        return {**row, **{name: transcript_messages(side, name, index=index) for name, side in sides.items()}}
    return row


@dataclass(frozen=True)
class _Reader:
    """Turns a row into a pair, or into None where a response is empty."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    system_prompt: str | None
    chat_template: bool
    template_values: Mapping[str, Any]
    types: ColumnTypes
    unread: Unread

    def read(self, row: Mapping[str, Any], index: int) -> Pair | None:
        for column in (_prompt_column(row), "chosen", "rejected"):
            if column is not None:
                self.types.check(row[column], index=index, column=column)
        row = _as_pair(row, index)
        texts = [row.get("prompt"), row["chosen"], row["rejected"]]
        given: str | None = None
        known: dict[str, Any] = {"tokenizer": self.tokenizer, "stop_ids": self.stop_ids, "index": index}
        if all(isinstance(text, str) for text in texts) and not self.chat_template:
            margin = _margin(row, index)
            if not all(text.strip() for text in texts[1:]):
                return None
            parts = [plain_response(texts[0], text, **known) for text in texts[1:]]
        else:
            prompt, answers = self._messages(row, index)
            if any(map(says_nothing, answers)):
                return None
            values = values_of(row, self.template_values, index=index)
            self.unread.look([*prompt, *answers], values)
            parts = [chat_response(prompt, answer, values=values, **known) for answer in answers]
            margin, given = _margin(row, index), values_text(values)
        return Pair(index, parts[0][0], parts[0][1], parts[1][1], margin, given)

    def _messages(self, row: Mapping[str, Any], index: int) -> tuple[list[Message], list[Message]]:
        """The prompt's messages, and the last one of chosen and of rejected.

        A prompt beside whole conversations is their last user message, or all of what they share.
        """
        sides = []
        for column in ("chosen", "rejected"):
            side = row[column]
            if not isinstance(side, str):
                sides.append(messages_of(side, index=index, column=column))
            elif "prompt" in row:  # the assistant's answer to it
                sides.append(response_messages(side, column, index=index))
            else:
                raise DataError(
                    f"row {index}: {column} {shortened(side, 80)} is a string and there is no column prompt, so that "
                    "nothing says where the response begins; add prompt, or give whole conversations as lists of "
                    "messages"
                )
        if sides[0][0]["role"] != "assistant" or "prompt" not in row:
            prompt = _common_prompt(sides, index)
            beside, said = row.get("prompt"), prompt[-1]["content"].strip()
            if "prompt" in row and not (beside.strip() == said if isinstance(beside, str) else beside == prompt):
                raise DataError(
                    f"row {index}: prompt {shortened(beside, 80)} is not what chosen and rejected begin with, "
                    f"{shortened(said, 80)}; repair it, or remove the column prompt"
                )
            prompt = with_system(prompt, self.system_prompt)
        else:
            prompt = prompt_messages(row["prompt"], self.system_prompt, index=index)
            sides = [
                [*prompt, *response_messages(row[column], column, index=index)] for column in ("chosen", "rejected")
            ]
            _common_prompt(sides, index)
        return prompt, [side[-1] for side in sides]


def _common_prompt(sides: list[list[Message]], index: int) -> list[Message]:
    """All messages but the last, which both sides share. DataError where they do not."""
    for side in sides:
        check_order(side, index=index)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        at = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(map(len, sides)))
        raise DataError(
            f"row {index}: chosen ({len(chosen)} messages) and rejected ({len(rejected)}) differ from message {at} on; "
            "they have to differ in the last message alone: cut both behind the first answer that differs"
        )
    return chosen[:-1]


def _margin(row: Mapping[str, Any], index: int) -> float:
    if "margin" not in row:
        return 0.0
    margin = row["margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(
            f"row {index}: margin {shortened(margin)} is not a finite number; repair it or remove the column"
        )
    return float(margin)
