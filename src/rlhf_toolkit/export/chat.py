"""``rlhf chat``: one line typed, answered by the base and by each adapter, side by side.

Plain transformers and PEFT: one model in memory, PEFT's own ``set_adapter`` and ``disable_adapter`` between answers. An
answer is what ``generate`` of the same contestant alone would say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from rlhf_toolkit.data.chat import plain_ids, render, rendered_ids
from rlhf_toolkit.data.response_texts import ends_and_padding, response_texts
from rlhf_toolkit.data.tokenizers import stop_token_ids
from rlhf_toolkit.errors import ModelError, described
from rlhf_toolkit.export.folders import adapter_folder, base_name, model_folder, trained_quantised
from rlhf_toolkit.export.own_tokenizer import own_tokenizer
from rlhf_toolkit.models.adapter_files import read_lora_config
from rlhf_toolkit.models.loading import generation_eos_of, require_all_weights
from rlhf_toolkit.seeding import derive_seed
from rlhf_toolkit.texts import WORDS, printable, say

BASE = "base"
COMMANDS = "/reset  /system TEXT  /temperature NUMBER  /help  /quit"
HELP = """/reset               forget the conversation
/system TEXT         set the system message and begin again; /system shows it, /system none takes it away
/temperature NUMBER  how tokens are drawn; 0: always the likeliest
/quit                end, as Ctrl-D does
Ctrl-C               stop an answer; what has been said of it stays in the conversation"""
NO_SYSTEM = "none"


@dataclass
class Contestant:
    """Who answers: a label, PEFT's name of the adapter (None: the base), the tokenizer, what ends an answer, and the
    conversation so far.

    ``messages`` are those of a chat template; ``text`` is everything said, where there is none.
    """

    label: str
    adapter: str | None
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""


@dataclass
class Chat:
    """The conversation of every contestant, and how they speak.

    Temperature 0 takes the likeliest token. Above it, tokens are drawn from the whole distribution as far as ``top_k``,
    ``top_p`` and ``min_p`` leave it, as in a rollout with these settings, every contestant from the same random stream.
    ``repetition_penalty`` None, like what else the model's generation config asks for, stays as ``generate`` has it.
    With ``keep_special_tokens`` answers, which later turns read, keep all special tokens but those that end them.
    """

    model: Any  # PreTrainedModel, or PeftModel around it
    contestants: list[Contestant]
    out: TextIO
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    keep_special_tokens: bool = False
    seed: int = 0
    system: str = ""
    turn: int = 0

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line until /quit or the end of the input. An empty line is passed over."""
        self._say(f"{', '.join(c.label for c in self.contestants)}. {COMMANDS}")
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                self._command(*text.partition(" ")[::2])
            elif text:
                self.turn += 1
                for contestant in self.contestants:
                    self.out.write(f"[{printable(contestant.label)}] ")
                    self.answer(contestant, text)

    def _command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        if name == "/reset":
            self._reset()
        elif name == "/help":
            self._say(HELP)
        elif name == "/system" and not all(each.tokenizer.chat_template for each in self.contestants):
            self._say("the tokenizer has no chat template, so there is no system message; say it in a line")
        elif name == "/system" and not argument:
            self._say(f"system message: {self.system}" if self.system else "there is no system message")
        elif name == "/system":
            self.system = "" if argument == NO_SYSTEM else argument
            self._reset()
        elif name == "/temperature":
            try:
                value = float(argument)
            except ValueError:
                value = math.nan
            if 0 <= value < math.inf:
                self.temperature = value
                self._say(f"temperature {value:g}")
            else:
                self._say(f"/temperature {argument} is no number from 0 up; say /temperature 0.7")
        else:
            self._say(f"unknown command {name}; known are {COMMANDS}")

    def _reset(self) -> None:
        self.turn = 0
        for contestant in self.contestants:
            contestant.messages, contestant.text = [], ""
        self._say("conversations begin again")

    def answer(self, contestant: Contestant, text: str) -> None:
        """Have ``contestant`` answer ``text``; both become part of its conversation. An answer that might not fit the
        model's longest sequence is not begun."""
        ids, mask = self.prompt(contestant, text)
        length = ids.shape[1]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", math.inf)  # ALiBi has none
        if isinstance(limit, (int, float)) and length + self.max_new_tokens > limit:
            self._say(f"{length} tokens and an answer of {self.max_new_tokens} exceed the model's {limit}; /reset")
            return
        filters: dict[str, Any] = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        sampling = {"do_sample": True, "temperature": self.temperature, **filters}
        if self.temperature == 0:
            sampling = {"do_sample": False, **dict.fromkeys(("temperature", *filters))}
        if self.repetition_penalty is not None:
            sampling["repetition_penalty"] = self.repetition_penalty
        if self.model.generation_config.pad_token_id is None:  # nothing is padded; generate only wants to be told
            sampling["pad_token_id"] = contestant.tokenizer.pad_token_id or contestant.tokenizer.eos_token_id or 0
        if contestant.stop_ids:  # training ends a response at each of them, the model's own config may name fewer
            sampling["eos_token_id"] = list(contestant.stop_ids)
        stream = _Stream(contestant.tokenizer, self.out, self._left_out(contestant))
        torch.manual_seed(derive_seed(self.seed, "chat", self.turn))
        try:
            with self._explained(contestant), speaking(self.model, contestant.adapter):
                self.model.generate(
                    input_ids=ids, attention_mask=mask, streamer=stream, max_new_tokens=self.max_new_tokens, **sampling
                )
        except KeyboardInterrupt:  # it ends this answer, and not the program
            stream.end()
            self._say("(stopped)")
        answer = self._text(contestant, stream.taken[length:])
        contestant.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        contestant.text = self._text(contestant, stream.taken) + "\n"

    @contextmanager
    def _explained(self, contestant: Contestant) -> Iterator[None]:
        """What a model's own configs have ``generate`` raise is one line: nobody has looked at all they may ask for."""
        try:
            yield
        except Exception as error:
            raise ModelError(
                f"{contestant.label} cannot answer ({described(error)}); check its config.json and "
                "generation_config.json"
            ) from error

    def _left_out(self, contestant: Contestant) -> frozenset[int] | None:
        """The ids that no answer's text has; None: the tokenizer's special tokens."""
        return ends_and_padding(contestant.tokenizer, contestant.stop_ids) if self.keep_special_tokens else None

    def _text(self, contestant: Contestant, tokens: list[int]) -> str:
        return response_texts([tokens], contestant.tokenizer, self._left_out(contestant))[0]

    def prompt(self, contestant: Contestant, text: str) -> tuple[Tensor, Tensor]:
        """The token ids (1, P) that ``contestant`` is to go on from when it is told ``text``, and their mask."""
        tokenizer = contestant.tokenizer
        if tokenizer.chat_template:
            system = [{"role": "system", "content": self.system}] if self.system else []
            messages = [*system, *contestant.messages, {"role": "user", "content": text}]
            whole = render(messages, tokenizer, index=self.turn, add_generation_prompt=True)
            ids = rendered_ids(whole, tokenizer)
        else:
            ids = plain_ids(contestant.text + text, tokenizer)
        tokens = torch.tensor([ids], device=self.model.device)
        return tokens, torch.ones_like(tokens)

    def _say(self, text: str) -> None:
        say(text, self.out)


