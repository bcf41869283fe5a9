"""Examples for supervised fine-tuning: token ids, and at which of them there is a loss.

The shapes of rows are those of the ecosystem, found by their columns: conversations in ``messages`` or, ShareGPT's, in
``conversations``, prompt and response in two columns, verl's nested ones, Alpaca's, and plain text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import (
    Message,
    check_order,
    is_trained,
    messages_of,
    prompt_messages,
    response_messages,
    says_nothing,
    with_system,
)
from rlhf_toolkit.data.prompts import NO_ROWS
from rlhf_toolkit.data.responses import Ids, Span, checked_stop_ids, conversation, plain_response, plain_text
from rlhf_toolkit.data.rows import EMPTY_RESPONSE, ColumnTypes, DropCount, dropped_text, span_text, unknown_columns
from rlhf_toolkit.data.shapes import alpaca_prompt, columns_read, sharegpt_messages
from rlhf_toolkit.data.streams import Rows, first_row
from rlhf_toolkit.data.template_values import Unread, values_text
from rlhf_toolkit.data.template_values import template_values as values_of
from rlhf_toolkit.data.templates import NOTHING
from rlhf_toolkit.errors import DataError, shortened

UNDERSTOOD = (
    "messages",
    "prompt, completion",
    "prompt, response",
    "prompt with reward_model.ground_truth or extra_info.answer (verl)",
    "conversations (ShareGPT)",
    "instruction, output (Alpaca)",
    "text",
)
NESTED = (("extra_info", "answer"), ("reward_model", "ground_truth"))
"""Where verl's rows may hold a response, the fuller one first: a ground truth is often the final number alone."""
Read = tuple[Ids, list[Span], str | None]
"""A row's token ids, where it is trained on, and ``Example.given``."""
CONVERSATIONS, ALPACA = ("conversations",), ("instruction", "output")


@dataclass(frozen=True)
class Example:
    """One row after tokenisation. ``index`` is its position in the dataset; ``trained[i]`` is True where token i gets a
    loss. The first token never does: nothing stands before it. ``given`` says what its template was given beside the
    messages (``template_values.values_text``); None where none has rendered it."""

    index: int
    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    given: str | None = None

    def __post_init__(self) -> None:
        if len(self.trained) != len(self.token_ids) or not any(self.trained) or self.trained[0]:
            raise DataError(
                f"row {self.index}: trained={shortened(self.trained)} does not fit {len(self.token_ids)} tokens: it "
                "has one entry a token, True somewhere but not at the first"
            )

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one, at least 1."""
        return self.trained.index(True)

    @property
    def response_length(self) -> int:
        """Tokens from the first trained one on, with those between that others wrote."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True)
class ExampleSet:
    """The examples that are kept, in the dataset's order. ``total`` counts all rows, ``dropped`` those left out, by
    reason; ``source`` says which columns were read and what is trained on."""

    examples: tuple[Example, ...]
    total: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    def summary(self) -> str:
        """One line for a log."""
        trained = [sum(example.trained) for example in self.examples]
        return (
            f"{len(self.examples)} of {self.total} examples, "
            f"{span_text([len(example.token_ids) for example in self.examples])} tokens, {span_text(trained)} of them "
            f"trained on; {dropped_text(self.dropped)}" + (f"; {self.source}" if self.source else "")
        )


def tokenise_examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    system_prompt: str | None = None,
    chat_template: bool = True,
    template_values: Mapping[str, Any] = NOTHING,
    turns: str = "all",
    stop_ids: Collection[int] | None = None,
) -> ExampleSet:
    """Render and tokenise every row; what is left out is counted by reason.

    Shapes, the first whose columns are there: ``messages``, a conversation; ``prompt`` with ``completion`` or
    ``response``, strings or lists of messages; verl's, ``prompt`` as messages with ``extra_info.answer`` or
    ``reward_model.ground_truth``; ``conversations``, lists of turns with ``from`` and ``value``; ``output`` with
    ``instruction`` and ``input``; ``text``. The loss is on every message of the assistant that is not part of a prompt,
    its end-of-turn token included, and on nothing else: not on one of ``weight`` 0, and with ``turns`` "last" on the
    last one alone; in ``text`` on every token but the first. ``template_values`` and the row's own go to the template
    (``template_values.template_values``); what it does not read of a row is counted. With
    ``chat_template`` a string prompt becomes one user message, after ``system_prompt``, and a string response the
    assistant's; without, both are tokenised as they stand and EOS is appended, as it is to ``text``. Lists of messages
    always go through the chat template, after ``system_prompt`` where they bring no system message. ``stop_ids`` are
    the tokens that may end a turn beside the tokenizer's EOS (``tokenizers.stop_token_ids``).

    Rows with an empty response, and those longer than ``max_tokens``, are dropped, never truncated. DataError where
    columns, a row or the chat template cannot be used, or no row is left.
    """
    shape = _shape(rows)
    stops, unread = checked_stop_ids(tokenizer, stop_ids), Unread(tokenizer, template_values)
    reader = _Reader(tokenizer, stops, system_prompt, chat_template, template_values, turns, ColumnTypes(), unread)
    dropped, examples, total = DropCount(max_tokens), [], 0
    for index, row in enumerate(rows):
        total += 1
        read = reader.read(row, shape, index)
        if read is None:
            dropped.add(EMPTY_RESPONSE)
        elif dropped.fits(len(read[0])):
            token_ids, spans, given = read
            trained = [False] * len(token_ids)
            for start, stop in spans:
                trained[start:stop] = [True] * (stop - start)
            examples.append(Example(index, token_ids, tuple(trained), given))
    if not examples:
        raise dropped.nothing_left()
    read_from = columns_read(shape[0], rows.column_names)
    if shape == ("text",):
        source = "loss on every token of text but the first"
    elif len(shape) == 1:
        source = f"loss on {'the last' if turns == 'last' else 'every'} assistant message of {read_from}"
    else:
        source = f"prompts from {read_from}, loss on {'the last message of ' * (turns == 'last')}{shape[1]}"
    return ExampleSet(tuple(examples), total, dict(dropped.reasons), source + unread.text())


