"""What lies beside an adapter is the tokenizer as the run began with it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from rlhf_toolkit.data.template_files import use_template
from rlhf_toolkit.runs.tokenizer import travelling
from rlhf_toolkit.settings.configs import ModelConfig
from tests.support.chat_tokenizers import CHATML, byte_tokenizer


def test_what_is_done_with_a_tokenizer_while_a_checkpoint_is_written_is_not_in_it(tmp_path: Path) -> None:
    """A call with padding and truncation stays in the tokenizer until the next; a thread that saves it meanwhile would
    write down that every text is cut."""
    tokenizer, template = byte_tokenizer(None), tmp_path / "own.jinja"
    template.write_text(CHATML)
    use_template(tokenizer, str(template))
    tokenizer.pad_token = "<|im_start|>"
    write = travelling(ModelConfig(name="m"), tokenizer, (3, 4))
    assert write is not None
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(tmp_path / "live")
    write(tmp_path)
    live, beside = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "live", tmp_path))
    assert live["truncation"] and live["padding"], "or this test could not fail"
    assert not beside["truncation"] and not beside["padding"]
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHATML
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [3, 4]}


def test_templates_by_name_lie_beside_an_adapter_as_well(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools: " + CHATML}  # type: ignore[assignment]
    write = travelling(ModelConfig(name="m", eos_token="<|im_end|>"), tokenizer, ())
    assert write is not None and travelling(ModelConfig(name="m"), tokenizer, ()) is None
    write(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
