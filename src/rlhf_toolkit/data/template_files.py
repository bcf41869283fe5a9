"""A chat template of one's own, read from a file of Jinja."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.templates import TemplateFailed, rendered
from rlhf_toolkit.errors import ConfigError, described, shortened

MOST_BYTES = 2**20
"""Of a file; the longest templates of models have some 20 KB."""


class TemplateFile(str):
    """The text of a chat template, and the ``path`` that it was read from."""

    path: Path


def use_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Have ``tokenizer`` render with the template in the file ``path``, in the sandbox of every template
    (``templates.py``); the tokenizer is saved with it. ConfigError, by the setting data.chat_template, where there is
    no such file, it is no text, or no template."""
    place, setting = Path(path).expanduser(), f"data.chat_template={shortened(path)[1:-1]}"
    if not place.is_file():
        raise ConfigError(f"{setting} is no file (looked in {Path.cwd()}); give the path of a Jinja file, or true")
    try:
        with place.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = TemplateFile(content.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} cannot be read ({described(error)}); save it as UTF-8") from error
    if len(content) > MOST_BYTES or not text.strip():
        words = f"more than {MOST_BYTES} bytes" if text.strip() else "nothing in it"
        raise ConfigError(f"{setting} has {words}; give the file of a chat template")
    text.path = place
    tokenizer.chat_template = text
    try:
        rendered(tokenizer, [{"role": "user", "content": "x"}], add_generation_prompt=True)
    except TemplateFailed as error:  # whatever else it raises may be about these messages; rows will show it
        if str(error).startswith("TemplateSyntaxError"):
            raise ConfigError(f"{setting} is no template ({described(error)}); mend it") from error
