"""Run folders: their report, their card, what ``rlhf card --push`` would send."""

from __future__ import annotations

import ast
import atexit
import functools
import json
import random
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_toolkit.cli import results
from rlhf_toolkit.export.card import push, write_card
from rlhf_toolkit.export.finished import read_run
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.strangers import folders, frame
from tests.strangers.folders import VALUES, Case, Change, Raw, a_folder, file_cases, gone, link, pipe, setting, text
from tests.strangers.ground import VICTIM, here

COUNT, LIMIT = 300, 10.0
WAYS = ("report", "card", "push")
RUN, SUMMARY, LOG, SAMPLES, ADAPTER = (
    "run.json",
    "summary.json",
    "log.jsonl",
    "samples.jsonl",
    "policy/adapter_config.json",
)
HOSTILE = 'x"); import os; os.system("{COMMAND}")  #'
EVENT = {
    "kind": "train",
    "rollout": 1,
    "critic/score/mean": 0.5,
    "critic/raw_score/mean": 0.5,
    "actor/ref_kl": 0.1,
    "response_length/mean": 5.0,
    "timing_s/step": 2.0,
    "perf/total_num_tokens": 100,
    "perf/max_memory_allocated_gb": 1.0,
}


@functools.cache
def sound() -> Path:
    """A run folder as a run leaves it."""
    outer = tempfile.mkdtemp(prefix="strangers-run-")
    atexit.register(shutil.rmtree, outer, ignore_errors=True)  # children end without it
    folder = Path(outer) / "run"
    shutil.copytree(folders.sound() / "adapter", folder / "policy")
    settings = {
        "model": {"name": "some/model", "dtype": "float32"},
        "data": {"train": "x.jsonl"},
        "reward": {"function": "a:b"},
    }
    (folder / RUN).write_text(json.dumps(experiment_from_dict(settings).as_dict()))
    evaluation = {
        "kind": "eval",
        "rollout": 0,
        "eval/score/mean": 0.1,
        "eval/response_length": 4.0,
        "eval/clip_ratio": 0.0,
    }
    lines = [evaluation, EVENT, {**EVENT, "rollout": 2}, {**evaluation, "rollout": 2}]
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"kind": "eval", "rollout": 0, "prompt": "a question", "response": "an answer", "score": 0.5}
    (folder / SAMPLES).write_text("".join(json.dumps({**sample, "rollout": r}) + "\n" for r in (0, 2)))
    summary = {
        "mean_scores": [0.5, 0.5],
        "mean_raw_scores": [0.5, 0.5],
        "ref_kl": [0.1, 0.1],
        "seconds_per_rollout": [2.0, 2.0],
        "seconds": 4.0,
        "tokens_per_second": 50.0,
        "peak_memory_gib": 1.0,
        "evaluations": [evaluation, {**evaluation, "rollout": 2}],
        "world_size": 2,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
    }
    (folder / SUMMARY).write_text(json.dumps(summary))
    return folder


def inside(file: str, section: str, **changes: Any) -> Change:
    """One section of a JSON file with these values."""

    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        config[section] = {**config[section], **changes}
        (folder / file).write_text(here().filled(json.dumps(config)))

    return change


def line(file: str, content: Any) -> Change:
    """A further line in a log."""

    def change(folder: Path) -> None:
        with (folder / file).open("a") as out:
            out.write((content if isinstance(content, str) else json.dumps(content)) + "\n")

    return change


def adapter_named(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "policy").rename(folder / name)

    return change


def star(folder: Path) -> None:
    """An adapter whose name would send everything."""
    shutil.copytree(folder / "policy", folder / "*")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "private").write_text("x")


