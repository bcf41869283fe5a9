"""The transcript of a chat against generate() of each contestant alone, in plain PEFT."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.export.chat import COMMANDS, HELP, _Stream, load_chat
from rlhf_toolkit.seeding import derive_seed
from tests.support.builders import CHAT_TEMPLATE
from tests.support.exports import write_adapter, write_base
from tests.support.offenders import for_each
from tests.support.tiny import WORDS, tiny_llama

TOKENS = 6
TEMPLATES = pytest.mark.parametrize("template", [None, CHAT_TEMPLATE], ids=["plain", "template"])


class Folders:
    """A base and two adapters that disagree."""

    def __init__(self, folder: Path, template: str | None, tags: list[str] | None = None, **options: Any) -> None:
        model = tiny_llama(**options)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)  # far from uniform, so that contestants say different things
            model.get_output_embeddings().weight[1] = 0.0  # and do not end at once
        self.base = write_base(folder / "base", model, chat_template=template, additional_special_tokens=tags or [])
        self.adapters = [write_adapter(folder / f"a{seed}", self.base, seed=seed) for seed in (1, 2)]
        self.template = template
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)

    def talk(self, *lines: str, adapters: int = 2, **options: Any) -> str:
        out = io.StringIO()
        names = [str(adapter) for adapter in self.adapters[:adapters]]
        settings = {"dtype": None, "trust_remote_code": False, "max_new_tokens": TOKENS, **options}
        load_chat(str(self.base), names, out, **settings).run(lines)
        return out.getvalue()

    def labels(self, adapters: int = 2) -> list[str]:
        return ["base", *map(str, self.adapters[:adapters])]

    def expected(self, *rounds: str, system: str = "", temperature: float = 0.0, **more: Any) -> list[list[str]]:
        """Round -> contestant -> what generate() of that contestant alone answers; ``more`` goes to it."""
        answers = [self.alone(adapter, rounds, system, temperature, **more) for adapter in (None, *self.adapters)]
        return [list(answer) for answer in zip(*answers, strict=True)]

    def alone(
        self, adapter: Path | None, rounds: tuple[str, ...], system: str, temperature: float, **more: Any
    ) -> list[str]:
        model: Any = AutoModelForCausalLM.from_pretrained(self.base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        messages = [{"role": "system", "content": system}] if system else []
        text = ""
        answers: list[str] = []
        for number, line in enumerate(rounds, start=1):
            messages.append({"role": "user", "content": line})
            prompt = text + line
            if self.template:
                prompt = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
            torch.manual_seed(derive_seed(0, "chat", number))
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, **more} if temperature else more
            whole = model.generate(input_ids=ids, max_new_tokens=TOKENS, **sampling)[0]
            answers.append(str(self.tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)))
            messages.append({"role": "assistant", "content": answers[-1]})
            text = f"{prompt} {answers[-1]}\n"
        return answers

    def transcript(self, answers: list[list[str]]) -> str:
        return "".join(
            f"[{label}] {answer}\n" for round_ in answers for label, answer in zip(self.labels(), round_, strict=True)
        )

    def greeting(self, adapters: int = 2) -> str:
        return f"{', '.join(self.labels(adapters))}. {COMMANDS}\n"


@TEMPLATES
def test_greedy_answers_are_those_of_each_contestant_alone(tmp_path: Path, template: str | None) -> None:
    folders = Folders(tmp_path, template)
    answers = folders.expected("w3 w4", "w9", "w20 w5 w7")
    assert len({tuple(answer) for answer in zip(*answers, strict=True)}) == 3 and all(map(all, answers))
    told = folders.talk("w3 w4", "", " w9 ", "w20 w5 w7", "/quit", "w3")
    assert told == folders.greeting() + folders.transcript(answers)


def test_a_base_alone_and_one_adapter(tmp_path: Path) -> None:
    folders = Folders(tmp_path, None)
    answers = folders.expected("w3 w4")[0]
    assert folders.talk("w3 w4", adapters=0) == folders.greeting(0) + f"[base] {answers[0]}\n"
    one = f"[base] {answers[0]}\n[{folders.adapters[0]}] {answers[1]}\n"
    assert folders.talk("w3 w4", adapters=1) == folders.greeting(1) + one


@TEMPLATES
def test_reset_forgets_the_conversation(tmp_path: Path, template: str | None) -> None:
    folders = Folders(tmp_path, template)
    first, second = folders.transcript(folders.expected("w3 w4")), folders.transcript(folders.expected("w9"))
    told = folders.talk("w3 w4", "/reset", "w9")
    assert told == folders.greeting() + first + "conversations begin again\n" + second
    assert second != folders.transcript(folders.expected("w3 w4", "w9")[1:])  # or this test could not fail


def test_a_system_message_begins_the_conversation(tmp_path: Path) -> None:
    folders = Folders(tmp_path, CHAT_TEMPLATE)
    answers = folders.transcript(folders.expected("w3 w4", "w9", system="w11 w12"))
    told = folders.talk("w8", "/system w11 w12", "w3 w4", "w9")
    assert told.endswith("conversations begin again\n" + answers)
    assert answers != folders.transcript(folders.expected("w3 w4", "w9"))


def test_the_system_message_can_be_seen_and_taken_away(tmp_path: Path) -> None:
    folders = Folders(tmp_path, CHAT_TEMPLATE)
    told = folders.talk("/system", "/system be kind", "/system", "/system none", "/system", "/help")
    again = "conversations begin again\n"
    assert told == (
        f"{folders.greeting()}there is no system message\n{again}system message: be kind\n{again}"
        f"there is no system message\n{HELP}\n"
    )


@TEMPLATES
def test_ctrl_c_stops_an_answer_and_not_the_program(
    tmp_path: Path, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been said stays in the conversation, of the contestant that was stopped alone."""
    folders = Folders(tmp_path, template)
    whole, put, count = folders.expected("w3 w4")[0], _Stream.put, itertools.count()

    def interrupted(stream: Any, value: Any) -> None:
        put(stream, value)
        if next(count) == 2:  # the prompt and two tokens of the base's answer
            raise KeyboardInterrupt

    monkeypatch.setattr(_Stream, "put", interrupted)
    told = folders.talk("w3 w4", "/reset", adapters=1)
    begun = " ".join(whole[0].split()[:2])
    assert told == (
        f"{folders.greeting(1)}[base] {begun}\n(stopped)\n[{folders.adapters[0]}] {whole[1]}\n"
        "conversations begin again\n"
    )