def _shape(rows: Rows) -> tuple[str, ...]:
    """The columns that are read, as ``("prompt", "completion")`` or, verl's, ``("prompt", "extra_info.answer")``: which
    of verl's places holds the first row's response says where all rows have it."""
    columns, first = rows.column_names, first_row(rows)
    if first is None:
        raise DataError(f"the dataset {NO_ROWS}")
    for shape in (("messages",), ("prompt", "completion"), ("prompt", "response")):
        if set(shape) <= set(columns):
            return shape
    if "prompt" in columns and {outer for outer, _ in NESTED} & set(columns):
        for outer, inner in NESTED:
            if isinstance(first.get(outer), Mapping) and isinstance(first[outer].get(inner), str):
                return "prompt", f"{outer}.{inner}"
        raise DataError(
            f"row 0: there is a prompt but no response: {' and '.join(f'{a}.{b}' for a, b in NESTED)} hold no string; "
            f"the columns are {', '.join(columns)}: add a column completion or response"
        )
    for shape in (CONVERSATIONS, ALPACA, ("text",)):
        if set(shape) <= set(columns):
            return shape
    raise unknown_columns(columns, UNDERSTOOD)


def is_example_shape(rows: Rows) -> bool:
    """Whether the columns of ``rows`` are those of examples, not of prompts alone."""
    try:
        return bool(_shape(rows))
    except DataError:
        return False


@dataclass(frozen=True)
class _Reader:
    """Turns a row into token ids and the spans that are trained on, or into None where its response is empty."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    system_prompt: str | None
    chat_template: bool
    template_values: Mapping[str, Any]
    turns: str
    types: ColumnTypes
    unread: Unread

    def read(self, row: Mapping[str, Any], shape: tuple[str, ...], index: int) -> Read | None:
        values = []
        for column in shape:
            outer, _, inner = column.partition(".")
            value = row[outer]
            if inner:
                value = value.get(inner) if isinstance(value, Mapping) else None
                if not isinstance(value, str):
                    raise DataError(
                        f"row {index}: {column} {shortened(value)} is no response; every row has to have one there as "
                        "a string, or in a column completion or response"
                    )
            self.types.check(value, index=index, column=column)
            values.append(value)
        if shape == ("text",):
            ids = plain_text(values[0], self.tokenizer, stop_ids=self.stop_ids, index=index)
            return None if ids is None else (ids, [(1, len(ids))], None)
        if shape == ("messages",):
            whole = with_system(messages_of(values[0], index=index, column="messages"), self.system_prompt)
            return self._conversation(row, whole, 0, index)
        if shape == CONVERSATIONS:
            whole = with_system(sharegpt_messages(row, index=index), self.system_prompt)
            return self._conversation(row, whole, 0, index)
        prompt, response = values
        if shape == ALPACA:
            prompt = alpaca_prompt(row, index=index)
        if isinstance(prompt, str) and isinstance(response, str) and not self.chat_template:
            if not response.strip():
                return None
            given, own = plain_response(prompt, response, self.tokenizer, stop_ids=self.stop_ids, index=index)
            return given + own, [(len(given), len(given) + len(own))], None
        before = prompt_messages(prompt, self.system_prompt, index=index)
        whole = [*before, *response_messages(response, shape[1], index=index)]
        return self._conversation(row, whole, len(before), index)

    def _conversation(self, row: Mapping[str, Any], messages: list[Message], first: int, index: int) -> Read | None:
        check_order(messages, index=index)
        own = [number for number in range(first, len(messages)) if is_trained(messages[number])]
        own = own[-1:] if self.turns == "last" else own
        if not own or any(says_nothing(messages[number]) for number in own):
            return None
        values = values_of(row, self.template_values, index=index)
        self.unread.look(messages, values, also_read=("weight",))
        ids, spans = conversation(messages, self.tokenizer, values, trained=own, stop_ids=self.stop_ids, index=index)
        return ids, spans, values_text(values)
