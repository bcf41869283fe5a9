"""The end of an assistant's turn is a stop token, a chat template may be a file, and stop tokens go by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_toolkit.data.endings import check_turn_end
from rlhf_toolkit.data.template_files import MOST_BYTES, TemplateFile, use_template
from rlhf_toolkit.data.templates import TemplateFailed, rendered
from rlhf_toolkit.data.tokenizers import end_with
from rlhf_toolkit.errors import ConfigError, DataError
from tests.support.chat_tokenizers import CHATML, byte_tokenizer

ASKED = [{"role": "user", "content": "Is it so?"}]
BASE_EOS, TURN_END = "<|endoftext|>", "<|im_end|>"


def test_a_base_model_whose_template_ends_turns_otherwise_is_named_with_the_way_out() -> None:
    tokenizer = byte_tokenizer(CHATML, eos=BASE_EOS)
    stops = {tokenizer.eos_token_id}
    with pytest.raises(DataError, match=r"'<\|im_end\|>'.*no stop token.*model.eos_token: '<\|im_end\|>'") as caught:
        check_turn_end(ASKED, tokenizer, index=0, stop_ids=stops)
    assert "\n" not in str(caught.value)
    warning = check_turn_end(ASKED, tokenizer, index=0, stop_ids=stops, chosen=True)
    assert warning is not None and TURN_END in warning, "who has chosen the stop tokens is only told"
    assert check_turn_end(ASKED, tokenizer, index=0, stop_ids=stops, stop_strings=[TURN_END]) is None
    warning = check_turn_end(ASKED, tokenizer, index=0, stop_ids=stops, stop_strings=["</answer>"])
    assert warning is not None and "unless it writes a stop string" in warning, "it may end responses before the turn"

    ids = end_with(tokenizer, [TURN_END], vocab_size=len(tokenizer))
    assert ids == (tokenizer.convert_tokens_to_ids(TURN_END),) == (tokenizer.eos_token_id,)
    assert check_turn_end(ASKED, tokenizer, index=0, stop_ids=ids) is None
    assert tokenizer.decode(tokenizer(f"a{TURN_END}").input_ids, skip_special_tokens=True) == "a"


def test_a_template_that_ends_turns_in_plain_text_is_only_warned_about() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", eos=BASE_EOS)
    warning = check_turn_end(ASKED, tokenizer, index=0, stop_ids={tokenizer.eos_token_id})
    assert warning is not None and "writes no stop token" in warning


def test_a_stop_token_that_the_model_lacks_is_refused() -> None:
    tokenizer = byte_tokenizer(CHATML, eos=BASE_EOS)
    for token, vocab_size in (("<|im_over|>", len(tokenizer)), (TURN_END, 3)):
        with pytest.raises(ConfigError, match=r"model\.eos_token="):
            end_with(tokenizer, [token], vocab_size=vocab_size)


def test_a_template_from_a_file_renders_in_the_sandbox(tmp_path: Path) -> None:
    tokenizer, file = byte_tokenizer(None), tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    use_template(tokenizer, str(file))
    assert isinstance(tokenizer.chat_template, TemplateFile) and tokenizer.chat_template.path == file
    assert rendered(tokenizer, ASKED, add_generation_prompt=False) == "[Is it so?]"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/chat_template.jinja").read_text() == file.read_text()
    file.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    use_template(tokenizer, str(file))
    with pytest.raises(TemplateFailed, match="unsafe"):
        rendered(tokenizer, ASKED, add_generation_prompt=False)


def test_a_file_that_holds_no_template_is_refused_by_its_path(tmp_path: Path) -> None:
    contents = {
        "missing": None,
        "empty": b" ",
        "large": b"x" * (MOST_BYTES + 1),
        "bytes": b"\xff\xfe",
        "odd": b"{% if %}",
    }
    for name, content in contents.items():
        file = tmp_path / f"{name}.jinja"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"data\.chat_template=.*{name}\.jinja") as caught:
            use_template(byte_tokenizer(), str(file))
        assert "\n" not in str(caught.value), name
