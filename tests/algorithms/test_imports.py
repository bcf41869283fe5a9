from __future__ import annotations

import ast
import sys
from pathlib import Path

import rlhf_toolkit.algorithms
from tests.support.offenders import for_each

MODULES = sorted(Path(rlhf_toolkit.algorithms.__file__).parent.glob("*.py"))


def imported(source: str) -> set[str]:
    """The dotted names that a module imports."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}


def is_pure(name: str) -> bool:
    """Whether ``algorithms`` may import ``name``: torch without its distribution, the standard library, the errors."""
    if name.startswith("torch."):
        return not name.startswith("torch.distributed")
    own = name == "rlhf_toolkit.errors" or name.startswith("rlhf_toolkit.algorithms")
    return own or name == "torch" or name.split(".")[0] in sys.stdlib_module_names


@for_each("module", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_torch_and_the_errors(module: Path) -> None:
    assert {name for name in imported(module.read_text()) if not is_pure(name)} == set()


def test_the_rule_can_fail() -> None:
    bad = {"torch.distributed", "transformers", "rlhf_toolkit.settings.configs"}
    source = (
        "import torch.distributed, json\nfrom transformers import Trainer\nfrom rlhf_toolkit.settings.configs import x"
    )
    assert {name for name in imported(source) if not is_pure(name)} == bad
