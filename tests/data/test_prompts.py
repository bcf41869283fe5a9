"""Rows from files, prompts from rows, and the prompts of each rollout and rank."""

from __future__ import annotations

import json
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from rlhf_toolkit.data.prompts import PromptSchedule, PromptSet, load_rows, tokenise_prompts
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.types import Prompt
from tests.support.builders import tiny_tokenizer
from tests.support.offenders import for_each

ROWS: list[dict[str, Any]] = [{"prompt": "hello", "label": 1}, {"prompt": "a b\nc", "label": 2}]


def table(source: str) -> Any:
    """All rows of a source at once, which can be indexed as those of a stream cannot."""
    return load_rows(source, "train")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def message_of(caught: pytest.ExceptionInfo[DataError]) -> str:
    """The text of an error, which has to be one line."""
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- load_rows -------------------------------------------------------------------------------------------------------


def write_rows(path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(ROWS, indent=1))
        case ".jsonl" | ".JSONL":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case ".csv":
            table.to_csv(path)
        case ".parquet":
            table.to_parquet(path)


@for_each("name", ["x.json", "x.jsonl", "x.csv", "x.parquet", "X.JSONL", "od[d] *.jsonl"])
def test_each_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name)
    assert list(load_rows(str(tmp_path / name), "train")) == ROWS


def test_nobody_is_told_of_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", lambda: told.append("a server"))
    write_rows(tmp_path / "x.jsonl")
    assert list(load_rows(str(tmp_path / "x.jsonl"), "train")) == ROWS and told == []


CSV = """prompt,zeros,words,whole,parts,yes,gaps,long
"a, b",0012,NA,1,1.50,True,,123456789012345678901
c,13,null,-2,2,False,3,1
"""


@for_each("streaming", [False, True])
def test_csv_holds_numbers_only_where_nothing_of_the_text_is_lost(tmp_path: Path, streaming: bool) -> None:
    rows = list(load_rows(write(tmp_path / "x.csv", CSV), "train", streaming=streaming))
    assert [list(row.values()) for row in rows] == [
        ["a, b", "0012", "NA", 1, 1.5, True, None, "123456789012345678901"],
        ["c", "13", "null", -2, 2.0, False, 3.0, "1"],
    ]
    assert [type(value) for value in rows[0].values()] == [str, str, str, int, float, bool, type(None), str]


def test_csv_with_names_that_pandas_would_make_up(tmp_path: Path) -> None:
    (row,) = load_rows(write(tmp_path / "x.csv", ",prompt\n0,NA\n"), "train")
    assert row == {"Unnamed: 0": 0, "prompt": "NA"}


def test_json_lines_under_the_other_suffix(tmp_path: Path) -> None:
    source = write(tmp_path / "x.json", '{"prompt": "a"}\n{"prompt": "b"}\n')
    assert table(source)["prompt"][:] == ["a", "b"]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "x.jsonl")
    monkeypatch.chdir(tmp_path)
    assert list(load_rows("x.jsonl", "train")) == ROWS


def test_a_file_is_any_split_and_can_be_sliced(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl")
    assert list(load_rows(str(tmp_path / "x.jsonl"), "test")) == ROWS
    assert list(load_rows(str(tmp_path / "x.jsonl"), "train[1:]")) == ROWS[1:]


def test_an_edit_counts_even_with_the_old_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for word in ("hello", "world"):
        write(path, json.dumps({"prompt": word}))
        os.utime(path, (1e9, 1e9))
        assert table(str(path))["prompt"][:] == [word]


def test_no_cache_is_left_and_rows_outlive_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    write_rows(tmp_path / "x.jsonl")
    rows = table(str(tmp_path / "x.jsonl"))
    assert not list(scratch.iterdir())
    assert rows.cache_files == []
    assert not home.exists()
    assert list(rows) == ROWS


def test_missing_file() -> None:
    with pytest.raises(DataError) as caught:
        load_rows("no/such.jsonl", "train")
    assert message_of(caught) == (
        f"there is no file no/such.jsonl (looked in {Path.cwd()}); check data.train or data.evaluation"
    )


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path / "x.txt", "hello"), "train")
    assert message_of(caught) == (
        f"cannot read {tmp_path}/x.txt: its suffix '.txt' is not one of .json, .jsonl, .csv, .parquet; "
        "convert or rename it"
    )


