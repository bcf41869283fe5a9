"""Chat templates in a process of their own."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from rlhf_toolkit.data import templates
from rlhf_toolkit.data.templates import TemplateFailed, render_as_of, rendered
from tests.support.chat_tokenizers import ask, byte_tokenizer, word_tokenizer
from tests.support.processes import ROOT

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def text_of(template: str) -> str:
    return rendered(word_tokenizer(template), ask("a"), add_generation_prompt=True)


def test_it_says_what_transformers_says() -> None:
    for tokenizer in (word_tokenizer(), byte_tokenizer()):
        for prompt in (True, False):
            messages = ask("hello \U0001f642", "b\n\x1b", "c" * 100_000)
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert rendered(tokenizer, messages, add_generation_prompt=prompt) == expected


def test_a_template_that_writes_the_date_writes_that_of_the_runs_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_moment", None)
    tokenizer = word_tokenizer("{{ strftime_now('%d %b %Y') }}")  # the words of Llama 3's template
    today = {datetime.now().strftime("%d %b %Y")}
    found = rendered(tokenizer, ask("a"), add_generation_prompt=True)
    assert found in today | {datetime.now().strftime("%d %b %Y")}
    render_as_of("2024-02-29T23:59:58")
    assert rendered(tokenizer, ask("a"), add_generation_prompt=True) == "29 Feb 2024"
    assert text_of("{{ strftime_now('%H:%M') if strftime_now is defined }}") == "23:59"
    with pytest.raises(ValueError, match="yesterday"):
        render_as_of("yesterday")


def test_a_template_that_never_ends_is_cut_off_and_the_next_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    begun = time.monotonic()
    tokenizer = word_tokenizer(LOOP)
    with pytest.raises(TemplateFailed, match="no end within"):
        rendered(tokenizer, ask("a"), add_generation_prompt=True)
    assert time.monotonic() - begun < 30
    monkeypatch.setattr(templates, "SECONDS", 10.0)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert rendered(tokenizer, ask("a"), add_generation_prompt=True) == "a"


def test_memory_length_and_what_a_template_raises() -> None:
    with pytest.raises(TemplateFailed, match="memory"):
        text_of("{{ 'a' * 10 ** 10 }}")
    with pytest.raises(TemplateFailed, match="16777217 characters"):
        text_of("{{ 'a' * 16777217 }}")
    with pytest.raises(TemplateFailed, match=r"^TemplateError: no$"):
        text_of("{{ raise_exception('no') }}")
    with pytest.raises(TemplateFailed, match="half a character"):
        text_of("{{ '\\ud800' }}")


def test_a_child_that_was_killed_is_replaced_and_ends_with_its_tokenizer() -> None:
    tokenizer = word_tokenizer()
    rendered(tokenizer, ask("a"), add_generation_prompt=True)
    child = templates._renderers[id(tokenizer)].child
    os.kill(child, signal.SIGKILL)
    assert "a" in rendered(tokenizer, ask("a"), add_generation_prompt=True)
    second = templates._renderers[id(tokenizer)].child
    assert second != child
    del tokenizer
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_a_child_holds_nothing_open_and_ends_with_its_parent() -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        tokenizer = word_tokenizer()
        rendered(tokenizer, ask("a"), add_generation_prompt=True)
        process = templates._renderers[id(tokenizer)].child
        numbers = sorted(int(each) for each in os.listdir(f"/proc/{process}/fd") if int(each) < 1000)
        os.write(writing, f"{process} {numbers}".encode())
        signal.pause()
    child, _, links = os.read(reading, 1000).decode().partition(" ")
    os.close(reading)
    os.close(writing)
    assert links == "[0, 1, 2, 3, 4]"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError("it outlives its parent")


GARBAGE = """
import gc, os
from rlhf_toolkit.data.templates import rendered
from tests.support.chat_tokenizers import ask, word_tokenizer

class Cycle:
    pass

tokenizer = word_tokenizer("{{ messages | length }}")
gc.disable()
for number in (3, 4):  # of the child's own pipes
    os.dup2(os.open(os.devnull, os.O_RDONLY), number)
    cycle = Cycle()
    cycle.itself, cycle.file = cycle, os.fdopen(number, "rb")
del cycle
os.register_at_fork(after_in_child=gc.enable)
for _ in range(3):
    print(rendered(tokenizer, ask("a") * 5000, add_generation_prompt=False))
"""


def test_garbage_of_the_parent_closes_nothing_in_the_child() -> None:
    """Files that nobody holds any more are closed when garbage is collected, by numbers of other files in the child."""
    done = subprocess.run(
        [sys.executable, "-c", GARBAGE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert len(done.stdout.split()) == 3, done.stderr[-2000:]
