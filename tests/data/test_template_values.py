"""What a row brings beside its messages' texts: tools, calls, weights, and values of the chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_toolkit.data.instructions import ExampleSet, tokenise_examples
from rlhf_toolkit.data.json_files import DEEPEST
from rlhf_toolkit.data.preferences import tokenise_pairs
from rlhf_toolkit.data.prompts import tokenise_prompts
from rlhf_toolkit.data.template_values import OWN
from rlhf_toolkit.errors import DataError
from tests.support.builders import tiny_tokenizer
from tests.support.offenders import for_each

TEMPLATE = (
    "{% if tools %}<tools> {% for t in tools %}{{ t.function.name }} {{ t.function | length }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} "
    "{% for c in m.tool_calls or [] %}call {{ c.function.name }} {{ c.function.arguments.x }} {% endfor %}"
    "{{ '</s> ' if m.role == 'assistant' else '' }}{% endfor %}"
    "{{ '<thinks> ' if enable_thinking is defined and not enable_thinking else '' }}"
    "{{ '<assistant> ' if add_generation_prompt else '' }}"
)
WORDS = ["<user>", "<assistant>", "<tool>", "<tools>", "<thinks>", "call", "f", "g", "hello", "world", *"0123ab"]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": None}},
    {"function": {"name": "g", "b": 1}},
]
CALL = {"function": {"name": "f", "arguments": {"x": 2}}}
ASKED = {"role": "user", "content": "hello"}
CALLS: list[dict[str, Any]] = [
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "a"},
    {"role": "assistant", "content": "world", "tool_calls": None},
]


class Table(list[dict[str, Any]]):
    """Rows, as a dataset gives them."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


def tokenizer() -> Any:
    return tiny_tokenizer(words=WORDS, chat_template=TEMPLATE)


def examples(*rows: dict[str, Any], **options: Any) -> ExampleSet:
    return tokenise_examples(Table(rows), tokenizer(), max_tokens=99, **options)


def texts(found: ExampleSet) -> list[tuple[str, str]]:
    """The whole of each example, and what of it is trained on."""
    decode = tokenizer().decode
    return [
        (decode(e.token_ids), decode([t for t, trained in zip(e.token_ids, e.trained, strict=True) if trained]))
        for e in found.examples
    ]


@for_each("tools", [TOOLS, json.dumps(TOOLS)])
@for_each("arguments", [{"x": 2}, {"x": 2, "y": None}, '{"x": 2}'])
def test_tools_and_calls_reach_the_template(tools: Any, arguments: Any) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": calls}, *CALLS[2:]]
    said = "<tools> f 1 g 2 <user> hello <assistant> call f 2 </s> <tool> a <assistant>"
    found = examples({"messages": messages, "tools": tools})
    assert texts(found) == [(f"{said} world </s>", "call f 2 </s> world </s>")]
    assert "does not read" not in found.summary()
    rows = Table([{"prompt": messages[:3], "tools": tools}])
    (prompt,) = tokenise_prompts(
        rows, tokenizer(), column="prompt", chat_template=True, system_prompt=None, max_prompt_tokens=99
    ).prompts
    assert prompt.text.split() == said.split() and prompt.columns == {"tools": tools}
    pair = {"prompt": messages[:3], "chosen": "world", "rejected": "b", "tools": tools}
    (found_pair,) = tokenise_pairs(Table([pair]), tokenizer(), max_tokens=99).pairs
    assert tokenizer().decode(found_pair.prompt_ids) == said


def test_a_message_of_weight_0_is_read_and_not_trained_on() -> None:
    first, second = ({"role": "assistant", "content": text} for text in "ab")
    turns: list[dict[str, Any]] = [ASKED, {**first, "weight": 0}, ASKED, second]
    whole = "<user> hello <assistant> a </s> <user> hello <assistant> b </s>"
    assert texts(examples({"messages": turns})) == [(whole, "b </s>")]
    swapped = [ASKED, {**first, "weight": 1}, ASKED, {**second, "weight": 0}]
    assert texts(examples({"messages": swapped})) == [("<user> hello <assistant> a </s>", "a </s>")]
    with pytest.raises(
        DataError, match=r"row 0: messages has a message of weight 0\.5; it is 1, or 0 for one that is no"
    ):
        examples({"messages": [ASKED, {"role": "assistant", "content": "a", "weight": 0.5}]})


def test_the_last_turn_alone() -> None:
    ((whole, trained),) = texts(examples({"messages": CALLS}, turns="last"))
    assert whole == "<user> hello <assistant> call f 2 </s> <tool> a <assistant> world </s>"
    assert trained == "world </s>"


def test_values_of_the_template_and_a_rows_own() -> None:
    said = [ASKED, {"role": "assistant", "content": "a"}]
    rows = [{"messages": said, "chat_template_kwargs": given} for given in (None, {"enable_thinking": True})]
    with_words = [{"prompt": said[:1], "chat_template_kwargs": given} for given in (None, '{"enable_thinking": true}')]
    for values, expected in (({"enable_thinking": False}, [True, False]), ({}, [False, False])):
        found = tokenise_prompts(
            Table(with_words),
            tokenizer(),
            column="prompt",
            chat_template=True,
            system_prompt=None,
            max_prompt_tokens=99,
            template_values=values,
        )
        assert ["<thinks>" in prompt.text for prompt in found.prompts] == expected
    assert len(examples(*rows).examples) == 2


def test_what_the_template_does_not_read_is_counted() -> None:
    answer = {"role": "assistant", "content": "a", "reasoning_content": "b", "weight": 1}
    rows = [{"messages": [ASKED, answer], "tools": TOOLS, "chat_template_kwargs": {"documents_of": 1}}] * 2
    plain = tiny_tokenizer(words=WORDS, chat_template=TEMPLATE.replace("tools", "others"))
    found = tokenise_examples(Table(rows), plain, max_tokens=99)
    assert found.summary().endswith(
        "; the chat template does not read documents_of (2 rows), reasoning_content (2 rows), tools (2 rows)"
    )


@for_each(
    "column, value, said",
    [
        ("tools", "hammer", "tools 'hammer' is no JSON (Expecting value: line 1 column 1 (char 0)); repair that row"),
        ("tools", '"f"', "tools 'f' is not a list of tools, each a JSON schema; repair that row, or rename the column"),
        ("tools", ["f"], "tools ['f'] is not a list of tools, each a JSON schema; repair that row, or rename the col"),
        ("tools", "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "is no JSON (brackets nested deeper than 100); repair th"),
        ("tools", '"' + "a" * 2**20 + '"', "is no JSON (it has more than 1048576 characters); repair that row"),
        ("chat_template_kwargs", "1", "chat_template_kwargs 1 is not a mapping of names to values; repair that row"),
        ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs has tokenize, which is no value of a templ"),
    ],
)
def test_what_no_row_can_bring(column: str, value: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        examples({"messages": CALLS, column: value})
    assert str(caught.value).startswith("row 0: ") and said in str(caught.value) and len(str(caught.value)) < 400


def test_no_setting_takes_an_argument_of_the_call() -> None:
    assert {"tools", "add_generation_prompt", "tokenize", "chat_template"} <= OWN
    with pytest.raises(DataError, match=r"data\.chat_template_kwargs has tools, which is no value of a template; take"):
        examples({"messages": CALLS}, template_values={"tools": []})


@for_each("message", [{"role": "assistant", "content": None}, {"role": "assistant", "content": None, "tool_calls": []}])
def test_a_message_without_text_and_without_calls_is_none(message: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"row 0: messages .* is not a list of messages with role and content as strings"
    ):
        examples({"messages": [ASKED, message]})
