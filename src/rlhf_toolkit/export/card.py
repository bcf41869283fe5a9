"""``rlhf card``: README.md of a run folder, a model card made of what the run wrote down, and its way to the hub."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import yaml
from huggingface_hub.errors import HFValidationError

from rlhf_toolkit.errors import CheckpointError, described, shortened
from rlhf_toolkit.export.card_kinds import EVERY_RUN, Columns, kind_of
from rlhf_toolkit.export.finished import FinishedRun, readable
from rlhf_toolkit.export.folders import HEADS, is_path
from rlhf_toolkit.export.own_tokenizer import tokenizer_files
from rlhf_toolkit.files import write_text
from rlhf_toolkit.reporting.records import Record, read_records
from rlhf_toolkit.reporting.report import UNFINISHED
from rlhf_toolkit.secrets import masked
from rlhf_toolkit.texts import WORDS, printable

CARD, POLICY, REWARD_HEAD = "README.md", "policy", "reward_head.safetensors"
MARK = "<!-- made by rlhf card from run.json, log.jsonl and summary.json -->"
PEFTS_OWN = "# Model Card for Model ID"  # the empty form that PEFT leaves in every folder it saves to
DTYPES = ("bfloat16", "float16", "float32")
ROWS = 10
ADAPTER_HEAD = ("folder", "rank", "alpha", "scale", "layers")


class Uploader(Protocol):
    """The methods of ``huggingface_hub.HfApi`` that ``push`` calls."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository, or leave it as it is."""

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> Any:
        """Send the files that fit the patterns, in one commit."""


def write_card(run: FinishedRun, repo: str | None = None) -> Path:
    """Write README.md of a run folder; ``repo`` is the name under which the card says it can be loaded.

    Replaces the form that PEFT left and a card of ours; raises CheckpointError for any other README.md.
    """
    path = run.folder / CARD
    if os.path.lexists(path) and not path.is_file():
        raise CheckpointError(f"{path} is no file; move it away, then say rlhf card again")
    if path.exists():
        old = path.read_text(encoding="utf-8", errors="replace")
        if MARK not in old and PEFTS_OWN not in old:
            raise CheckpointError(f"{path} was written by somebody else; move it away, then say rlhf card again")
    write_text(path, card(run, repo))
    return path


def card(run: FinishedRun, repo: str | None = None) -> str:
    """The card: how to load, recipe, adapters, curve, evaluations, machine, versions, all settings.

    Absolute paths are cut to their last part, and the values of ``*kwargs``, which may hold keys, are left out.
    Raises CheckpointError where the run has neither an adapter nor a model.
    """
    if not (run.adapters or run.is_whole_model):
        raise CheckpointError(f"{run.folder} has no adapter folder; restore policy/, or give another run")
    with readable(run.folder):
        return printable(_Card(run, repo).text(), WORDS)


def push(run: FinishedRun, repo: str, uploader: Uploader) -> list[str]:
    """Send card, adapters and heads, or the model, to ``repo``, which is made private where it does not exist; return
    what was sent.

    Nothing else of the run folder leaves this machine: no log, no samples, no checkpoint. Raises CheckpointError with
    the hub's reason.
    """
    if run.prefix:
        raise CheckpointError(f"{run.folder}: {run.summary[UNFINISHED]}; let it end (--resume continues), then send it")
    patterns = [CARD, *(f"{glob.escape(name)}/*" for name in ([POLICY] if run.is_whole_model else run.adapters))]
    patterns += [
        f"{glob.escape(path.parent.name)}/{path.name}"
        for head in HEADS
        for path in sorted(run.folder.glob(f"*/{head}"))
    ]
    patterns = [pattern for pattern in dict.fromkeys(patterns) if not pattern.startswith("checkpoint-")]
    try:
        uploader.create_repo(repo, private=True, exist_ok=True)
        uploader.upload_folder(
            repo_id=repo,
            folder_path=str(run.folder),
            allow_patterns=patterns,
            commit_message="Adapters and card of a run",
        )
    except (OSError, HFValidationError, httpx.HTTPError) as error:
        raise CheckpointError(
            f"{run.folder} could not be sent to {repo} ({described(error)}); check the name, hf auth login and the "
            "network"
        ) from error
    return patterns


# ---- sections --------------------------------------------------------------------------------------------------------

LOAD_MODEL = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place}, subfolder={adapter}, dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained({place}, subfolder={adapter})"""
LOAD_ADAPTER = """from transformers import AutoModelForCausalLM, AutoTokenizer{more}