@for_each(
    "name, text, fault",
    [
        ("x.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n', "line 3: Expecting ',' delimiter"),
        ("x.jsonl", '{"prompt": "a\u2028b"}\n{"prompt" "b"}\n', "line 2: Expecting ':' delimiter"),
        ("x.jsonl", '{"prompt": "a"}\n"b"\n', 'line 2: \'b\' is not an object such as {"prompt": "..."}'),
        ("x.json", '[{"prompt": "a"},\n {"prompt" "b"}]', "line 2: Expecting ':' delimiter"),
        ("x.json", '{"prompt": "a"}\n{"prompt": }\n', "line 2: Expecting value"),
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, name: str, text: str, fault: str) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path / name, text), "train")
    assert message_of(caught) == f"cannot read {tmp_path / name} (split train): {fault}; repair that line"


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.jsonl", '{"prompt": "a"}\n{"prompt": "é"}'), ("x.json", '[\n{"prompt": "é"}]'), ("x.csv", "prompt\né\n")],
)
def test_other_encodings_name_the_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(DataError) as caught:
        load_rows(str(tmp_path / name), "train")
    assert message_of(caught) == f"cannot read {tmp_path / name}: line 2 is not UTF-8; save the file as UTF-8"
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert table(str(tmp_path / name))[-1]["prompt"] == "é"


def test_broken_csv_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path / "x.csv", "prompt,label\na,1\nb,2,3\n"), "train")
    assert re.search(r"x\.csv .*Expected 2 fields in line 3, saw 3; repair the file", message_of(caught))


def test_broken_parquet_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path / "x.parquet", "not parquet"), "train")
    assert re.search(r"cannot read .*x\.parquet \(split train\): .*; repair the file or", message_of(caught))


@for_each(
    "name, text",
    [
        ("x.jsonl", ""),
        ("x.jsonl", "\n\n"),
        ("x.json", "[]"),
        ("x.json", ""),
        ("x.csv", "prompt,label\n"),
        ("x.csv", ""),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path / name, text), "train")
    assert str(tmp_path / name) in message_of(caught)
    assert message_of(caught).endswith("holds no rows; give it at least one prompt, or name another split")


