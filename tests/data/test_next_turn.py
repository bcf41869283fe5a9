"""What stands between two turns: with the policy's own tokens before it, the conversation as the template has it."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_toolkit.data.chat import prompt_text, render, rendered_ids
from rlhf_toolkit.data.next_turn import is_answer, tokens_between
from rlhf_toolkit.errors import DataError
from tests.support.chat_tokenizers import CHATML, QWEN3, ask, byte_tokenizer, said

USER, TOOL = said("user", "Sure?"), said("tool", "42")
DEAF = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")


def tokenizer_of(template: str) -> Any:
    tokenizer: Any = byte_tokenizer(template)
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, QWEN3])
@pytest.mark.parametrize("answers", [[USER], [TOOL], [TOOL, TOOL], [TOOL, USER]])
@pytest.mark.parametrize("turn", [" It is 12.", "a\n\nb <think>x</think>"])
def test_prompt_turn_and_what_follows_are_the_whole_conversation(template: str, answers: list[Any], turn: str) -> None:
    tokenizer, messages = tokenizer_of(template), ask("What is it?")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    between = tokens_between(messages, answers, tokenizer, index=0, ended_by=end)
    mine = [*rendered_ids(prompt_text(messages, tokenizer, index=0) + turn, tokenizer), end, *between]
    whole = render([*messages, said("assistant", turn), *answers], tokenizer, index=0, add_generation_prompt=True)
    assert mine == list(rendered_ids(whole, tokenizer))
    unended = tokens_between(messages, answers, tokenizer, index=0, ended_by=None)
    assert unended == [end, *between], "a turn that a text has ended is ended by the template"


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    with pytest.raises(DataError, match=r"does not write a message of role tool behind .*\('42'\); answer in another"):
        tokens_between(ask("What?"), [TOOL], tokenizer_of(DEAF), index=3, ended_by=None)
    with pytest.raises(DataError, match=r"row 3: .* does not write the assistant's turn"):
        deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' %}")
        tokens_between(ask("What?"), [USER], tokenizer_of(deaf), index=3, ended_by=None)


def test_what_may_answer() -> None:
    assert is_answer([USER]) and is_answer([TOOL, USER])
    for odd in ([], [said("assistant", "x")], [said("system", "x")], "x", [{"role": "tool"}], [3], [{"content": "x"}]):
        assert not is_answer(odd)