def test_without_a_template_there_is_no_system_message(tmp_path: Path) -> None:
    told = Folders(tmp_path, None).talk("/system w11")
    assert "has no chat template, so there is no system message" in told


def test_temperature_samples_from_the_whole_distribution_and_back(tmp_path: Path) -> None:
    folders = Folders(tmp_path, None)
    warm = folders.transcript(folders.expected("w3 w4", temperature=1.5))
    cold = folders.transcript(folders.expected("w3 w4"))
    told = folders.talk("/temperature 1.5", "w3 w4", "/reset", "/temperature 0", "w3 w4")
    again = "conversations begin again\ntemperature 0\n"
    assert told == folders.greeting() + "temperature 1.5\n" + warm + again + cold and warm != cold
    assert folders.talk("/temperature 1.5", "w3 w4", seed=1) != folders.greeting() + "temperature 1.5\n" + warm


def test_filters_and_a_penalty_are_those_of_generate(tmp_path: Path) -> None:
    folders = Folders(tmp_path, None)
    options: dict[str, Any] = {"top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.5}
    told = folders.talk("/temperature 1.5", "w3 w4", **options)
    warm = folders.transcript(folders.expected("w3 w4", temperature=1.5, **options))
    assert told == folders.greeting() + "temperature 1.5\n" + warm
    cold = folders.transcript(folders.expected("w3 w4", "w3", repetition_penalty=1.5))
    assert folders.talk("w3 w4", "w3", **options) == folders.greeting() + cold
    assert len({warm, cold, folders.transcript(folders.expected("w3 w4", "w3"))}) == 3


@TEMPLATES
def test_special_tokens_are_kept_where_they_are_asked_for(tmp_path: Path, template: str | None) -> None:
    """Shown, and read in the next turn; what ends an answer is neither."""
    folders, plain = Folders(tmp_path / "tags", template, tags=list(WORDS)), Folders(tmp_path / "plain", template)
    assert not "".join(folders.expected("w3 w4")[0]).strip(), "nothing but tags is written"
    kept = folders.talk("w3 w4", "w9", keep_special_tokens=True)
    expected = plain.talk("w3 w4", "w9")
    assert kept.replace(str(folders.base.parent), "") == expected.replace(str(plain.base.parent), "")
    assert kept.splitlines()[-1].partition("] ")[2].strip() and "</s>" not in kept


@for_each("value", ["hot", "-1", "inf", "nan", ""])
def test_an_impossible_temperature_is_refused_and_the_chat_goes_on(tmp_path: Path, value: str) -> None:
    folders = Folders(tmp_path, None)
    told = folders.talk(f"/temperature {value}", "w3 w4")
    assert "is no number from 0 up" in told and told.endswith(folders.transcript(folders.expected("w3 w4")))


def test_an_unknown_command_is_not_said_to_the_model(tmp_path: Path) -> None:
    folders = Folders(tmp_path, None)
    assert folders.talk("/rest") == folders.greeting() + f"unknown command /rest; known are {COMMANDS}\n"


def test_a_conversation_longer_than_the_model_is_not_answered(tmp_path: Path) -> None:
    folders = Folders(tmp_path, None, max_position_embeddings=12)
    told = folders.talk("w3 w4 w5 w6 w7 w8 w9", "/reset", "w3 w4")
    line = "7 tokens and an answer of 6 exceed the model's 12; /reset"
    assert [told.count(f"[{label}] {line}\n") for label in folders.labels()] == [1, 1, 1]
    assert told.endswith(folders.transcript(folders.expected("w3 w4")))


def test_text_comes_while_it_is_made(tmp_path: Path) -> None:
    """Each word reaches the file before the next one is sampled."""
    folders = Folders(tmp_path, None)
    pieces: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    out = Out()
    load_chat(str(folders.base), [], out, dtype=None, trust_remote_code=False, max_new_tokens=TOKENS).run(["w3 w4"])
    assert len([piece for piece in pieces[2:] if piece.strip()]) >= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"intermediate_size": 64}, "size mismatch"), ({"num_hidden_layers": 3}, "only one of them has")],
    ids=["wider", "deeper"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, options: dict[str, Any], words: str, place: int) -> None:
    folders = Folders(tmp_path / "own", None)
    other = Folders(tmp_path / "other", None, **options)
    folders.adapters[place] = other.adapters[0]
    with pytest.raises(ModelError, match=words) as caught:
        folders.talk("w3")
    assert f"{other.adapters[0]} does not fit {folders.base}" in str(caught.value) and "\n" not in str(caught.value)