def test_empty_parquet_and_empty_slice(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(
        DataError, match=r"x\.parquet \(split train\):? (it )?holds no rows; give it at least one prompt"
    ):
        load_rows(str(tmp_path / "x.parquet"), "train")
    write_rows(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl \(split train\[2:\]\): it holds no rows; .* name another split"):
        load_rows(str(tmp_path / "x.jsonl"), "train[2:]")


def test_a_split_that_no_file_can_be(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"\(split no split\).*name another split") as caught:
        load_rows(str(tmp_path / "x.jsonl"), "no split")
    message_of(caught)


@pytest.mark.parametrize(
    ("source", "expected"), [("openai/gsm8k:main", ("openai/gsm8k", "main")), ("org/plain", ("org/plain", None))]
)
def test_a_hub_name_with_and_without_configuration(
    source: str, expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def hub(*names: str | None, split: str) -> datasets.Dataset:
        calls.append((names, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert list(load_rows(source, "test")) == ROWS
    assert calls == [(expected, "test")]


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ConnectionError("Couldn't reach\nthe hub")

    def offline(*names: str | None, split: str) -> datasets.Dataset:
        raise original

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as caught:
        load_rows("org/name:main", "test")
    assert message_of(caught) == (
        "cannot load dataset 'org/name' (configuration main, split 'test'): ConnectionError: Couldn't reach the hub; "
        "check these names and the network, or use a local file (.json, .jsonl, .csv, .parquet)"
    )
    assert caught.value.__cause__ is original


# ---- tokenise_prompts ------------------------------------------------------------------------------------------------


def tokenised(values: list[Any], /, *, tokenizer: Any = None, **changed: Any) -> PromptSet:
    rows = datasets.Dataset.from_list([{"prompt": value, "label": i, "x": "y"} for i, value in enumerate(values)])
    return tokenised_rows(rows, tokenizer=tokenizer, **changed)


def tokenised_rows(rows: datasets.Dataset, *, tokenizer: Any = None, **changed: Any) -> PromptSet:
    options = {"column": "prompt", "chat_template": True, "system_prompt": None, "max_prompt_tokens": 100, **changed}
    return tokenise_prompts(rows, tokenizer or tiny_tokenizer(), **options)


def words_of(prompt: Prompt) -> str:
    return str(tiny_tokenizer().decode(list(prompt.token_ids)))


def test_a_string_becomes_one_user_message() -> None:
    (prompt,) = tokenised(["hello world"]).prompts
    assert prompt.text == "<user> hello world <assistant>"
    assert words_of(prompt) == "<user> hello world <assistant>"


def test_a_system_prompt_comes_first() -> None:
    (prompt,) = tokenised(["hello"], system_prompt="be brief").prompts
    assert prompt.text == "<system> be brief <user> hello <assistant>"
    assert words_of(prompt) == prompt.text


def test_without_chat_template_a_string_stays_as_it_is() -> None:
    (prompt,) = tokenised(["hello  world"], chat_template=False, tokenizer=tiny_tokenizer(chat_template=None)).prompts
    assert prompt.text == "hello  world"
    assert words_of(prompt) == "hello world"


def test_special_tokens_are_added_once() -> None:
    tokenizer = tiny_tokenizer(bos="<s>", chat_template="{{ bos_token }} {{ messages[0].content }}")
    bos, hello = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "hello"))
    (chat,) = tokenised(["hello"], tokenizer=tokenizer).prompts
    (plain,) = tokenised(["hello"], tokenizer=tokenizer, chat_template=False).prompts
    assert (chat.text, plain.text) == ("<s> hello", "hello")
    assert chat.token_ids == plain.token_ids == (bos, hello)


@for_each("text", ["hello", "<s> hello"])
@for_each("appends_eos", [False, True])
def test_plain_text_has_its_bos_once_and_never_an_eos(text: str, appends_eos: bool) -> None:
    tokenizer = tiny_tokenizer(bos="<s>", appends_eos=appends_eos)
    (prompt,) = tokenised([text], tokenizer=tokenizer, chat_template=False).prompts
    assert tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == ["<s>", "hello"]


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize("chat_template", [True, False])
def test_messages_always_use_the_template_and_keep_their_own_system_message(chat_template: bool) -> None:
    found = tokenised([MESSAGES, MESSAGES[1:]], chat_template=chat_template, system_prompt="a b c").prompts
    expected = [f"<system> {system} <user> hello <assistant>" for system in ("be brief", "a b c")]
    assert [prompt.text for prompt in found] == expected


def test_the_assistant_s_message_at_the_end_is_the_beginning_of_the_response() -> None:
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "be a"}]
    found = tokenised([MESSAGES, begun])
    assert [prompt.text for prompt in found.prompts] == [
        "<system> be brief <user> hello <assistant>",
        "<user> hello <assistant>be a",
    ]
    assert found.summary().endswith(
        "; 1 end with a message of the assistant, which the response continues: prompt 1 ends in "
        "'<user> hello <assistant>be a'"
    )


def test_what_no_prompt_of_messages_can_be() -> None:
    with pytest.raises(DataError, match=r"row 0: the prompt has a message of unknown role 'human'; the roles are sys"):
        tokenised([[{"role": "human", "content": "hello"}]])
    with pytest.raises(DataError, match=r"row 0: the prompt has nothing but the assistant's message 'be', to nobody"):
        tokenised([[{"role": "assistant", "content": "be"}]])


def test_token_ids_are_those_of_the_tokenizer_s_own_chat_template() -> None:
    tokenizer = tiny_tokenizer(bos="<s>")
    (prompt,) = tokenised([MESSAGES], tokenizer=tokenizer).prompts
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(prompt.token_ids) == ids


def test_keys_that_only_other_messages_have_are_left_out() -> None:
    template = "{% for m in messages %}{{ 'b' if m.name is defined else 'a' }} {% endfor %}"
    messages = [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "a", "name": "bob"}]
    (prompt,) = tokenised([messages], tokenizer=tiny_tokenizer(chat_template=template)).prompts
    assert prompt.text == "a b "


