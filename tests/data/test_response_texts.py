"""What rewards read of a response's tokens, against the texts that the tokens were made of."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.response_texts import ends_and_padding, response_texts, unread_tokens
from rlhf_toolkit.rewards.verifiable import think_answer_format
from tests.support.builders import tiny_tokenizer
from tests.support.chat_tokenizers import byte_tokenizer
from tests.support.offenders import for_each

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "[THINK]", "<|call|>")
THOUGHT = "<think>a b</think>\n<answer> é 4</answer>"


def bytes_with_tags() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    return tokenizer


@for_each(
    "text", [THOUGHT, "[THINK]a<|call|>", "<|im_start|>user\nb<|im_start|>", " a ", "<|call|><|call|>", "", "a < b"]
)
def test_kept_special_tokens_are_the_text(text: str) -> None:
    tokenizer = bytes_with_tags()
    ids, end = tokenizer(text).input_ids, tokenizer.eos_token_id
    left_out = ends_and_padding(tokenizer, (end,))
    assert response_texts([[*ids, end], ids, [end], []], tokenizer, left_out) == [text, text, "", ""]
    plain = text
    for tag in (*TAGS, "<|im_start|>"):
        plain = plain.replace(tag, "")
    assert response_texts([[*ids, end], ids], tokenizer) == [plain, plain]


def test_every_end_and_the_tokenizers_own_padding_are_left_out() -> None:
    """But no word that a batch happens to be padded with, which only tokenizers without a pad token need."""
    tokenizer = tiny_tokenizer(words=("a", "b", "<call>"), pad="<pad>", additional_special_tokens=["<call>"])
    of = tokenizer.get_vocab()
    row = [of[token] for token in ("a", "</s>", "<call>", "<pad>", "b", "<call>", "</s>")]
    assert response_texts([row], tokenizer, ends_and_padding(tokenizer, (of["</s>"],))) == ["a <call> b <call>"]
    assert response_texts([row], tokenizer, ends_and_padding(tokenizer, (of["</s>"], of["<call>"]))) == ["a b"]
    assert ends_and_padding(tiny_tokenizer(), (7, 9)) == {7, 9}


def test_tags_that_nobody_reads_are_found() -> None:
    tokenizer = bytes_with_tags()
    rows = [tokenizer(text).input_ids for text in (THOUGHT, "<think>a<|im_end|>", "plain <b>", "<think><think>")]
    expected = {"<think>": 3, "</think>": 1, "<answer>": 1, "</answer>": 1}
    assert unread_tokens(rows, tokenizer, ()) == expected
    assert next(iter(unread_tokens(rows, tokenizer, ()))) == "<think>"
    assert "<think>" not in unread_tokens(rows, tokenizer, tokenizer("<think>").input_ids)
    assert unread_tokens([], tokenizer, ()) == {}


def test_a_format_of_special_tokens_is_seen_where_they_are_kept() -> None:
    tokenizer = bytes_with_tags()
    end = tokenizer.eos_token_id
    rows = [[*tokenizer(THOUGHT).input_ids, end]]
    kept, plain = response_texts(rows, tokenizer, ends_and_padding(tokenizer, (end,))), response_texts(rows, tokenizer)
    assert think_answer_format(["p"], kept) == [1] and think_answer_format(["p"], plain) == [0]
    continued = [kept[0].removeprefix("<think>")]
    assert think_answer_format(["<|im_start|>assistant\n<think>"], continued) == [1]
