"""The pad id, the stop ids and the chat template of a tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers

from rlhf_toolkit.data.chat import plain_ids, rendered_ids
from rlhf_toolkit.data.tokenizers import pad_token_id, require_chat_template, stop_token_ids, tokenising
from rlhf_toolkit.errors import DataError
from tests.support.builders import tiny_tokenizer
from tests.support.offenders import for_each

BIG = 1000


# ---- pad -------------------------------------------------------------------------------------------------------------


def test_its_own_pad_token_wins() -> None:
    tokenizer = tiny_tokenizer(pad="<pad>")
    assert tokenizer.pad_token_id == 2
    assert pad_token_id(tokenizer, stop_ids=(1,), vocab_size=BIG) == 2


def test_its_own_pad_token_wins_even_as_eos() -> None:
    tokenizer = tiny_tokenizer(pad="</s>")
    assert pad_token_id(tokenizer, stop_ids=(tokenizer.eos_token_id,), vocab_size=BIG) == tokenizer.eos_token_id == 1


def test_pad_token_id_zero_is_a_pad_token() -> None:
    tokenizer = tiny_tokenizer(unk="<pad>", pad="<pad>")
    assert pad_token_id(tokenizer, stop_ids=(0,), vocab_size=BIG) == tokenizer.pad_token_id == 0


def test_a_pad_token_without_an_embedding_is_passed_over() -> None:
    tokenizer = tiny_tokenizer()
    vocab_size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == vocab_size
    assert pad_token_id(tokenizer, stop_ids=(1,), vocab_size=vocab_size) == tokenizer.unk_token_id == 0
    assert pad_token_id(tokenizer, stop_ids=(1,), vocab_size=vocab_size + 1) == vocab_size


@pytest.mark.parametrize("spare", ["<|reserved_special_token_0|>", "<unused7>", "[unused3]", "<|extra_0|>"])
def test_without_pad_unk_then_spare_then_bos_then_lowest(spare: str) -> None:
    words = ("a", spare, "reserved", "unused")
    tokenizer = tiny_tokenizer(words=words, bos="unused")  # ids: unk 0, bos 1, eos 2, a 3, spare 4, reserved 5
    tokenizer.bos_token = "reserved"
    assert pad_token_id(tokenizer, stop_ids=(2,), vocab_size=BIG) == 0
    assert pad_token_id(tokenizer, stop_ids=(0, 2), vocab_size=BIG) == 4
    assert pad_token_id(tokenizer, stop_ids=(0, 2, 4), vocab_size=BIG) == 5
    assert pad_token_id(tokenizer, stop_ids=(0, 2, 4, 5), vocab_size=BIG) == 1


def test_a_spare_token_without_an_embedding_is_passed_over() -> None:
    tokenizer = tiny_tokenizer(words=("a", "<unused0>"), unk=None)  # ids: eos 0, a 1, spare 2
    assert pad_token_id(tokenizer, stop_ids=(0,), vocab_size=3) == 2
    assert pad_token_id(tokenizer, stop_ids=(0,), vocab_size=2) == 1


def test_the_first_spare_token_is_taken_whatever_order_the_vocabulary_has() -> None:
    tokenizer = tiny_tokenizer(words=[f"<unused{n}>" for n in range(50)], unk=None)
    assert pad_token_id(tokenizer, stop_ids=(0, 1), vocab_size=BIG) == 2


def test_nothing_is_resized() -> None:
    tokenizer = tiny_tokenizer()
    before = (len(tokenizer), tokenizer.pad_token)
    pad_token_id(tokenizer, stop_ids=(1,), vocab_size=BIG)
    assert (len(tokenizer), tokenizer.pad_token) == before


def test_no_id_to_pad_with() -> None:
    with pytest.raises(DataError) as caught:
        pad_token_id(tiny_tokenizer(), stop_ids={1, 0}, vocab_size=2)
    assert str(caught.value) == (
        "no id to pad with: all of the vocab_size=2 ids of the tokenizer of an unnamed model are stop tokens [0, 1]; "
        "give the tokenizer a pad_token below vocab_size"
    )


# ---- stop ------------------------------------------------------------------------------------------------------------


@for_each(
    "configured, expected",
    [(None, (1,)), (1, (1,)), (7, (1, 7)), ([9, 1, 3], (1, 3, 9)), ([], (1,)), (0, (0, 1)), (8, (1, 8))],
)
def test_stop_ids_are_the_union_sorted(configured: int | list[int] | None, expected: tuple[int, ...]) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id == 1
    assert stop_token_ids(tokenizer, configured) == expected


def test_an_eos_of_id_zero_counts() -> None:
    assert stop_token_ids(tiny_tokenizer(unk=None), None) == (0,)


def test_the_generation_config_is_enough() -> None:
    assert stop_token_ids(tiny_tokenizer(eos=None), [5, 4]) == (4, 5)


def test_stop_strings_are_enough() -> None:
    assert stop_token_ids(tiny_tokenizer(eos=None), None, stop_strings=["\n"]) == ()


def test_no_stop_token() -> None:
    with pytest.raises(DataError) as caught:
        stop_token_ids(tiny_tokenizer(eos=None, name_or_path="org/endless"), None)
    assert str(caught.value) == (
        "no stop token: the tokenizer of org/endless and its generation config have eos_token_id=None, so that "
        "responses could never finish; set model.eos_token, or use rollout.stop_strings"
    )


# ---- chat template ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, ""])
def test_a_chat_template_is_asked_for_and_is_enough(template: str | None) -> None:
    assert tiny_tokenizer().chat_template
    require_chat_template(tiny_tokenizer())
    with pytest.raises(DataError) as caught:
        require_chat_template(tiny_tokenizer(chat_template=template, name_or_path="org/base"))
    assert str(caught.value) == (
        "the tokenizer of org/base has no chat template; set data.chat_template: false and give prompts as strings, "
        "or use a model that has one"
    )


# ---- hostile patterns ------------------------------------------------------------------------------------------------


def test_a_pattern_that_is_tried_too_long_is_one_line() -> None:
    """The library gives it up and raises what is no Exception."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("((a+)+)+X"), "isolated")
    for ids in (rendered_ids, plain_ids):
        with pytest.raises(DataError, match=r"cannot tokenise a text .PanicException"):
            ids("a" * 40 + "!", tokenizer)


def test_other_errors_of_tokenising_pass() -> None:
    with pytest.raises(KeyboardInterrupt), tokenising(tiny_tokenizer()):
        raise KeyboardInterrupt