def test_strings_and_messages_in_one_file(tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    rows = load_rows(write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines))), "train")
    assert [prompt.text for prompt in tokenised_rows(rows).prompts] == ["<user> a <assistant>", "<user> b <assistant>"]


def test_other_columns_and_the_row_number_stay_with_a_prompt() -> None:
    prompts = tokenised(["a", "b"]).prompts
    assert [prompt.index for prompt in prompts] == [0, 1]
    assert [prompt.columns for prompt in prompts] == [{"label": 0, "x": "y"}, {"label": 1, "x": "y"}]


def test_long_prompts_are_dropped_and_counted() -> None:
    kept = tokenised(["a b c", "a", "a b", "a b c a"], max_prompt_tokens=4)
    assert [(prompt.index, len(prompt.token_ids)) for prompt in kept.prompts] == [(1, 3), (2, 4)]
    assert [prompt.columns["label"] for prompt in kept.prompts] == [1, 2]
    assert (kept.dropped_too_long, kept.total) == (2, 4)
    assert kept.summary() == "2 of 4 prompts, 3 to 4 tokens; 2 dropped as too long"


def test_all_too_long() -> None:
    with pytest.raises(DataError) as caught:
        tokenised(["a b c", "a b"], max_prompt_tokens=3)
    assert message_of(caught) == (
        "all 2 prompts are longer than data.max_prompt_tokens=3; the shortest has 4 tokens, so set it to 4 or more"
    )


def test_missing_column() -> None:
    with pytest.raises(DataError) as caught:
        tokenised(["a"], column="question")
    assert message_of(caught) == (
        "no column 'question' for data.prompt_column; the columns are prompt, label, x; set data.prompt_column: prompt"
    )


@pytest.mark.parametrize("name", ["prompts", "responses"])
def test_a_column_that_collides_with_the_reward_s_arguments(name: str) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", name: "b"}])
    with pytest.raises(DataError) as caught:
        tokenised_rows(rows)
    assert message_of(caught) == (
        f"column '{name}' collides with the argument {name} of the reward; rename or remove that column"
    )


def test_the_prompt_column_itself_may_be_called_prompts() -> None:
    (prompt,) = tokenised_rows(datasets.Dataset.from_list([{"prompts": "a"}]), column="prompts").prompts
    assert prompt.columns == {}


def test_no_rows() -> None:
    with pytest.raises(DataError) as caught:
        tokenised_rows(datasets.Dataset.from_dict({"prompt": []}))
    assert message_of(caught) == "the dataset holds no rows; give it at least one prompt, or name another split"


def test_a_prompt_of_no_tokens() -> None:
    with pytest.raises(DataError) as caught:
        tokenised(["a", " \n"], chat_template=False)
    assert message_of(caught) == "row 1: the prompt ' \\n' tokenises to nothing; fill or remove that row"


@for_each(
    "values, shown",
    [
        ([7], "7"),
        ([[]], "[]"),
        ([["a"]], "['a']"),
        ([[{"role": "user", "text": "a"}]], "[{'role': 'user', 'text': 'a'}]"),
        ([[{"role": "user", "content": None}]], "[{'role': 'user', 'content': None}]"),
        ([{"role": "user", "content": "a"}], "{'role': 'user', 'content': 'a'}"),
    ],
)
@for_each("chat_template", [True, False])
def test_neither_string_nor_messages(values: list[Any], shown: str, chat_template: bool) -> None:
    with pytest.raises(DataError) as caught:
        tokenised(values, chat_template=chat_template)
    assert message_of(caught) == (
        f"row 0: the prompt {shown} is neither a string nor a list of messages with role and content as strings; "
        "repair that row or name another data.prompt_column"
    )