def load_chat(
    base: str, adapters: list[str], out: TextIO, *, dtype: torch.dtype | None, trust_remote_code: bool, **options: Any
) -> Chat:
    """Load the base once and every adapter on it; ``options`` go to Chat.

    Without ``dtype`` the base has the one it is stored in. A base of the hub is of the revision that the adapters name;
    an adapter speaks with the tokenizer that lies beside it, if one does. Raises ModelError where something does not
    fit.
    """
    folders = [adapter_folder(adapter) for adapter in adapters]
    folder = model_folder(base_name(base, folders))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype or "auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model, found = loaded
        model = model.to(device)
    except Exception as error:  # its files may hold anything
        raise ModelError(f"{base} does not load as a causal language model ({described(error)}); check it") from error
    require_all_weights(base, found)
    named = generation_eos_of(str(folder), model.config)
    contestants = [Contestant(BASE, None, tokenizer, _stops(tokenizer, named))]
    for number, (label, place) in enumerate(zip(adapters, folders, strict=True)):
        name = f"adapter_{number}"
        try:
            if not isinstance(model, PeftModel):
                model = PeftModel(model, read_lora_config(str(place)), adapter_name=name)
            put = model.load_adapter(str(place), adapter_name=name)
        except Exception as error:  # the same of the adapter's
            raise ModelError(
                f"{label} does not fit {base} ({described(error)}); give the base that it was trained on"
            ) from error
        odd = sorted([*put.unexpected_keys, *put.missing_keys])
        if odd:  # PEFT alone would pass over them
            raise ModelError(
                f"{label} does not fit {base}: only one of them has {odd[0]}; give the base that it was trained on"
            )
        note = trained_quantised(place)
        if note is not None:
            say(note, out)
        own, also = own_tokenizer(place, model.config, trust_remote_code=trust_remote_code)
        contestants.append(Contestant(label, name, own or tokenizer, _stops(own or tokenizer, named, also)))
    return Chat(model.eval(), contestants, out, **options)


def _stops(
    tokenizer: PreTrainedTokenizerBase, named: int | list[int] | None, also: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """What ends an answer; nothing does where nobody names a token."""
    return stop_token_ids(tokenizer, named, also=also, stop_strings=("",))


@contextmanager
def speaking(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside, ``model`` is the base (None) or the base with one adapter."""
    if adapter is not None:
        model.set_adapter(adapter)
        yield
    elif isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def typed(ask: Callable[[str], str] = input) -> Iterator[str]:
    """Lines from the terminal, until its end or Ctrl-C."""
    while True:
        try:
            yield ask("> ")
        except (EOFError, KeyboardInterrupt):
            return


class _Stream(TextStreamer):
    """transformers' streamer, into a file of our choice. ``taken`` are the tokens so far, the prompt's too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO, left_out: frozenset[int] | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=left_out is None)  # type: ignore[arg-type]
        self.file, self.left_out = out, left_out or frozenset()
        self.taken: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        self.taken += value.flatten().tolist()
        if self.next_tokens_are_prompt or int(value) not in self.left_out:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what has become certain."""
        self.file.write(printable(text, WORDS) + "\n" * stream_end)
        self.file.flush()
