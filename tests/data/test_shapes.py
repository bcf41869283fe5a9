"""Columns of other tools: each shape gives the tokens of the same conversation in the toolkit's own columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_toolkit.data.instructions import ExampleSet, tokenise_examples
from rlhf_toolkit.data.preferences import PairSet, tokenise_pairs
from rlhf_toolkit.data.prompts import load_rows
from rlhf_toolkit.data.shapes import is_transcript, transcript_messages
from rlhf_toolkit.errors import DataError
from tests.support.chat_tokenizers import ask, byte_tokenizer, said, word_tokenizer
from tests.support.offenders import for_each

Row = dict[str, Any]


def examples(rows: list[Row], **changed: Any) -> ExampleSet:
    return tokenise_examples(datasets.Dataset.from_list(rows), byte_tokenizer(), **{"max_tokens": 1000, **changed})


def pairs(rows: list[Row], **changed: Any) -> PairSet:
    return tokenise_pairs(datasets.Dataset.from_list(rows), byte_tokenizer(), **{"max_tokens": 1000, **changed})


def fault(read: Any, rows: list[Row], **changed: Any) -> str:
    """The text of the DataError that ``rows`` raise, which has to be one line."""
    with pytest.raises(DataError) as caught:
        read(rows, **changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turn(speaker: str, value: str) -> Row:
    return {"from": speaker, "value": value}


def turns(*values: str) -> list[Row]:
    """Of human, gpt, human, ... one after another."""
    return [turn("gpt" if number % 2 else "human", value) for number, value in enumerate(values)]


# ---- examples --------------------------------------------------------------------------------------------------------

SYSTEM = said("system", "be brief")
EXAMPLES: dict[str, tuple[Row, Row]] = {
    "Alpaca": ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}),
    "Alpaca with input": (
        {"instruction": "add:", "input": "2 + 2\n3 + 3", "output": "b"},
        {"prompt": "add:\n2 + 2\n3 + 3", "completion": "b"},
    ),
    "Alpaca with an empty input and its text": (
        {"instruction": "a", "input": " ", "output": "b", "text": "### Instruction: a"},
        {"prompt": "a", "completion": "b"},
    ),
    "Alpaca without this input, with a system message": (
        {"instruction": "a", "input": None, "output": "b", "system": "be brief", "history": []},
        {"prompt": [SYSTEM, *ask("a")], "completion": "b"},
    ),
    "ShareGPT": ({"conversations": turns("a", "b", "c", "d"), "id": "x"}, {"messages": ask("a", "b", "c", "d")}),
    "ShareGPT with a system turn": (
        {"conversations": [turn("system", "be brief"), *turns("a", "b")], "system": ""},
        {"messages": [SYSTEM, *ask("a", "b")]},
    ),
    "ShareGPT with a column for it": (
        {"conversations": turns("a", "b"), "system": "be brief"},
        {"messages": [SYSTEM, *ask("a", "b")]},
    ),
    "ShareGPT with every speaker": (
        {
            "conversations": [
                *(turn("user", "a"), turn("chatgpt", "b"), turn("tool", "c"), turn("observation", "d")),
                turn("assistant", "e"),
            ]
        },
        {"messages": [*ask("a", "b"), said("tool", "c"), said("tool", "d"), said("assistant", "e")]},
    ),
    "messages under ShareGPT's name": ({"conversations": ask("a", "b")}, {"messages": ask("a", "b")}),
}


@for_each("name", EXAMPLES)
@for_each("chat_template", [True, False])
def test_an_example_of_another_tool(name: str, chat_template: bool) -> None:
    theirs, ours = EXAMPLES[name]
    found, expected = (examples([row], chat_template=chat_template).examples for row in (theirs, ours))
    assert found == expected


def test_a_system_prompt_goes_before_an_instruction_without_its_own() -> None:
    rows: list[Row] = [{"instruction": "a", "output": "b", "system": system} for system in ("be short", "")]
    expected = [{"prompt": [said("system", system), *ask("a")], "completion": "b"} for system in ("be short", "x")]
    assert examples(rows, system_prompt="x").examples == examples(expected).examples


def test_the_summary_says_which_columns_were_read() -> None:
    alpaca: Row = {"instruction": "a", "input": "", "output": "b"}
    assert examples([alpaca]).source == "prompts from instruction, input, loss on output"
    assert examples([{**alpaca, "system": "x"}]).source == "prompts from instruction, input, system, loss on output"
    row: Row = {"conversations": turns("a", "b")}
    assert examples([row]).source == "loss on every assistant message of conversations"
    assert examples([{**row, "system": "x"}]).source == "loss on every assistant message of conversations, system"
    assert examples([row], turns="last").source == "loss on the last assistant message of conversations"
    found = examples([{"prompt": ask("a"), "completion": [said("assistant", "b")]}], turns="last")
    assert found.source == "prompts from prompt, loss on the last message of completion"


def test_the_toolkit_s_own_columns_come_first() -> None:
    row: Row = {"conversations": turns("a", "b"), "instruction": "a", "output": "b", "text": "c"}
    own: Row = {"prompt": "c", "completion": "d"}
    assert examples([{**row, **own}]).examples == examples([own]).examples
    assert examples([row]).source.endswith("message of conversations")
    del row["conversations"]
    assert examples([row]).source == "prompts from instruction, loss on output"


def test_empty_and_long_responses_are_counted() -> None:
    for rows in (
        [{"instruction": "a", "output": text} for text in ("b", " ", "b" * 99)],
        [{"conversations": turns("a", text)} for text in ("b", " ", "b" * 99)],
    ):
        found = examples(rows, max_tokens=99)
        assert [example.index for example in found.examples] == [0]
        assert (found.dropped, found.total) == ({"empty response": 1, "too long": 1}, 3)


@for_each(
    "row, expected",
    [
        (
            {"conversations": [turn("alien", "a"), turn("gpt", "b")]},
            "conversations has a turn from 'alien'; those who speak are human, user, gpt, chatgpt, assistant, system, "
            "tool, observation: rename it",
        ),
        (
            {"conversations": [{"from": "human", "value": None}, turn("gpt", "b")]},
            "conversations has the turn {'from': 'human', 'value': None}, but from and value have to be strings;",
        ),
        ({"conversations": None}, "conversations has the turn None, but from and value have to be strings"),
        ({"conversations": "a"}, "conversations has the turn 'a', but from and value have to be strings"),
        ({"conversations": []}, "conversations [] is not a list of messages"),
        (
            {"conversations": turns("a")},
            "the last message is of role 'user', not the assistant's: there is no response",
        ),
        ({"conversations": turns("a", "b", "c")}, "the last message is of role 'user', not the assistant's"),
        ({"conversations": [turn("gpt", "a")]}, "the assistant speaks first, to nobody"),
        (
            {"conversations": [said("alien", "a"), turn("gpt", "b")]},
            "conversations has a message of unknown role 'alien'; the roles are",
        ),
        (
            {"conversations": [turn("system", "a"), *turns("a", "b")], "system": "be brief"},
            "system 'be brief' stands beside conversations with a system message of their own; remove one of the two",
        ),
        ({"instruction": None, "output": "b"}, "instruction None is not a string; repair that row"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input 3 is not a string; repair that row"),
        ({"instruction": "a", "system": ["b"], "output": "b"}, "system ['b'] is not a string; repair that row"),
        ({"instruction": "a", "output": None}, "output None is not a list of messages"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "history [['c', 'd']] is not read; give whole conversations in a column messages or conversations",
        ),
    ],
)
def test_rows_that_cannot_be_read(row: Row, expected: str) -> None:
    assert fault(examples, [row]).startswith(f"row 0: {expected}")


def test_the_faulty_row_is_named(tmp_path: Path) -> None:
    rows: list[Row] = [{"conversations": turns("a", "b")}, {"conversations": turns("a", "b")}]
    rows.append({"conversations": [turn("human", "a"), turn("bot", "b")]})
    assert fault(examples, rows).startswith("row 2: conversations has a turn from 'bot'")
    lines: list[Row] = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": [said("assistant", "b")]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        DataError, match=r"^row 1: output .* is a list, but in row 0 it is a string; give the column one"
    ):
        tokenise_examples(load_rows(str(tmp_path / "x.jsonl"), "train"), word_tokenizer(), max_tokens=9)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def transcript(*texts: str) -> str:
    """As Anthropic's rows have them."""
    return "".join(f"\n\n{'Assistant' if number % 2 else 'Human'}: {text}" for number, text in enumerate(texts))