def test_a_missing_prompt_names_its_row() -> None:
    with pytest.raises(DataError, match=r"^row 1: the prompt None is neither"):
        tokenised(["a", None])


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(DataError) as caught:
        tokenised([list(range(10000))])
    assert len(message_of(caught)) < 400


@pytest.mark.parametrize(("value", "chat_template"), [("a", True), (MESSAGES, False)])
def test_a_tokenizer_without_chat_template(value: Any, chat_template: bool) -> None:
    with pytest.raises(DataError, match=r"has no chat template; set data\.chat_template: false and give .* strings"):
        tokenised([value], tokenizer=tiny_tokenizer(chat_template=None), chat_template=chat_template)


def test_a_template_that_rejects_a_message() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}a"
    with pytest.raises(DataError) as caught:
        tokenised(["a"], tokenizer=tiny_tokenizer(chat_template=template, name_or_path="org/m"), system_prompt="b")
    assert message_of(caught) == (
        "row 0: the chat template of org/m rejects messages of roles ['system', 'user']: TemplateError: System role "
        "not supported; change them or drop data.system_prompt"
    )


# ---- PromptSchedule --------------------------------------------------------------------------------------------------


def stream(size: int, per_rollout: int, seed: int, length: int) -> list[int]:
    schedule = PromptSchedule(size, per_rollout, seed)
    blocks = [schedule.indices(rollout) for rollout in range(-(-length // per_rollout))]
    assert all(len(block) == per_rollout for block in blocks)
    return list(chain.from_iterable(blocks))[:length]


@for_each("per_rollout", [1, 3, 4, 6, 7, 12])
def test_every_epoch_has_each_prompt_once(per_rollout: int) -> None:
    flow = stream(12, per_rollout, seed=0, length=60)
    epochs = [flow[i : i + 12] for i in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("per_rollout", [2, 5, 7, 11])
def test_the_stream_does_not_depend_on_how_it_is_cut(per_rollout: int) -> None:
    assert stream(11, per_rollout, seed=3, length=70) == stream(11, 1, seed=3, length=70)


def test_seeds_differ() -> None:
    flows = {tuple(stream(20, 4, seed, length=40)) for seed in range(20)}
    assert len(flows) == 20


def test_a_resumed_run_asks_for_its_next_rollout() -> None:
    uninterrupted = PromptSchedule(10, 4, seed=1)
    expected = [uninterrupted.indices(rollout) for rollout in range(8)]
    assert PromptSchedule(10, 4, seed=1).indices(7) == expected[7]
    assert uninterrupted.indices(2) == expected[2]


GOLDEN_STREAM = [2, 0, 1, 4, 3, 2, 3, 1, 4, 0]


def test_the_stream_is_the_same_in_every_release() -> None:
    assert stream(5, 2, seed=0, length=10) == GOLDEN_STREAM


def test_more_prompts_for_a_rollout_than_there_are() -> None:
    assert sorted(PromptSchedule(5, 5, seed=0).indices(3)) == list(range(5))
    with pytest.raises(DataError) as caught:
        PromptSchedule(5, 6, seed=0)
    assert message_of(caught) == (
        "rollout.prompts_per_rollout=6 is more than the 5 prompts there are, so that every rollout would repeat some; "
        "set it to 5 or less, or add prompts"
    )


# ---- what a file of strangers may ask for ----------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_column_that_fetches_is_read_as_it_is_stored(nested: bool, streaming: bool, tmp_path: Path) -> None:
    """The images are files that are none: opening one would raise."""
    (tmp_path / "x.png").write_text("no image")
    cell = {"bytes": None, "path": str(tmp_path / "x.png")}
    image: Any = datasets.List(datasets.Image()) if nested else datasets.Image()
    stored = [[cell]] * 2 if nested else [cell] * 2
    features = datasets.Features({"prompt": datasets.Value("string"), "image": image})
    plain = datasets.Dataset.from_dict({"prompt": ["a", "b"], "image": stored})
    table = plain.data.table.select(["prompt", "image"]).cast(features.arrow_schema)
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"), "train", streaming=streaming)
    assert [row["image"] for row in rows] == stored
    with pytest.raises(Exception, match="cannot identify image"):  # what datasets does by itself
        list(datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True))
