"""Pairs of responses: against conversations written out by hand, each shape, each fault."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.instructions import tokenise_examples
from rlhf_toolkit.data.preferences import Pair, PairSet, tokenise_pairs
from rlhf_toolkit.data.prompts import load_rows
from rlhf_toolkit.errors import DataError
from tests.support.chat_tokenizers import TURNS, ask, byte_tokenizer, chatml, chatml_tokenizers, said, word_tokenizer
from tests.support.offenders import for_each

CHATML_TOKENIZERS = chatml_tokenizers()
BY_TOKENIZER = for_each(("tokenizer", "default_system"), CHATML_TOKENIZERS.values(), ids=CHATML_TOKENIZERS.keys())
STRINGS = {"prompt": "hello", "chosen": "world", "rejected": "a b"}


def pairs(rows: list[dict[str, Any]] | datasets.Dataset, tokenizer: Any = None, **changed: Any) -> PairSet:
    table = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    return tokenise_pairs(table, tokenizer or word_tokenizer(), **{"max_tokens": 1000, **changed})


def fault(rows: list[dict[str, Any]] | datasets.Dataset, tokenizer: Any = None, **changed: Any) -> str:
    """The text of the DataError that ``rows`` raise, which has to be one line."""
    with pytest.raises(DataError) as caught:
        pairs(rows, tokenizer, **changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(pair: Pair) -> tuple[str, str, str]:
    prompt, chosen, rejected = (
        str(word_tokenizer().decode(list(ids))) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    return prompt, chosen, rejected


def sides(messages: list[dict[str, Any]], chosen: str, rejected: str) -> dict[str, Any]:
    """Whole conversations."""
    return {"chosen": [*messages, said("assistant", chosen)], "rejected": [*messages, said("assistant", rejected)]}


# ---- token ids -------------------------------------------------------------------------------------------------------

CONVERSATIONS = [
    ask("What is 2 + 2?"),
    [said("system", "Be brief."), *ask("hello", "Δt?", "two\nlines")],
    ask("a", "b", "c", "d", "🙂"),
]


@BY_TOKENIZER
@for_each("messages", CONVERSATIONS)
def test_prompt_and_response_are_the_tokens_of_the_whole_conversation(
    tokenizer: PreTrainedTokenizerBase, default_system: str | None, messages: list[dict[str, Any]]
) -> None:
    row = sides(messages, "It is 4.", "five,\n  or so")
    (pair,) = pairs([row], tokenizer).pairs
    for own, column in ((pair.chosen_ids, "chosen"), (pair.rejected_ids, "rejected")):
        whole = tokenizer(chatml(row[column], default_system), add_special_tokens=False).input_ids
        assert [*pair.prompt_ids, *own] == whole
        assert tokenizer.decode(list(own)) == row[column][-1]["content"] + "<|im_end|>"


@BY_TOKENIZER
def test_a_chosen_response_is_what_fine_tuning_would_train_on(
    tokenizer: PreTrainedTokenizerBase, default_system: str | None
) -> None:
    """Identity with ``tokenise_examples``."""
    for chat_template in (True, False):
        row = {"prompt": "What is 2 + 2?\n", "chosen": "4", "rejected": "five"}
        (pair,) = pairs([row], tokenizer, chat_template=chat_template).pairs
        rows = datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]}])
        kept = tokenise_examples(rows, tokenizer, max_tokens=1000, chat_template=chat_template)
        (example,) = kept.examples
        assert example.token_ids == pair.prompt_ids + pair.chosen_ids
        assert example.prompt_length == len(pair.prompt_ids)


# ---- shapes of rows --------------------------------------------------------------------------------------------------

EXPECTED = ("<user> hello <assistant>", "world </s>", "a b </s>")
LISTS = {"chosen": [said("assistant", "world")], "rejected": [said("assistant", "a b")]}


@for_each(
    "row",
    [
        STRINGS,
        {"prompt": ask("hello"), "chosen": "world", "rejected": "a b"},
        {"prompt": "hello", **LISTS},
        {"prompt": ask("hello"), **LISTS},
        sides(ask("hello"), "world", "a b"),
        {"prompt": "hello", **sides(ask("hello"), "world", "a b")},
        {"prompt": ask("hello"), **sides(ask("hello"), "world", "a b")},
    ],
)
def test_each_shape_gives_the_same_pair(row: dict[str, Any]) -> None:
    """Strings, lists and whole conversations, with another column that is left alone."""
    (pair,) = pairs([{**row, "id": 7}]).pairs
    assert texts(pair) == EXPECTED and (pair.index, pair.margin) == (0, 0.0)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pairs_from_a_file(tmp_path: Path, suffix: str) -> None:
    path, rows = tmp_path / f"x{suffix}", [{**sides(ask("hello"), "world", "a b"), "margin": 2}] * 2
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    found = pairs(load_rows(str(path), "train"))
    assert [(texts(pair), pair.index, pair.margin) for pair in found.pairs] == [(EXPECTED, 0, 2.0), (EXPECTED, 1, 2.0)]
    assert found.source == "from columns chosen, rejected, margin"


def test_plain_strings_get_eos_once() -> None:
    rows = [{"prompt": "hello", "chosen": " world", "rejected": " a b </s>"}]
    (pair,) = pairs(rows, chat_template=False).pairs
    assert texts(pair) == ("hello", "world </s>", "a b </s>")


def test_bos_is_there_once() -> None:
    tokenizer = word_tokenizer("{{ bos_token }} " + TURNS, bos="<s>")
    for row, chat_template in ((STRINGS, True), ({"prompt": "a", "chosen": " b", "rejected": " c"}, False)):
        (pair,) = pairs([row], tokenizer, chat_template=chat_template).pairs
        ids = [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_a_system_prompt_goes_before_what_has_none() -> None:
    own = sides([said("system", "a b"), *ask("hello")], "world", "a b")
    for row in (
        STRINGS,
        sides(ask("hello"), "world", "a b"),
        {**sides(ask("hello"), "world", "a b"), "prompt": "hello"},
    ):
        (pair,) = pairs([row], system_prompt="be brief").pairs
        assert texts(pair)[0] == "<system> be brief <user> hello <assistant>"
    (pair,) = pairs([own], system_prompt="be brief").pairs
    assert texts(pair)[0] == "<system> a b <user> hello <assistant>"


def test_a_prompt_beside_whole_conversations_has_to_be_theirs() -> None:
    long = [said("system", "be brief"), *ask("a", "b", "hello")]
    (pair,) = pairs([{"prompt": " hello\n", **sides(long, "world", "c")}]).pairs
    assert texts(pair)[0] == "<system> be brief <user> a <assistant> b </s> <user> hello <assistant>"
    for prompt in ("a", ask("hello")):
        assert "is not what chosen and rejected begin with, 'hello'; repair it, or remove the column prompt" in fault(
            [{"prompt": prompt, **sides(long, "world", "c")}]
        )


def test_a_margin() -> None:
    rows = [{**STRINGS, "margin": margin} for margin in (0.5, 3, -1)]
    assert [pair.margin for pair in pairs(rows).pairs] == [0.5, 3.0, -1.0]
    for margin in (None, math.nan, math.inf, True, "2"):
        text = fault([{**STRINGS, "margin": margin}])
        assert text == f"row 0: margin {margin!r} is not a finite number; repair it or remove the column"


# ---- what is dropped -------------------------------------------------------------------------------------------------


def test_each_reason_is_counted() -> None:
    rows = [
        STRINGS,
        {**STRINGS, "chosen": " \n"},
        {**STRINGS, "rejected": ""},
        {**STRINGS, "rejected": "world"},
        {**STRINGS, "chosen": "a b c"},
        {**STRINGS, "rejected": "a b c"},
        {**STRINGS, "rejected": " world\n"},  # other strings, the same tokens
        {**STRINGS, "prompt": "b", "chosen": "c"},
    ]
    found = pairs(rows, max_tokens=6)
    assert [pair.index for pair in found.pairs] == [0, 7]
    assert found.dropped == {"empty response": 2, "chosen equals rejected": 2, "too long": 2} and found.total == 8
    assert found.summary() == (
        "2 of 8 pairs, 3 to 3 tokens of prompt, 2 to 2 of chosen and 3 to 3 of rejected response; dropped 2 empty "
        "response, 2 chosen equals rejected, 2 too long; from columns prompt, chosen, rejected"
    )


def test_equal_and_empty_whole_conversations() -> None:
    rows = [sides(ask("a"), "b", "b"), sides(ask("a"), "", "b"), sides(ask("a"), "b", "c")]
    assert pairs(rows).dropped == {"chosen equals rejected": 1, "empty response": 1}


def test_an_empty_plain_response() -> None:
    rows = [{"prompt": "a", "chosen": " b", "rejected": rejected} for rejected in (" ", " c")]
    assert pairs(rows, chat_template=False).dropped == {"empty response": 1}


def test_all_dropped() -> None:
    assert fault([STRINGS, {**STRINGS, "chosen": "a b c"}, {**STRINGS, "rejected": ""}], max_tokens=4) == (
        "none of the 3 rows is left: dropped 2 too long, 1 empty response; set max_tokens=4 to 6 or more"
    )


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_a_missing_column(missing: str) -> None:
    columns = [name for name in STRINGS if name != missing]
    assert fault([{name: STRINGS[name] for name in columns}]) == (
        f"the columns {', '.join(columns)} are not of a known shape; rename them to one of: prompt, chosen, rejected; "
        "chosen, rejected (whole conversations as lists of messages, or Human/Assistant transcripts); conversations, "
        "chosen, rejected (ShareGPT); instruction, chosen, rejected (Alpaca)"
    )


def test_no_rows() -> None:
    assert fault(datasets.Dataset.from_dict({"chosen": [], "rejected": []})).startswith("the dataset holds no rows; ")


def test_strings_without_a_prompt() -> None:
    assert fault([{"chosen": "a", "rejected": "b"}]) == (
        "row 0: chosen 'a' is a string and there is no column prompt, so that nothing says where the response begins; "
        "add prompt, or give whole conversations as lists of messages"
    )


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_mixed_types_in_a_column(tmp_path: Path, column: str) -> None:
    value = [said("user" if column == "prompt" else "assistant", "c")]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(STRINGS) + "\n" + json.dumps({**STRINGS, column: value}) + "\n")
    text = fault(load_rows(str(path), "train"))
    assert text.startswith(f"row 1: {column} [") and "is a list, but in row 0 it is a string; give the column" in text


@for_each(
    "row, expected",
    [
        ({**STRINGS, "chosen": None}, "chosen None is not a list of messages with role and content as strings"),
        ({**STRINGS, "prompt": 7}, "prompt 7 is not a list of messages with role and content as strings; repair"),
        (sides([said("human", "a")], "b", "c"), "chosen has a message of unknown role 'human'; the roles are system,"),
        ({"prompt": ask("a", "b"), **LISTS}, "prompt ends with the assistant's message 'b'; move it to the response"),
        (sides([], "b", "c"), "the assistant speaks first, to nobody (roles ['assistant'])"),
        ({"chosen": ask("a"), "rejected": ask("a", "b")}, "the last message is of role 'user', not the assistant's"),
        (
            {"chosen": ask("a", "b", "c", "be"), "rejected": ask("a", "c", "c", "be")},
            "chosen (4 messages) and rejected (4) differ from message 1 on; they have to differ in the last message",
        ),
        (
            {"chosen": ask("a", "b", "c", "be"), "rejected": ask("a", "b")},
            "chosen (4 messages) and rejected (2) differ from message 2 on; they have to differ in the last message",
        ),
        (
            {"prompt": "a", "chosen": ask("x", "b", "c", "be")[1:], "rejected": [said("assistant", "b")]},
            "chosen (4 messages) and rejected (2) differ from message 2 on; they have to differ in the last message",
        ),
        (
            {"prompt": "a", "chosen": [said("assistant", "b")], "rejected": ask("a", "c")},
            "rejected begins with a message of role 'user', not the assistant's; move it to prompt",
        ),
    ],
)
def test_rows_that_are_no_pair(row: dict[str, Any], expected: str) -> None:
    text = fault([sides(ask("a"), "b", "c"), row] if "prompt" not in row else [row])
    assert text.startswith(f"row {int('prompt' not in row)}: ") and expected in text


def test_a_token_across_the_boundary() -> None:
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    for column in ("chosen", "rejected"):
        row = {"prompt": "a\n", "chosen": "b", "rejected": "c", column: "\nb"}
        assert "row 0: a token spans the boundary between 'a\\n' and '\\nb'" in fault(
            [row], tokenizer, chat_template=False
        )
        assert "take the whitespace from the beginning of the assistant's text" in fault([row], tokenizer)


def test_a_template_that_writes_no_stop_token() -> None:
    assert "'world', without a stop token ('</s>'): a model trained on it would never stop" in fault(
        [STRINGS], word_tokenizer(TURNS.replace("</s>", ""))
    )


def test_a_prompt_or_a_response_of_no_tokens() -> None:
    row = {"prompt": " ", "chosen": " a", "rejected": " b"}
    assert "row 0: the prompt ' ' tokenises to nothing" in fault([row], chat_template=False)
    row = {"prompt": "a", "chosen": " b", "rejected": " </s>"}
    assert "row 0: the response ' </s>' tokenises to no text" in fault([row], chat_template=False)