REFUSED: dict[str, Change] = {
    "no run.json": gone(RUN),
    "no summary": gone(SUMMARY),
    "run.json list": text(RUN, "[]"),
    "run.json null": text(RUN, "null"),
    "run.json cut": text(RUN, '{"model": {"name"'),
    "run.json bytes": text(RUN, b"\xff\xfe\x00"),
    "run.json deep": text(RUN, '{"a":' * 100000),
    "run.json of text": text(RUN, '{"model": "x"}'),
    "summary list": text(SUMMARY, "[]"),
    "summary deep": text(SUMMARY, "[" * 100000),
    "summary bytes": text(SUMMARY, b"\x80"),
    "run.json pipe": pipe(RUN),
    "log pipe": pipe(LOG),
    "adapter pipe": pipe(ADAPTER),
    "any pipe": pipe("notes"),
    "run.json link": link(RUN, "{OUTSIDE}/victim.json"),
    "card link": link("README.md", "{OUTSIDE}/victim"),
    "log link": link(LOG, "{OUTSIDE}/victim"),
    "temporary link": link(".README.md.tmp", "{OUTSIDE}/victim"),
    "adapter link": link("value", "{OUTSIDE}"),
    "wandb link elsewhere": link("wandb/run-1/files/x", "{OUTSIDE}/victim"),
    "run.json folder": a_folder(RUN),
    "summary folder": a_folder(SUMMARY),
    "adapter config list": text(ADAPTER, "[]"),
    "adapter config deep": text(ADAPTER, "[" * 100000),
}
OTHERS: dict[str, Change] = {
    "nothing": lambda folder: None,
    "run.json empty": text(RUN, "{}"),
    "no model": setting(RUN, model={}),
    "model a number": inside(RUN, "model", name=3),
    "base of code": inside(RUN, "model", name=HOSTILE),
    "base of code by a line": inside(RUN, "model", name='x"\nimport os\nos.system("{COMMAND}")\n"'),
    "base of a fence": inside(RUN, "model", name="x\n```\n<script>alert(1)</script>\n"),
    "base of ESC": inside(RUN, "model", name="\x1b[2J\x1b]0;pwned\x07"),
    "base of bidi": inside(RUN, "model", name="\u202egpj"),
    "base with NUL": inside(RUN, "model", name="a\0b"),
    "dtype of code": inside(RUN, "model", dtype="float32); import os; os.system('{COMMAND}')"),
    "dtype odd": inside(RUN, "model", dtype=["x"]),
    "a setting of ESC": inside(RUN, "data", **{"\x1b[2J": "\x1b]0;x\x07"}),
    "a function of a fence": inside(RUN, "reward", function="`</code><img src={URL}/x>"),
    "kwargs with a key": inside(RUN, "reward", kwargs={"api_key": "sk-live-0123456789abcdef"}),
    "a key of old": inside(RUN, "data", train="https://user:hunter2secret@h/x?token=abcdef123456"),
    "an empty log": text(LOG, ""),
    "a log of text": line(LOG, "text"),
    "a log of a number": line(LOG, "3"),
    "a log of null": line(LOG, "null"),
    "a log without kind": line(LOG, {"rollout": 3}),
    "a log without rollout": line(LOG, {"kind": "train"}),
    "a log of a list": line(LOG, {"kind": "train", "rollout": [1]}),
    "a log of text for numbers": line(LOG, {**EVENT, "critic/score/mean": "\x1b[2J"}),
    "a log of ESC": line(LOG, {"kind": "train", "rollout": "\x1b[2J"}),
    "a log of deep": line(LOG, "[" * 100000),
    "a log of bytes": text(LOG, b"\xff\xfe\n"),
    "a log folder": a_folder(LOG),
    "samples of text": line(SAMPLES, "text"),
    "samples of null": line(SAMPLES, "null"),
    "samples without score": line(SAMPLES, {"kind": "eval", "prompt": "x", "response": "y"}),
    "samples of ESC": line(
        SAMPLES, {"kind": "eval", "prompt": "\x1b[2J\x1b]0;x\x07" * 3, "response": "\x9b2J\u202e\n\r", "score": 1}
    ),
    "samples of lists": line(SAMPLES, {"kind": "eval", "prompt": ["x"], "response": {}, "score": 1}),
    "samples of a long text": line(
        SAMPLES, {"kind": "eval", "prompt": "x" * 10**7, "response": "y" * 10**7, "score": 1}
    ),
    "samples of a score of text": line(
        SAMPLES, {"kind": "eval", "prompt": "a question", "response": "y", "score": "x"}
    ),
    "a score of NaN": line(SAMPLES, '{"kind": "eval", "prompt": "a question", "response": "y", "score": NaN}'),
    "summary empty": text(SUMMARY, "{}"),
    "summary of losses": text(SUMMARY, '{"losses": 3}'),
    "summary of losses of text": setting(SUMMARY, losses=["x"]),
    "an evaluation without": setting(SUMMARY, evaluations=[{}]),
    "evaluations of text": setting(SUMMARY, evaluations="xyz"),
    "evaluations of names": setting(SUMMARY, losses=[1.0], evaluations=[{"eval/\x1b[2J": 1.0}]),
    "no kl": setting(SUMMARY, ref_kl=[]),
    "versions of ESC": setting(SUMMARY, versions={"\x1b[2J": "\x1b]0;x\x07"}),
    "versions list": setting(SUMMARY, versions=["x"]),
    "versions of html": setting(SUMMARY, versions={"<script>": "<img src={URL}>", "[x](http://y)": "![x]({URL}/y)"}),
    "device of html": setting(SUMMARY, device="`<b>"),
    "seconds of 400 digits": setting(SUMMARY, seconds=Raw("1" + "0" * 400)),
    "seconds NaN": setting(SUMMARY, seconds=Raw("NaN")),
    "no adapters": lambda folder: shutil.rmtree(folder / "policy"),
    "an adapter of ESC": adapter_named("\x1b[2J"),
    "an adapter of a quote": adapter_named('x", a=__import__("os").system("touch x")) #'),
    "an adapter of lines": adapter_named("a\nb"),
    "an adapter of a fence": adapter_named("a\n```\n# b"),
    "an adapter of a star": star,
    "rank of ESC": setting(ADAPTER, r="\x1b[2J"),
    "layers of a number": setting(ADAPTER, target_modules=3),
    "layers mixed": setting(ADAPTER, target_modules=["a", 3]),
    "layers of html": setting(ADAPTER, target_modules=["<img src=x onerror=alert(1)>", "\x1b[31m|`"]),
    "another's card": text("README.md", "mine"),
    "a card of bytes": text("README.md", b"\xff\xfe"),
    "a card folder": a_folder("README.md"),
    "no settings of a kind": text(RUN, '{"model": {"name": "x", "dtype": "float32"}}'),
}


