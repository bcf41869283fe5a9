"""Examples for supervised fine-tuning: the mask against conversations written out by hand, each shape, each fault."""

from __future__ import annotations

import json
import random
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.instructions import Example, ExampleSet, tokenise_examples
from rlhf_toolkit.data.prompts import load_rows, tokenise_prompts
from rlhf_toolkit.errors import DataError
from tests.support.chat_tokenizers import TURNS, ask, byte_tokenizer, chatml, chatml_tokenizers, said, word_tokenizer
from tests.support.offenders import for_each

CHATML_TOKENIZERS = chatml_tokenizers()
BY_TOKENIZER = for_each(("tokenizer", "default_system"), CHATML_TOKENIZERS.values(), ids=CHATML_TOKENIZERS.keys())


def examples(rows: list[dict[str, Any]] | datasets.Dataset, tokenizer: Any = None, **changed: Any) -> ExampleSet:
    table = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    return tokenise_examples(table, tokenizer or word_tokenizer(), **{"max_tokens": 1000, **changed})


def fault(rows: list[dict[str, Any]] | datasets.Dataset, tokenizer: Any = None, **changed: Any) -> str:
    """The text of the DataError that ``rows`` raise, which has to be one line."""
    with pytest.raises(DataError) as caught:
        examples(rows, tokenizer, **changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[bool, str]]:
    """The text of each run of equally marked tokens."""
    pairs = zip(example.trained, example.token_ids, strict=True)
    return [
        (trained, str(tokenizer.decode([token for _, token in run])))
        for trained, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def trained_text(example: Example, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    return [text for trained, text in runs(example, tokenizer or word_tokenizer()) if trained]


def text_of(example: Example) -> str:
    return str(word_tokenizer().decode(list(example.token_ids)))


def rows_of(path: Path, lines: list[dict[str, Any]]) -> datasets.Dataset:
    """Through a file: ``Dataset.from_list`` refuses columns of mixed types."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_rows(str(path), "train")


# ---- the trained mask ------------------------------------------------------------------------------------------------


def random_conversation(seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    words = ["hello", "Δt = 3", "two\nlines", "çava?", "🙂 ok", "2 + 2", "def f(x):\n    return x", "the  end"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 4)))

    messages = [said("system", text())] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 4)):
        messages += [said("user", text()), said("assistant", text())]
    return messages


@BY_TOKENIZER
@for_each("seed", range(6))
def test_trained_tokens_spell_the_assistant_s_messages_and_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, default_system: str | None, seed: int
) -> None:
    """And no others; all tokens spell the conversation as the ChatML of a plain loop has it."""
    messages = random_conversation(seed)
    (example,) = examples([{"messages": messages}], tokenizer).examples
    expected = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert trained_text(example, tokenizer) == expected
    whole = chatml(messages, default_system)
    assert tokenizer.decode(list(example.token_ids)) == whole
    assert list(example.token_ids) == tokenizer(whole, add_special_tokens=False).input_ids


@BY_TOKENIZER
def test_every_message_of_the_assistant_is_trained_on_as_if_it_were_the_last(
    tokenizer: PreTrainedTokenizerBase, default_system: str | None
) -> None:
    """Identity: turn i of a long conversation has the tokens of the conversation cut behind it, prompt and all."""
    messages = random_conversation(3)
    (whole,) = examples([{"messages": messages}], tokenizer).examples
    union = [False] * len(whole.token_ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            row = {"prompt": messages[:number], "completion": [message]}
            (part,) = examples([row], tokenizer).examples
            assert whole.token_ids[: len(part.token_ids)] == part.token_ids
            assert trained_text(part, tokenizer) == [message["content"] + "<|im_end|>"]
            union[part.prompt_length : len(part.token_ids)] = [True] * part.response_length
    assert tuple(union) == whole.trained


@BY_TOKENIZER
def test_the_prompt_is_what_generation_gives(tokenizer: PreTrainedTokenizerBase, default_system: str | None) -> None:
    """Identity with ``tokenise_prompts``, which PPO uses."""
    rows = [{"prompt": "What is 2 + 2?", "completion": "4"}]
    for system in (None, "Be brief."):
        (example,) = examples(rows, tokenizer, system_prompt=system).examples
        (prompt,) = tokenise_prompts(
            datasets.Dataset.from_list(rows),
            tokenizer,
            column="prompt",
            chat_template=True,
            system_prompt=system,
            max_prompt_tokens=1000,
        ).prompts
        assert example.token_ids[: example.prompt_length] == prompt.token_ids
        assert trained_text(example, tokenizer) == ["4<|im_end|>"]


def test_several_turns_word_by_word() -> None:
    messages = [said("system", "be brief"), *ask("a", "b c", "hello", "world")]
    (example,) = examples([{"messages": messages}]).examples
    assert runs(example, word_tokenizer()) == [
        (False, "<system> be brief <user> a <assistant>"),
        (True, "b c </s>"),
        (False, "<user> hello <assistant>"),
        (True, "world </s>"),
    ]
    assert (example.prompt_length, example.response_length) == (6, 8)


def test_an_example_checks_its_mask() -> None:
    for trained in ((True, True), (False, False), (False,)):
        with pytest.raises(DataError, match=r"^row 7: trained=.* does not fit 2 tokens"):
            Example(7, (1, 2), trained)
    assert Example(7, (1, 2), (False, True)).prompt_length == 1


# ---- shapes of rows --------------------------------------------------------------------------------------------------

HELLO = "<user> hello <assistant> world </s>"


@for_each("name", ["completion", "response"])
@for_each("prompt", ["hello", ask("hello")])
@for_each("response", ["world", [said("assistant", "world")]])
@for_each("chat_template", [True, False])
def test_prompt_and_response(name: str, prompt: Any, response: Any, chat_template: bool) -> None:
    """Strings or lists of messages, which always go through the template."""
    if isinstance(prompt, str) and isinstance(response, str) and not chat_template:
        return  # the plain case: below
    found = examples([{"prompt": prompt, name: response, "id": 5}], chat_template=chat_template)
    assert text_of(found.examples[0]) == HELLO and trained_text(found.examples[0]) == ["world </s>"]
    assert found.summary().endswith(f"none dropped; prompts from prompt, loss on {name}")


def test_plain_prompt_and_response_get_eos() -> None:
    (example,) = examples([{"prompt": "hello a", "completion": " b c"}], chat_template=False).examples
    assert runs(example, word_tokenizer()) == [(False, "hello a"), (True, "b c </s>")]


def test_a_plain_response_with_its_eos_gets_no_other() -> None:
    (example,) = examples([{"prompt": "hello", "completion": " b </s>"}], chat_template=False).examples
    assert text_of(example) == "hello b </s>"


def test_a_completion_of_several_messages_leaves_the_prompt_s_alone() -> None:
    row = {"prompt": ask("a", "b", "c"), "completion": [said("assistant", "be"), *ask("hello", "world")]}
    (example,) = examples([row]).examples
    assert trained_text(example) == ["be </s>", "world </s>"]
    assert text_of(example).startswith("<user> a <assistant> b </s> <user> c <assistant> be </s> <user> hello")


def test_a_system_prompt_goes_before_what_has_none() -> None:
    own = [said("system", "a b"), *ask("hello")]
    rows: list[dict[str, Any]] = [{"prompt": prompt, "completion": "world"} for prompt in ("hello", ask("hello"))]
    rows += [
        {"messages": ask("hello", "world")},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]},
    ]
    for row in rows:
        (example,) = examples([row], system_prompt="be brief").examples
        assert text_of(example) == "<system> be brief " + HELLO
        assert trained_text(example) == ["world </s>"]
    (example,) = examples([{"prompt": own, "completion": "world"}], system_prompt="be brief").examples
    assert text_of(example) == "<system> a b " + HELLO


VERL = {"data_source": "x", "prompt": ask("hello"), "reward_model": {"style": "rule", "ground_truth": "world"}}


def test_verl_s_ground_truth() -> None:
    found = examples([VERL])
    assert text_of(found.examples[0]) == HELLO
    assert found.source == "prompts from prompt, loss on reward_model.ground_truth"


def test_verl_s_answer_comes_before_its_ground_truth(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list([{**VERL, "extra_info": {"answer": "a b world", "index": 0}}]).to_parquet(path)
    found = examples(load_rows(str(path), "train"))
    assert trained_text(found.examples[0]) == ["a b world </s>"]
    assert found.source == "prompts from prompt, loss on extra_info.answer"


def test_verl_s_rows_without_a_response() -> None:
    rows: list[dict[str, Any]] = [{"prompt": ask("hello"), "reward_model": {"style": "rule", "ground_truth": None}}]
    assert fault(rows) == (
        "row 0: there is a prompt but no response: extra_info.answer and reward_model.ground_truth hold no string; the "
        "columns are prompt, reward_model: add a column completion or response"
    )
    assert fault([VERL, *rows]) == (
        "row 1: reward_model.ground_truth None is no response; every row has to have one there as a string, or in a "
        "column completion or response"
    )


def test_text_is_trained_on_but_for_its_first_token() -> None:
    found = examples([{"text": "hello world a"}])
    assert runs(found.examples[0], word_tokenizer()) == [(False, "hello"), (True, "world a </s>")]
    assert found.summary() == (
        "1 of 1 examples, 4 to 4 tokens, 3 to 3 of them trained on; none dropped; loss on every token of text but the "
        "first"
    )


def test_text_of_one_token_is_told_to_stop() -> None:
    (example,) = examples([{"text": "hello"}]).examples
    assert (text_of(example), example.trained) == ("hello </s>", (False, True))


def test_the_shapes_are_looked_for_in_a_fixed_order() -> None:
    row = {"text": "a", "prompt": "b", "response": "c", "completion": "be", "messages": ask("hello", "world")}
    for column, expected in (("messages", ["world </s>"]), ("completion", ["be </s>"]), ("response", ["c </s>"])):
        assert trained_text(examples([row]).examples[0]) == expected
        del row[column]
    assert examples([row]).source == "loss on every token of text but the first"


# ---- special tokens --------------------------------------------------------------------------------------------------


def adding_both() -> Any:
    """A tokenizer that puts bos before and eos behind all text, as T5's and some of Llama's do."""
    tokenizer = word_tokenizer("{{ bos_token }} " + TURNS, bos="<s>")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    return tokenizer


@for_each("tokenizer", [word_tokenizer("{{ bos_token }} " + TURNS, bos="<s>"), adding_both()])
@for_each(
    "row, expected",
    [
        ({"messages": ask("hello", "world")}, "<s> " + HELLO),
        ({"prompt": "hello", "completion": " world"}, "<s> hello world </s>"),
        ({"prompt": "<s> hello", "completion": " world"}, "<s> hello world </s>"),
        ({"text": "hello world"}, "<s> hello world </s>"),
        ({"text": "<s> hello world </s>"}, "<s> hello world </s>"),
    ],
)
def test_bos_and_eos_are_there_once(tokenizer: Any, row: dict[str, Any], expected: str) -> None:
    (example,) = examples([row], tokenizer, chat_template=False).examples
    assert tokenizer.decode(list(example.token_ids)) == expected
    assert example.trained[-1] and not example.trained[0]


def test_an_end_of_turn_token_beside_eos_has_to_be_named() -> None:
    """As with Gemma, whose eos is not what ends a turn."""
    tokenizer = word_tokenizer(TURNS.replace("</s>", "be"))
    rows = [{"messages": ask("hello", "world")}]
    assert "without a stop token ('</s>')" in fault(rows, tokenizer)
    (example,) = examples(rows, tokenizer, stop_ids=[tokenizer.convert_tokens_to_ids("be")]).examples
    assert trained_text(example) == ["world be"]


def test_a_tokenizer_without_eos() -> None:
    text = fault([{"text": "hello"}], word_tokenizer(eos=None))
    assert text.endswith("has no eos_token, so that no response could end; set model.eos_token")


# ---- what is dropped -------------------------------------------------------------------------------------------------


def test_long_rows_and_empty_responses_are_dropped_and_counted() -> None:
    rows = [{"prompt": "a", "completion": word} for word in ("b", "", "b c", " \n", "b c hello")]
    found = examples(rows, max_tokens=6)
    assert [(example.index, len(example.token_ids)) for example in found.examples] == [(0, 5), (2, 6)]
    assert (found.total, found.dropped) == (5, {"empty response": 2, "too long": 1})
    assert found.summary() == (
        "2 of 5 examples, 5 to 6 tokens, 2 to 3 of them trained on; dropped 2 empty response, 1 too long; prompts from "
        "prompt, loss on completion"
    )


@for_each(
    "row, chat_template",
    [
        ({"messages": ask("a", "")}, True),
        ({"messages": ask("a", " ", "b", "c")}, True),
        ({"prompt": "a", "response": "\t"}, False),
        ({"text": " "}, True),
        ({**VERL, "extra_info": {"answer": ""}}, True),
    ],
)
def test_an_empty_response_in_each_shape(row: dict[str, Any], chat_template: bool) -> None:
    text = fault([row], chat_template=chat_template)
    assert text == "none of the 1 rows is left: dropped 1 empty response; repair the rows"


def test_all_dropped() -> None:
    rows = [{"prompt": "a", "completion": word} for word in ("b c", "", "b a c")]
    assert fault(rows, max_tokens=5) == (
        "none of the 3 rows is left: dropped 2 too long, 1 empty response; set max_tokens=5 to 6 or more"
    )


# ---- faults of rows --------------------------------------------------------------------------------------------------


def test_unknown_columns() -> None:
    assert fault([{"question": "a", "answer": "b"}]) == (
        "the columns question, answer are not of a known shape; rename them to one of: messages; prompt, completion; "
        "prompt, response; prompt with reward_model.ground_truth or extra_info.answer (verl); conversations "
        "(ShareGPT); instruction, output (Alpaca); text"
    )


def test_no_rows() -> None:
    assert fault(datasets.Dataset.from_dict({"text": []})).startswith("the dataset holds no rows; ")


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_mixed_types_in_a_column(tmp_path: Path, column: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "completion": "b"} for _ in range(3)]
    rows[2][column] = [said("user" if column == "prompt" else "assistant", "c")]
    assert fault(rows_of(tmp_path / "x.jsonl", rows)) == (
        f"row 2: {column} {rows[2][column]} is a list, but in row 0 it is a string; give the column one type, or split "
        "the file in two"
    )


def test_a_missing_value_is_a_fault_not_an_empty_response() -> None:
    assert fault([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]) == (
        "row 1: completion None is NoneType, but in row 0 it is a string; give the column one type, or split the file "
        "in two"
    )
    assert fault([{"text": None}]) == "row 0: text None is not a string; repair that row"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "a"\n')
    with pytest.raises(DataError, match=r"line 2: Expecting ',' delimiter; repair that line"):
        examples(load_rows(str(path), "train"))


@for_each(
    "messages, expected",
    [
        ([said("human", "a"), said("gpt", "b")], "unknown role 'human'; the roles are system, developer, user, assist"),
        (ask("a", "b", "c"), "the last message is of role 'user', not the assistant's: there is no response to train"),
        ([said("system", "a")], "the last message is of role 'system', not the assistant's"),
        ([said("assistant", "a")], "the assistant speaks first, to nobody (roles ['assistant']); put a user's message"),
        ([said("system", "a"), *ask("b", "c")[1:]], "the assistant speaks first, to nobody (roles ['system', 'assist"),
        ([said("assistant", "a"), *ask("b", "c")], "the assistant speaks first, to nobody (roles ['assistant', 'user'"),
        ([{"role": "user", "text": "a"}], "is not a list of messages with role and content as strings; repair that"),
        ([], "messages [] is not a list of messages with role and content as strings; repair that row"),
    ],
)
def test_messages_that_are_no_conversation(messages: list[dict[str, Any]], expected: str) -> None:
    text = fault([{"messages": messages}])
    assert text.startswith("row 0: ") and expected in text


def test_messages_that_are_a_string() -> None:
    assert "messages 'hello' is not a list of messages" in fault([{"messages": "hello"}])


def test_the_row_s_number_is_that_of_the_faulty_row() -> None:
    rows = [{"messages": ask("a", "b")}, {"messages": ask("a", "b")}, {"messages": ask("a")}]
    assert fault(rows).startswith("row 2: the last message is of role 'user'")


def test_prompts_and_responses_that_do_not_meet() -> None:
    assert "row 0: prompt ends with the assistant's message 'b'; move it to the response" in fault(
        [{"prompt": ask("a", "b"), "completion": "c"}]
    )
    assert "row 0: completion begins with a message of role 'user', not the assistant's; move it to prompt" in fault(
        [{"prompt": "a", "completion": ask("a", "b")}]
    )


def test_prompts_and_responses_of_no_tokens() -> None:
    plain: dict[str, Any] = {"chat_template": False}
    assert fault([{"prompt": " ", "completion": "a"}], **plain) == (
        "row 0: the prompt ' ' tokenises to nothing; fill or remove that row"
    )
    assert fault([{"prompt": "a", "completion": " </s>"}], **plain) == (
        "row 0: the response ' </s>' tokenises to no text; fill or remove that row"
    )
    hiding = byte_tokenizer()
    hiding.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    for row in ({"prompt": "a", "completion": "xx"}, {"messages": ask("a", "xx")}, {"text": "xx"}):
        assert "tokenises to no" in fault([row], hiding, chat_template=False)


def test_a_response_that_goes_on_after_its_stop_token() -> None:
    for row in ({"prompt": "a", "completion": " b </s> c"}, {"messages": ask("a", "b </s> c")}):
        text = fault([row], chat_template=False)
        assert text == (
            "row 0: the response 'b </s> c </s>' holds the stop token '</s>' before its end; take it out of the text"
        )


def test_a_token_across_the_boundary() -> None:
    """Bytes "\\n\\n" are one token, as in many vocabularies."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    text = fault([{"prompt": "a", "completion": "\nb"}], tokenizer)
    assert "<|im_start|>assistant\\n' and '\\nb<|im_end|>\\n', so that no response could begin there; take" in text
    assert text.endswith("take the whitespace from the beginning of the assistant's text")
    assert fault([{"prompt": "a\n", "completion": "\nb"}], tokenizer, chat_template=False) == (
        "row 0: a token spans the boundary between 'a\\n' and '\\nb', so that no response could begin there; move "
        "whitespace from the end of the prompt to the response"
    )
    (example,) = examples([{"prompt": "a", "completion": "\n\nb"}], tokenizer, chat_template=False).examples
    assert trained_text(example, tokenizer) == ["\n\nb<|im_end|>"]


# ---- faults of templates ---------------------------------------------------------------------------------------------

ROW = {"messages": ask("a", "b", "hello", "world")}


def test_a_template_that_writes_no_stop_token() -> None:
    text = fault([ROW], word_tokenizer(TURNS.replace("</s>", "")))
    assert text.startswith("row 0: the chat template of the model ends the assistant's turn in 'b', without a stop tok")
    assert "('</s>'): a model trained on it would never stop; use a template that writes one" in text


def test_a_template_that_writes_a_stop_token_only_between_turns() -> None:
    """As one does that joins messages by EOS: the last turn has none."""
    joined = TURNS.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and not loop.last")
    assert "ends the assistant's turn in 'b', without a stop token" in fault([ROW], word_tokenizer(joined))
    assert "in 'world', without a stop token" in fault([{"messages": ask("hello", "world")}], word_tokenizer(joined))


def test_a_stop_token_that_is_only_in_the_text_does_not_count() -> None:
    text = fault([{"messages": ask("a", "b </s> c")}], word_tokenizer(TURNS.replace("</s>", "")))
    assert "ends the assistant's turn in 'b </s> c', without a stop token" in text


def test_a_template_that_goes_on_after_the_stop_token() -> None:
    assert "ends the assistant's turn in 'b </s> be', without a" in fault(
        [ROW], word_tokenizer(TURNS.replace("</s>", "</s> be"))
    )


def test_a_template_that_takes_thoughts_out_of_earlier_turns() -> None:
    """As Qwen3's and DeepSeek's do."""
    thoughts = "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split(' ')[-1] }}"
    tokenizer = word_tokenizer(TURNS.replace("{{ m['content'] }}", thoughts))
    text = fault([{"messages": ask("a", "be brief", "c", "hello world")}], tokenizer)
    assert text == (
        "row 0: the chat template of the model writes the beginning of the conversation as 'e brief </s> ' and the "
        "whole as 'rief </s> <user> c <assistant> hello world </s> ' from character 22 on, so that training would not "
        "see what generation sees; use a template that never changes earlier messages, or make each turn a row of its "
        "own as prompt and completion"
    )
    row = {"prompt": ask("a", "be brief", "c"), "completion": "hello world"}
    assert trained_text(examples([row], tokenizer).examples[0]) == ["hello world </s>"]


def test_a_generation_prompt_that_training_would_not_see() -> None:
    """As DeepSeek-R1's, which opens a thought that the finished turn does not have."""
    tokenizer = word_tokenizer(TURNS.replace("<assistant> {% endif %}", "<assistant> be {% endif %}"))
    assert "so that training would not see what generation sees" in fault([ROW], tokenizer)


def test_a_template_without_generation_prompt() -> None:
    silent = TURNS[: TURNS.index("{% if add_generation_prompt %}")]
    assert fault([ROW], word_tokenizer(silent)) == (
        "row 0: the chat template of the model ignores add_generation_prompt but writes '<assistant>' before the "
        "assistant's text, so that this would be trained too; use a template with a generation prompt"
    )
    bare = "{% for m in messages %}{% if m['role'] == 'user' %}<user> {% endif %}{{ m['content'] }} {% if m['role'] == "
    bare += "'assistant' %}</s> {% endif %}{% endfor %}"
    assert trained_text(examples([ROW], word_tokenizer(bare)).examples[0]) == ["b </s>", "world </s>"]


@pytest.mark.parametrize("change", ["m['content'] | upper", "m['content'].split(' ')[-1]", "'a'"])
def test_a_template_that_changes_the_assistant_s_text(change: str) -> None:
    tokenizer = byte_tokenizer(byte_tokenizer().chat_template.replace("m['content']", change))
    text = fault([{"messages": ask("a", "be brief")}], tokenizer)
    assert "changes or hides the assistant's text 'be brief': it writes '" in text


def test_a_template_that_trims_is_none_the_worse_for_it() -> None:
    tokenizer = byte_tokenizer(byte_tokenizer().chat_template.replace("m['content']", "m['content'] | trim"))
    (example,) = examples([{"messages": ask("a", " b\n")}], tokenizer).examples
    assert trained_text(example, tokenizer) == ["b<|im_end|>"]


def test_no_template() -> None:
    assert "has no chat template; set data.chat_template: false" in fault([ROW], word_tokenizer(None))