{named}base = AutoModelForCausalLM.from_pretrained({base}{revision}, dtype=torch.{dtype}{bits})
model = PeftModel.from_pretrained(base, {place}, subfolder={adapter})
tokenizer = AutoTokenizer.from_pretrained({tokenizer})"""
PEFT = "from peft import PeftModel"
NAMED_BASE = """base_name = PeftConfig.from_pretrained({place}, subfolder={adapter}).base_model_name_or_path
"""
LOCAL_BASE = """The base was a folder on the machine that trained: `{adapter}/adapter_config.json` names it. On another
machine set `base_name` to where it lies there."""
UNNAMED_BASE = "The base was a folder on the machine that trained; put its path in place of the name."
NF4 = """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{dtype}
)"""
"""Gives the very weights of model.quantization=nf4, by bitsandbytes."""
NOTHING_MORE = {"more": "", "bits": ""}
OTHER_BITS = """

The base was stored in {kind} while the adapter was trained; on the weights of full precision, as they are loaded here,
what it says differs a little."""
SCORE = """head = load_file({head})


def score({arguments}):
    text = {text}
    ids = tokenizer(text, {options}).input_ids
    with torch.no_grad():
        states = model.get_base_model().base_model(ids).last_hidden_state
    return (states[0, -1].float() @ head["weight"] + head["bias"]).item()"""
"""Scores as the run did: the text ends with the token that ends the response."""
SCORED_CHAT = {
    "arguments": "messages",
    "text": "tokenizer.apply_chat_template(messages, tokenize=False).rstrip()",
    "options": 'return_tensors="pt", add_special_tokens=False',
}
SCORED_TEXT = {
    "arguments": "prompt, response",
    "text": "prompt + response + tokenizer.eos_token",
    "options": 'return_tensors="pt"',
}


class _Card:
    """The sections of a run's card."""

    def __init__(self, run: FinishedRun, repo: str | None) -> None:
        self.run, self.repo, self.kind = run, repo, kind_of(run.settings)
        self.base: str = run.settings["model"]["name"]

    def text(self) -> str:
        run, kind = self.run, self.kind
        trained, evaluated = (read_records(run.folder, name, kind.axis) for name in ("train", "eval"))
        held_out = _table(tuple(kind.evaluated), _numbers(evaluated, kind.evaluated))
        settings = yaml.safe_dump(_public(masked(run.settings)), sort_keys=False, allow_unicode=True)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))  # longer than any in them
        sections = [
            self.metadata(),
            MARK,
            f"# {(self.repo or run.folder.resolve().name).rpartition('/')[2]}",
            self.opening(len(trained)),
            "## Loading",
            self.loading(),
            "## Recipe",
            _table(("setting", "value"), self.recipe()),
            *([] if run.is_whole_model else ["## Adapters", _table(ADAPTER_HEAD, self.adapters())]),
            "## Training",
            _table(tuple(kind.trained), _numbers(trained, kind.trained)),
            "## Evaluation",
            held_out if evaluated else "Nothing was held out.",
            "## Machine and versions",
            _table(("", ""), self.machine()),
            "## All settings",
            f"{fence}yaml\n{settings}{fence}",
        ]
        return "\n\n".join(sections) + "\n"

    def metadata(self) -> str:
        known = {} if _is_local(self.base) else {"base_model": printable(self.base)}
        library, tags = ("peft", self.kind.tags)
        if self.run.is_whole_model:
            library, tags = "transformers", tags[1:]  # the first is lora
        fields = {**known, "library_name": library, "pipeline_tag": self.kind.task, "tags": list(tags)}
        return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"

    def opening(self, count: int) -> str:
        run, base = self.run, _shown(self.base)
        names = " and ".join(_inline(f"{name}/") for name in run.adapters)
        what = f"LoRA adapter{'s' * (len(run.adapters) > 1)} ({names}) on {_inline(base)}"
        if run.is_whole_model:
            what = f"{_inline(base)} with all of its weights (`{POLICY}/`)"
        text = f"{what}, trained with rlhf_toolkit {self.kind.done.format(count=count)}"
        if UNFINISHED in run.summary:
            said = str(run.summary[UNFINISHED])
            text += f" {said[0].upper()}{said[1:]}."
        if "score_mean" in run.summary:
            text += (
                " At the end the head was scaled and shifted so that the scores of all training responses have mean 0 "
                f"and variance 1; before, their mean was {run.summary['score_mean']:.3f} and their deviation "
                f"{run.summary['score_deviation']:.3f}."
            )
        return text

    def loading(self) -> str:
        """Code that loads the adapter or the model; that of a reward model with its head, and scores with both."""
        settings, place = self.run.settings, self.repo or _shown(str(self.run.folder))
        dtype = settings["model"]["dtype"]
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.run.folder}/run.json has model.dtype={shortened(dtype)}, which is none; restore that file"
            )
        words = {"base": _code(_shown(self.base)), "place": _code(place), "dtype": dtype, "named": ""}
        if self.run.is_whole_model:
            return f"```python\n{LOAD_MODEL.format(adapter=_code(f'{self.run.prefix}{POLICY}'), **words)}\n```"
        scores = "reward_model" in settings
        adapters = self.run.adapters
        wanted = f"{self.run.prefix}{'reward' if scores else POLICY}"
        adapter = next(name for name in (wanted, *adapters) if name in adapters)
        imports = ["import torch", *["from huggingface_hub import hf_hub_download"] * bool(scores and self.repo)]
        imports += [PEFT, *["from safetensors.torch import load_file"] * scores]
        kind = str(settings["model"].get("quantization", "none"))  # a run from before that setting has none
        words |= {"more": ", BitsAndBytesConfig", "bits": NF4.format(**words)} if kind == "nf4" else NOTHING_MORE
        revision = settings["model"].get("revision")
        at = "" if revision is None else f", revision={_code(revision)}"
        named_there = _is_local(self.base) and bool(adapters[adapter].get("base_model_name_or_path"))
        if named_there:
            imports[imports.index(PEFT)] = PEFT.replace("PeftModel", "PeftConfig, PeftModel")
            words |= {"base": "base_name", "named": NAMED_BASE.format(adapter=_code(adapter), **words)}
        beside = tokenizer_files(self.run.folder / adapter)  # another than the base's
        tokenizer = f"{words['place']}, subfolder={_code(adapter)}" if beside else f"{words['base']}{at}"
        lines = [*imports, LOAD_ADAPTER.format(adapter=_code(adapter), revision=at, tokenizer=tokenizer, **words)]
        if scores:
            file = f"{adapter}/{REWARD_HEAD}"
            head = f"hf_hub_download({_code(place)}, {_code(file)})" if self.repo else _code(f"{place}/{file}")
            lines.append(SCORE.format(head=head, **(SCORED_CHAT if settings["data"]["chat_template"] else SCORED_TEXT)))
        text = "```python\n" + "\n".join(lines) + "\n```"
        if _is_local(self.base):
            text += f"\n\n{LOCAL_BASE.format(adapter=adapter) if named_there else UNNAMED_BASE}"
        return text + (OTHER_BITS.format(kind=_inline(kind)) if kind not in ("none", "nf4") else "")

    def recipe(self) -> Iterable[tuple[str, ...]]:
        for name in (*EVERY_RUN, *self.kind.recipe):
            section, _, key = name.partition(".")
            value = _public(masked(self.run.settings.get(section, {}))).get(key)
            if value not in (None, "", [], {}) and (name, value) != ("model.quantization", "none"):
                yield _inline(name), _inline(str(value))

    def adapters(self) -> Iterable[tuple[str, ...]]:
        for name, config in self.run.adapters.items():
            rank, alpha, layers = config["r"], config["lora_alpha"], config["target_modules"]
            scale = f"{alpha} / sqrt({rank})" if config.get("use_rslora") else f"{alpha} / {rank}"
            layers = layers if isinstance(layers, str) else ", ".join(sorted(layers))
            yield _inline(f"{name}/"), str(rank), str(alpha), scale, layers

    def machine(self) -> Iterable[tuple[str, ...]]:
        summary = self.run.summary
        yield "processes", f"{summary['world_size']}, rank 0 on {_inline(str(summary['device']))}"
        yield "minutes", f"{summary['seconds'] / 60:.1f}"
        if "tokens_per_second" in summary:
            yield "tokens per second", f"{summary['tokens_per_second']:.1f}"
        yield "peak memory of rank 0", f"{summary['peak_memory_gib']:.2f} GiB"
        yield from ((str(name), str(version)) for name, version in summary["versions"].items())


