"""What the documents name exists: links, files, settings, the examples of the README, and the messages of errors."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.offenders import for_each

SUPERVISED = (SFTExperiment, RewardExperiment, DPOExperiment)
ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BY_PAGE = for_each("page", PAGES, lambda page: page.name)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
FILE = re.compile(r"`((?:src|recipes|accelerate_configs|tests|docs|bench)/[\w./-]+?\.(?:py|yaml|md))(?=[`:])")
SETTING = re.compile(r"`(?:\w+\.yaml )?((?:model|data|reward|rollout|ppo|update|run)\.[a-z_]+)")
PLACED = re.compile(r"`(?:\w+\.)?(\w+)`,? (?:in|\()\s*`(src/rlhf_toolkit/[\w/]+\.py)`")
MESSAGE = re.compile(r"`(\w+Error): ([^`]+)`")
README = PAGES[0].read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@BY_PAGE
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


@BY_PAGE
def test_every_file_named_exists(page: Path) -> None:
    missing = [file for file in FILE.findall(page.read_text()) if not (ROOT / file).is_file()]
    assert not missing


@BY_PAGE
def test_every_setting_named_exists(page: Path) -> None:
    """But on the page of mistakes, which are run by a test of their own."""
    if page.name == "mistakes.md":
        return
    known = {f"{section}.{key}" for section, values in settings().items() for key in values}
    named = set(SETTING.findall(page.read_text())) - {"reward.py", "run.json", "update.json", "rollout.json"}
    unknown = {name for name in named if name not in known and not any(key.startswith(name) for key in known)}
    assert not unknown


@BY_PAGE
def test_every_name_said_to_be_in_a_file_is_there(page: Path) -> None:
    said = PLACED.findall(page.read_text())
    there = {file: (ROOT / file).read_text() for _, file in said}
    missing = [
        (name, file) for name, file in said if not re.search(rf"(def|class) {name}\b|\b{name} ?[:=]", there[file])
    ]
    assert not missing


def test_the_table_of_layers_names_every_module() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\w, ;]+) \|", (ROOT / "docs/architecture.md").read_text(), flags=re.MULTILINE)
    named = {layer: set(re.split("[,;] ", modules)) for layer, modules in rows}
    for layer in ("runs", "trainers", "rollout", "export", "models", "reporting", "settings"):
        there = {path.stem for path in (ROOT / "src/rlhf_toolkit" / layer).glob("*.py")} - {"__init__"}
        assert named[layer] == there, layer


def test_documents_that_the_code_names_exist() -> None:
    named = {name for file in (ROOT / "src").rglob("*.py") for name in re.findall(r"docs/\w+\.md", file.read_text())}
    assert named and all((ROOT / name).is_file() for name in named), sorted(named)


# ---- the README's own examples ---------------------------------------------------------------------------------------


def test_the_experiment_of_the_readme_is_valid_on_four_gpus() -> None:
    (text,) = blocks("yaml")
    experiment_from_dict(yaml.safe_load(text)).check_processes(4)


def test_the_reward_of_the_readme_works() -> None:
    text, _ = blocks("python")
    names: dict[str, object] = {}
    exec(text, names)
    responses = ["24, so 72 in all", "1,072", "none"]
    assert names["score"](["p"] * 3, responses, answer=["72"] * 3, other=[0] * 3) == [1.0, 0.0, 0.0]  # type: ignore[operator]


@cache
def launch_configs() -> set[str]:
    return {file.name for file in (ROOT / "accelerate_configs").glob("*.yaml")}


def test_every_launch_config_is_in_the_readme_and_only_those() -> None:
    table = README.partition("### Launch configs")[2].partition("###")[0]
    assert set(re.findall(r"`(\w+\.yaml)`", table)) == launch_configs()


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets


# ---- messages of errors ----------------------------------------------------------------------------------------------


def written(node: ast.AST) -> str:
    """A message as the documents write it, with ``…`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


@cache
def raised() -> dict[str, list[str]]:
    """Every message of an error that the code makes, by the error's name; of one that another rank raised, under that
    of all of them."""
    messages: dict[str, list[str]] = {}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and (name := error_of(node.func)) is not None:
                messages.setdefault(name, []).extend(written(part) for part in node.args)
    return messages


def error_of(function: ast.expr) -> str | None:
    """The error that a call of ``function`` makes."""
    if isinstance(function, ast.Attribute):
        return "RLHFError" if function.attr == "kind" else None
    return function.id if isinstance(function, ast.Name) and function.id.endswith("Error") else None


QUOTED = MESSAGE.findall((ROOT / "docs/troubleshooting.md").read_text())


def test_enough_messages_are_explained() -> None:
    assert len(QUOTED) >= 25


@for_each("kind, message", QUOTED)
def test_a_message_that_is_explained_is_one_the_code_raises(kind: str, message: str) -> None:
    assert any(text.startswith(message.rstrip(" …")) for text in raised().get(kind, [])), f"no {kind} says {message!r}"


def settings() -> dict[str, dict[str, Any]]:
    """Section -> its settings, of PPO and of the supervised runs."""
    required: dict[str, dict[str, Any]] = {"model": {"name": "m"}, "data": {"train": "d"}}
    ppo = {**required, "reward": {"function": "f:f"}}
    found: dict[str, dict[str, Any]] = {}
    kinds: list[tuple[dict[str, Any], Any]] = [(ppo, Experiment), *((required, kind) for kind in SUPERVISED)]
    for values, kind in kinds:
        for section, keys in experiment_from_dict(values, kind).as_dict().items():
            found[section] = {**found.get(section, {}), **keys}
    return found
