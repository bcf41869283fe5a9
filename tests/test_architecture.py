"""The import law and the size of the house, read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.offenders import for_each

PACKAGE = Path(__file__).parents[1] / "src" / "rlhf_toolkit"
FILES = sorted(PACKAGE.rglob("*.py"))
# Every module belongs to one layer; a module imports its own layer's package or lower ones, never a sibling package.
LAYERS = (
    {
        "errors",
        "types",
        "seeding",
        "plugins",
        "files",
        "texts",
        "secrets",
        "given",
        "last_words",
        "run_claims",
        "run_folders",
    },
    {"algorithms", "data", "distributed", "planning", "rewards", "checkpoint_files"},
    {"settings", "checkpoints", "reporting", "models"},
    {"rollout", "export"},
    {"trainers"},
    {"runs"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
BY_FILE = for_each("path", FILES, lambda path: path.relative_to(PACKAGE))
OUR_CONFIG = re.compile(r"\b(Experiment|(Model|Data|Reward|Rollout|PPO|Update|Run)Config)\b")
SIBLINGS = {
    ("types", "errors"),
    ("plugins", "errors"),
    ("plugins", "given"),
    ("given", "errors"),
    ("errors", "texts"),
    ("errors", "last_words"),
    ("last_words", "texts"),
    ("run_folders", "errors"),
    ("run_folders", "run_claims"),
    ("secrets", "errors"),
    ("secrets", "texts"),
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(source: str) -> Iterator[str]:
    """The dotted names a module imports, those inside its functions too; a relative import begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module}.{alias.name}" for alias in node.names)


def foreign(source: str) -> list[str]:
    """What only ``distributed`` may import."""
    return [
        name
        for name in imports(source)
        if re.match(r"deepspeed|accelerate|torch\.distributed|transformers.*deepspeed", name)
    ]


@BY_FILE
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    me = part_of(path)
    if me == "__init__":
        return
    assert me in LEVEL, f"{me} has no layer; give it one in LAYERS"
    for name in imports(path.read_text()):
        assert not name.startswith("."), f"{name} is relative; write rlhf_toolkit...."
        if not name.startswith("rlhf_toolkit."):
            continue
        other = name.split(".")[1]
        allowed = other == me or LEVEL[other] < LEVEL[me] or (me, other) in SIBLINGS
        assert allowed, f"{me} must not import {other}"


@BY_FILE
def test_only_distributed_knows_about_ranks(path: Path) -> None:
    if part_of(path) == "distributed":
        return
    assert foreign(path.read_text()) == []
    assert not re.search(r"torch\.distributed\.\w|init_process_group", path.read_text())


@BY_FILE
def test_only_trainers_subclass_trainer_and_only_runs_see_settings(path: Path) -> None:
    part, tree = part_of(path), ast.parse(path.read_text())
    bases = [ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    assert part == "trainers" or not any(base.endswith("Trainer") for base in bases)
    if part in ("runs", "settings", "cli"):
        return
    assert not any(name.startswith("rlhf_toolkit.settings") for name in imports(path.read_text()))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    arguments = [a for f in functions for a in (*f.args.args, *f.args.kwonlyargs) if a.annotation is not None]
    configs = [ast.unparse(a) for a in arguments if a.annotation and OUR_CONFIG.search(ast.unparse(a.annotation))]
    assert configs == [], "take the numbers that are needed"


@BY_FILE
def test_files_and_functions_stay_small_and_finished(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    assert not re.search(r"TODO|FIXME|NotImplementedError|except:\s*$", text, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def unescaped(source: str) -> list[str]:
    """Calls that write to a terminal what has not gone through ``texts``: of print, and of tqdm's write."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    bare = [call for call in calls if ast.unparse(call.func) == "print"]
    above_bars = [call for call in calls if re.fullmatch(r"tqdm\.write|.*\bbar\.write", ast.unparse(call.func))]
    bare += [call for call in above_bars if not ast.unparse(call.args[0]).startswith("printable(")]
    return [ast.unparse(call) for call in bare]


@BY_FILE
def test_whatever_reaches_a_terminal_goes_through_one_function(path: Path) -> None:
    assert part_of(path) == "texts" or unescaped(path.read_text()) == []


def test_these_rules_can_fail() -> None:
    source = "import deepspeed\nfrom torch import distributed\ndef f():\n    import torch.distributed as d"
    source += "\nfrom transformers.integrations.deepspeed import x\nfrom .errors import y"
    assert len(unescaped("print(x)\ntqdm.write(x)\nself.bar.write(f'{x}')\ntqdm.write(printable(x))\nprint()")) == 3
    names = ["deepspeed", "torch.distributed", "torch.distributed", "transformers.integrations.deepspeed.x"]
    assert sorted(foreign(source)) == names and ".errors.y" in imports(source)
    assert OUR_CONFIG.search("PPOConfig | None") and not OUR_CONFIG.search("LoraConfig")


def test_the_recipe_is_prose() -> None:
    """No branch but the script guard, no loop, no rank and no dtype."""
    recipe = (PACKAGE.parents[1] / "recipes" / "ppo.py").read_text()
    tree = ast.parse(recipe)
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    assert [ast.unparse(node.test) for node in guards] == ["__name__ == '__main__'"]
    assert not any(isinstance(node, (ast.For, ast.While)) for node in ast.walk(tree))
    assert not re.search(r"rank|dtype|cuda", recipe)