def _numbers(records: Sequence[Record], columns: Columns) -> Iterable[tuple[str, ...]]:
    """At most ROWS records, evenly spaced, the first and the last among them."""
    last = len(records) - 1
    chosen = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)}) if last >= ROWS else range(last + 1)
    for number in chosen:
        values = [(records[number].get(name), form) for name, form in columns.values()]
        yield tuple("" if value is None else form.format(value) for value, form in values)


# ---- words -----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are of one line each and, where they are not code, neither HTML nor links."""

    def line(cells: Sequence[str]) -> str:
        lines = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        shown = (each if each.startswith("`") else each.replace("<", "&lt;").replace("[", "\\[") for each in lines)
        return "| " + " | ".join(shown) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _inline(text: str) -> str:
    """Code within a line; a name with a backtick in it would end it."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _public(value: Any) -> Any:
    """Settings without places on this machine and without arguments that may be secret."""
    if isinstance(value, Mapping):
        return {
            key: "(not shown)" if str(key).endswith("kwargs") and inner else _public(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    return _shown(value) if isinstance(value, str) else value


def _code(text: str) -> str:
    """A string of Python: whatever stands in it, it stays one."""
    return json.dumps(str(text))


def _shown(text: str) -> str:
    """An absolute path without its folders; ``file.py:name`` keeps its name."""
    return Path(text).name if text.startswith(("/", "~")) and "\n" not in text else text


def _is_local(name: str) -> bool:
    return is_path(name) or Path(name).exists()