def cases(seed: int, count: int) -> Iterator[Case]:
    sound()
    chance = random.Random(f"run_folders {seed}")
    found = [Case(f"{way}: {name}", way, change) for name, change in REFUSED.items() for way in WAYS[:2]]
    found += [Case(f"{way}: {name}", way, change, False) for name, change in OTHERS.items() for way in WAYS[:2]]
    found.append(Case("push: an adapter of a star", "push", star, False))
    chosen = found if count >= 250 else chance.sample(found, min(count // 2, len(found)))
    yield from chosen
    rest = max(0, count - len(chosen))
    for number in range(rest // 2):
        file = chance.choice([RUN, SUMMARY, ADAPTER])
        content = json.loads((sound() / file).read_text())
        key, value, way = chance.choice(list(content)), chance.choice(VALUES), chance.choice(WAYS)
        change = setting(file, **{key: value})
        if file == RUN and not isinstance(value, Raw):
            change = inside(file, key, **{chance.choice(list(content[key])): value})
        yield Case(f"{number}: {way}: {file} {key}={ascii(value)[:40]}", way, change, False)
    yield from file_cases([RUN, SUMMARY, LOG, SAMPLES, ADAPTER], WAYS, chance, rest - rest // 2)


class Uploads:
    """What would be sent."""

    sent: list[str]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        pass

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        from huggingface_hub.utils._paths import filter_repo_objects

        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        self.sent = list(filter_repo_objects(files, allow_patterns=allow_patterns))


def run(case: Case) -> str:
    shutil.copytree(sound(), "run")
    folder = Path("run")
    case.change(folder)
    if case.way == "report":
        results.report(Namespace(run_folder=folder))
        shown = (here().folder.parent / "log").read_text(errors="replace")
        good = all(each.isprintable() or each in "\n\t" for each in shown)
    else:
        found = read_run(folder)
        card = write_card(found).read_text()
        good = VICTIM not in card and _is_harmless(card)
        if case.way == "push":
            uploads = Uploads()
            push(found, "a/b", uploads)
            good = good and not any("private" in file or file == LOG for file in uploads.sent)
    return frame.WRONGLY if case.refuse or not good else frame.RIGHTLY


def _is_harmless(card: str) -> bool:
    """No character that does not print, no tag outside code, no secret, and blocks of code that only load."""
    secrets = ("hunter2secret", "sk-live-0123", "abcdef123456")
    if any(not each.isprintable() and each not in "\n\t\u00a0\u3000\u200c\u200d" for each in card) or any(
        s in card for s in secrets
    ):
        return False
    for block in re.findall(r"```python\n(.*?)\n```", card, re.DOTALL):
        called = [ast.unparse(node.func) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        names = {name.rpartition(".")[2] for name in called}
        if not names <= {"from_pretrained", "load_file", "hf_hub_download"}:
            return False
    card = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)  # data for the hub, which shows none of it
    outside = re.sub(r"(`{3,})\w+\n.*?\n\1|`[^`\n]*`", "", card, flags=re.DOTALL)
    return not re.search(r"<(script|img|b>)|(?<!\\)\[x\]\(", outside)
