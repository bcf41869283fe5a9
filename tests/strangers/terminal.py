"""What reaches a terminal: whatever a stranger's text stands in, every character of it prints."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers.utils import logging

from rlhf_toolkit import errors
from rlhf_toolkit.data.chat import messages_of
from rlhf_toolkit.data.instructions import tokenise_examples
from rlhf_toolkit.data.preview import preview
from rlhf_toolkit.data.prompts import load_rows, tokenise_prompts
from rlhf_toolkit.export.chat import _Stream, load_chat
from rlhf_toolkit.reporting.report import before_and_after, evaluation_lines, print_report
from rlhf_toolkit.texts import say
from tests.strangers import folders, frame
from tests.strangers.run_folders import line, sound
from tests.support.builders import tiny_tokenizer
from tests.support.tiny import WORDS

COUNT, LIMIT = 200, 20.0
HEAVY = ("transformers.models.llama.modeling_llama",)
PIECES = (
    *(
        "\x1b[2J",
        "\x1b]0;pwned\x07",
        "\x1b]52;c;cm0gLXJm\x07",
        "\x1b[6n",
        "\x1bP+q544e\x1b\\",
        "\x9b31m",
        "\x9d0;x\x9c",
        "\x1b[?1049h",
    ),
    *(
        "\r",
        "\r\n",
        "\b\b\b",
        "\x00",
        "\x07",
        "\x0b\x0c",
        "\x7f",
        "\x85",
        "\u2028",
        "\u2029",
        "\u202e",
        "\u2066\u2069",
        "\u200b",
    ),
    *(
        "\ufeff",
        "\u061c",
        "\U000e0041",
        "\ud800",
        "\udfff",
        "\x1b(0",
        "\x1b#8",
        "\x1bc",
        "\x1b[201~",
        "\x1b]8;;http://x\x07y\x1b]8;;\x07",
    ),
    *(
        "Traceback (most recent call last):\n  File",
        "\nrollout 99  score 9.99",
        "\x1b[1A\x1b[2K",
        "\x1b_G\x1b\\",
        "\u00ad",
        "\ufff9",
    ),
)


@dataclass(frozen=True)
class Case:
    """``text`` at one place where it is shown."""

    name: str
    door: str
    text: str


def an_error(text: str) -> None:
    raise errors.DataError(
        f"column {text} holds {text!r}, {errors.described(ValueError(text))}, {errors.shortened([text])}"
    )


def reported(text: str) -> None:
    """What ends a script, with the notes that another rank's error carries."""
    error = errors.RewardError(f"reward raised {text}")
    error.__cause__ = ValueError(text)
    try:
        with errors.reported():
            raise error
    except SystemExit:
        pass


def noted(text: str) -> None:
    error = errors.RLHFError(text)
    error.add_note(f"Traceback of rank 1: {text}")
    try:
        with errors.reported():
            raise error
    except SystemExit:
        pass


def full_disk(text: str) -> None:
    try:
        with errors.reported():
            raise OSError(28, errors.DISK_FULL, text)
    except SystemExit:
        pass


def located(text: str) -> None:
    with errors.located(text):
        raise errors.NotFiniteError(text)


def report(text: str) -> None:
    shutil.copytree(sound(), "run")
    sample = {"kind": "eval", "rollout": 0, "prompt": "a" + text, "response": text, "score": 0.5}
    line("samples.jsonl", json.dumps(sample))(Path("run"))
    print("\n".join(before_and_after(Path("run"))))
    summary = json.loads((Path("run") / "summary.json").read_text())
    print_report(Path("run"), {**summary, "losses": [1.0], "evaluations": [{f"eval/{text}": 1.0}]})


def evaluated(text: str) -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rates = [{"of": text, "over": text, "by": text, "decoding": "greedy", "rate": estimate}]
    found = {"prompts": 3, "samples": 1, "estimates": {text: {"greedy": {text: estimate}}}, "win_rates": rates}
    print("\n".join(evaluation_lines(found)))


def chat(text: str) -> None:
    folders.copied("base")
    logging.disable_progress_bar()  # as the command does
    talk = load_chat("base", [], sys.stdout, dtype=None, trust_remote_code=False, max_new_tokens=2)
    talk.contestants[0].label = text
    talk.run([f"/{text}", f"/temperature {text}", "w1"])


def streamed(text: str) -> None:
    stream = _Stream(tiny_tokenizer(), sys.stdout)
    stream.on_finalized_text(text)
    stream.on_finalized_text(text, stream_end=True)


def previewed(text: str) -> None:
    text = text.encode(errors="replace").decode()
    words = [*WORDS, *text.split()]
    tokenizer = tiny_tokenizer(words=words, chat_template=None)
    rows = Dataset.from_list([{"prompt": f"w1 {text}", "response": f"w2 {text}"}])
    found = tokenise_examples(rows, tokenizer, max_tokens=50, system_prompt=None, chat_template=False, stop_ids=(1,))
    print(preview(found, tokenizer, 1))


def a_role(text: str) -> None:
    messages_of([{"role": text, "content": text}], index=0, column=text)


def a_column(text: str) -> None:
    rows = Dataset.from_list([{text.encode(errors="replace").decode(): "x"}])
    tokenise_prompts(
        rows, tiny_tokenizer(), column="prompt", chat_template=False, system_prompt=None, max_prompt_tokens=9
    )


def a_source(text: str) -> None:
    load_rows(text, text)


DOORS: dict[str, Callable[[str], None]] = {
    "say": say,
    "a warning of a reward": say,
    "an error": an_error,
    "a reward that raised": reported,
    "another rank's": noted,
    "a full disk": full_disk,
    "not finite": located,
    "report": report,
    "evaluate": evaluated,
    "chat": chat,
    "chat's stream": streamed,
    "data show": previewed,
    "a role": a_role,
    "a column": a_column,
    "a source": a_source,
}


def cases(seed: int, count: int) -> Iterator[Case]:
    sound()
    chance = random.Random(f"terminal {seed}")
    names = list(DOORS)
    for number in range(count):
        text = "".join(chance.choice([*PIECES, "word ", "ä", "語"]) for _ in range(chance.randrange(1, 6)))
        name = names[number % len(names)]
        yield Case(f"{name}: {text!a:.80}", name, text)


def run(case: Case) -> str:
    out = io.StringIO()
    ending = frame.RIGHTLY
    with redirect_stdout(out), redirect_stderr(out):
        try:
            DOORS[case.door](case.text)
        except errors.RLHFError as error:
            ending = frame.judged(error)
    shown = out.getvalue()
    kept = "\n\t\u00a0\u3000\u200c\u200d"
    if any(not each.isprintable() and each not in kept for each in shown):
        return frame.WRONGLY
    shown.encode("utf-8")
    return ending if ending != frame.RIGHTLY or shown else frame.WRONGLY