PAIRS: dict[str, tuple[Row, Row]] = {
    "a transcript": (
        {"chosen": transcript("a", "b"), "rejected": transcript("a", "c")},
        {"prompt": ask("a"), "chosen": "b", "rejected": "c"},
    ),
    "a transcript of several turns and lines, of which one tells of Human: and Assistant:": (
        {
            "chosen": transcript("a\nHuman: b", "c\n\nd", "Assistant: e", "f\n"),
            "rejected": transcript("a\nHuman: b", "c\n\nd", "Assistant: e", "g"),
        },
        {"prompt": ask("a\nHuman: b", "c\n\nd", "Assistant: e"), "chosen": "f", "rejected": "g"},
    ),
    "a transcript without the first line breaks": (
        {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human:a\n\nAssistant:c", "margin": 2.0},
        {"prompt": ask("a"), "chosen": "b", "rejected": "c", "margin": 2.0},
    ),
    "ShareGPT": (
        {"conversations": turns("a", "b", "c"), "chosen": turn("gpt", "d"), "rejected": turn("gpt", "e")},
        {"prompt": ask("a", "b", "c"), "chosen": "d", "rejected": "e"},
    ),
    "ShareGPT with a system message, role and content": (
        {
            "conversations": ask("a"),
            "system": "be brief",
            "chosen": said("assistant", "d"),
            "rejected": said("assistant", "e"),
        },
        {"prompt": [SYSTEM, *ask("a")], "chosen": "d", "rejected": "e"},
    ),
    "ShareGPT with answers as strings": (
        {"conversations": turns("a"), "chosen": "d", "rejected": "e"},
        {"prompt": ask("a"), "chosen": "d", "rejected": "e"},
    ),
    "Alpaca": (
        {"instruction": "a", "input": "b", "chosen": " d", "rejected": " e"},
        {"prompt": "a\nb", "chosen": " d", "rejected": " e"},
    ),
    "whole conversations beside an instruction": (
        {"instruction": "x", "chosen": ask("a", "b"), "rejected": ask("a", "c")},
        {"prompt": ask("a"), "chosen": "b", "rejected": "c"},
    ),
}


@for_each("name", PAIRS)
@for_each("chat_template", [True, False])
def test_a_pair_of_another_tool(name: str, chat_template: bool) -> None:
    theirs, ours = PAIRS[name]
    found, expected = (pairs([row], chat_template=chat_template).pairs for row in (theirs, ours))
    assert found == expected


def test_the_summary_says_where_the_prompt_was_read() -> None:
    sources = {name: pairs([theirs]).source for name, (theirs, _) in PAIRS.items()}
    assert sources["a transcript"] == "from columns chosen, rejected"
    assert sources["a transcript without the first line breaks"] == "from columns chosen, rejected, margin"
    assert sources["ShareGPT"] == "from columns conversations, chosen, rejected"
    assert sources["ShareGPT with a system message, role and content"].startswith("from columns conversations, system,")
    assert sources["Alpaca"] == "from columns instruction, input, chosen, rejected"
    assert sources["whole conversations beside an instruction"] == "from columns chosen, rejected"


def test_what_a_transcript_is() -> None:
    assert is_transcript("\n\nHuman: a") and is_transcript("Assistant:")
    assert not any(map(is_transcript, ("a\n\nHuman: b", "Humans: a", "human: a", "", None, ["Human: a"])))
    assert transcript_messages("Human:  a \n\nAssistant:", "chosen", index=0) == ask("a", "")


def test_pairs_that_are_counted() -> None:
    rows: list[Row] = [
        {"chosen": transcript("a", chosen), "rejected": transcript("a", rejected)}
        for chosen, rejected in (("b", "c"), ("b", "b"), ("b ", "b"), ("", "b"), ("b", "c" * 99))
    ]
    expected = {"chosen equals rejected": 2, "empty response": 1, "too long": 1}
    assert pairs(rows, max_tokens=99).dropped == expected
    rows = [
        {"conversations": turns("a"), "chosen": turn("gpt", chosen), "rejected": turn("gpt", rejected)}
        for chosen, rejected in (("b", "c"), ("b", "b"), ("b", "b"), ("", "b"), ("b", "c" * 99))
    ]
    assert pairs(rows, max_tokens=99).dropped == expected


@for_each(
    "row, expected",
    [
        (
            {"chosen": transcript("a", "b"), "rejected": "c"},
            "rejected 'c' does not begin with Human: or Assistant:, as a transcript beside another does; repair that",
        ),
        ({"chosen": "c", "rejected": transcript("a", "b")}, "chosen 'c' does not begin with Human: or Assistant:"),
        ({"chosen": "b", "rejected": "c"}, "chosen 'b' is a string and there is no column prompt"),
        ({"chosen": transcript("a"), "rejected": transcript("a", "b")}, "the last message is of role 'user'"),
        (
            {"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "c")},
            "chosen (4 messages) and rejected (2) differ from message 1 on; they have to differ in the last message",
        ),
        (
            {"conversations": turns("a", "b"), "chosen": turn("gpt", "d"), "rejected": turn("gpt", "e")},
            "prompt ends with the assistant's message 'b'; move it to the response",
        ),
        (
            {"conversations": turns("a"), "chosen": turn("human", "d"), "rejected": turn("gpt", "e")},
            "chosen begins with a message of role 'user', not the assistant's",
        ),
        (
            {"conversations": turns("a"), "chosen": turn("gpt", "d"), "rejected": turn("bot", "e")},
            "rejected has a turn from 'bot'; those who speak are",
        ),
        (
            {"conversations": turns("a"), "chosen": turn("gpt", "d"), "rejected": None},
            "rejected None is NoneType, but in row 0 it is dict; give",
        ),
    ],
)
def test_pairs_that_cannot_be_read(row: Row, expected: str) -> None:
    good = PAIRS["ShareGPT" if "conversations" in row else "a transcript"][0]
    assert fault(pairs, [good, row]).startswith(f"row 1: {expected}")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_shapes_from_files(tmp_path: Path, suffix: str) -> None:
    """With a row whose optional columns are missing, which a file fills with None."""
    path = str(tmp_path / f"x.{suffix}")
    rows: list[Row] = [EXAMPLES["Alpaca with input"][0], EXAMPLES["Alpaca"][0]]
    texts = {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
    if suffix in texts:
        Path(path).write_text(texts[suffix])
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    found = tokenise_examples(load_rows(path, "train"), byte_tokenizer(), max_tokens=1000)
    assert found.examples == examples([EXAMPLES["Alpaca with input"][1], EXAMPLES["Alpaca"][1]]).examples
