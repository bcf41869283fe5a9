"""docs/extending.md: its file outside the package runs as it stands, and so do its functions once they are inside."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_toolkit.rollout import shaping
from rlhf_toolkit.trainers import ppo_loss
from tests.support.forked import shared
from tests.support.launch import ROOT, run
from tests.support.tiny import merged, write_experiment, write_task

PAGE = (ROOT / "docs/extending.md").read_text()
FILE = "my_methods.py"
THERE = (
    "import os, runpy, sys; os.chdir(sys.argv[1]); del sys.argv[:2]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
NOTED = '''

import functools
import pathlib


def noted(function):
    """The function as it was; each call leaves a line."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with pathlib.Path(__file__).with_name("calls").open("a") as file:
            file.write(f"{function.__name__} {sorted(kwargs)}\\n")
        return function(*args, **kwargs)

    return call


ranked, penalised, mentions = noted(ranked), noted(penalised), noted(mentions)
'''


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


OUTSIDE = [text for text in blocks("python") if text.startswith(f"# {FILE}\n")]
LINES = [text for text in blocks("python") if not text.startswith("#")]


def without_head(text: str) -> str:
    """A function as it goes into a module that has its imports already."""
    return text[text.index("def ") :]


def task_of(folder: Path) -> dict[str, Any]:
    """The experiment of the page on a tiny model, with the page's dataset column."""
    task = write_task(folder)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    keywords = [f"w{i}" for i in range(14)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({**row, "keywords": keywords}) + "\n" for row in rows))
    (text,) = blocks("yaml")
    for section, settings in yaml.safe_load(text).items():
        task = merged(task, {f"{section}.{name}": value for name, value in settings.items()})
    return merged(task, {"ppo.num_rollouts": 2})


def trained(folder: Path, task: dict[str, Any], source: Path | None = None) -> dict[str, torch.Tensor]:
    """The policy of a run in ``folder``, where the package is that below ``source``, by default this checkout's."""
    experiment = write_experiment(folder / "run.yaml", merged(task, {"run.output_dir": str(folder / "run")}))
    recipe, arguments = str(ROOT / "recipes/ppo.py"), ("--config", str(experiment))
    if source is None:
        shared().run(recipe, *arguments, before=f"import os; os.chdir({str(folder)!r})").succeeded()
    else:
        command = [sys.executable, "-c", THERE, str(folder), recipe, *arguments]
        run(command, seconds=600, PYTHONPATH=f"{source}{os.pathsep}{ROOT}").succeeded()
    return load_file(folder / "run/policy/adapter_model.safetensors")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("outside")
    (folder / FILE).write_text("\n\n".join(OUTSIDE) + NOTED)
    return folder, trained(folder, task_of(folder))


def test_the_file_outside_the_package_trains(outside: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, policy = outside
    assert all(tensor.abs().max() > 1e-3 for name, tensor in policy.items() if "lora_B" in name), "nothing was trained"
    calls = Counter((folder / "calls").read_text().splitlines())
    names = Counter({"ranked ['groups', 'mask', 'power', 'rewards']": 2, "mentions ['keywords', 'most']": 2})
    assert names <= calls
    assert sum(n for call, n in calls.items() if call.startswith("penalised")) >= 4, "of each update"
    records = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    for record in records:
        assert -1 <= record["critic/advantages/min"] < 0 < record["critic/advantages/max"] <= 1
        assert "critic/vf_loss" not in record and 0 <= record["critic/raw_score/max"] <= 2


def test_its_functions_say_what_they_do() -> None:
    names: dict[str, Any] = {}
    exec("\n\n".join(OUTSIDE), names)
    rewards, mask = torch.tensor([[0.0, 3.0], [1.0, 0.0], [2.0, 9.0], [5.0, 0.0]]), torch.ones(4, 2, dtype=torch.bool)
    mask[2, 1] = mask[3, 1] = False
    advantages, _ = names["ranked"](rewards, mask, torch.tensor([7, 7, 7, 3]), power=2.0)
    assert advantages.tolist() == [[1, 1], [-1, -1], [0, 0], [0, 0]], "3 beats 2 beats 1, and nothing beats nobody"
    logprobs = torch.tensor([[0.5, 0.0]], requires_grad=True)
    loss = names["penalised"](logprobs, torch.zeros(1, 2), torch.tensor([[2.0, 1.0]]), mask[2:3], price=0.5)
    ratio = torch.tensor(0.5).exp().item()
    assert loss[0, 0].item() == pytest.approx(0.5 * (ratio - 1) ** 2 - 2 * ratio)
    assert names["mentions"](["p"], ["wave after wave"], keywords=[["wave", "salt"]], most=3.0, other=[1]) == [1.5]


# ---- inside the package ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package with the functions and lines of the page in it."""
    source = tmp_path_factory.mktemp("inside")
    shutil.copytree(ROOT / "src/rlhf_toolkit", source / "rlhf_toolkit", ignore=shutil.ignore_patterns("__pycache__"))
    estimator_line, loss_line, last_line = LINES
    estimator, loss, _ = map(without_head, OUTSIDE)
    loss = re.sub(r"    return .*\n$", last_line, loss)
    for module, table, function, line in (
        ("advantages", "ADVANTAGE_ESTIMATORS", estimator, estimator_line),
        ("policy_losses", "POLICY_LOSSES", loss, loss_line),
    ):
        path = source / f"rlhf_toolkit/algorithms/{module}.py"
        text, head = path.read_text(), re.search(rf"^{table}: .*{{\n", path.read_text(), flags=re.MULTILINE)
        assert head is not None and f"`{table}`" in PAGE and f"algorithms/{module}.py" in PAGE
        path.write_text(text[: head.start()] + f"{function}\n\n" + head[0] + line + text[head.end() :])
    yield source


def test_with_a_name_inside_the_package_they_give_the_same_run(
    outside: tuple[Path, dict[str, torch.Tensor]], inside: Path, tmp_path: Path
) -> None:
    (tmp_path / FILE).write_text(OUTSIDE[2])  # the reward stays where it is
    named = merged(task_of(tmp_path), {"ppo.advantage": "ranked", "ppo.policy_loss": "penalised"})
    policy, expected = trained(tmp_path, named, inside), outside[1]
    assert policy.keys() == expected.keys() and all(torch.equal(policy[name], expected[name]) for name in expected)


def test_inside_the_package_they_pass_its_tests(inside: Path) -> None:
    """All but the formula, which is to be written out a second time."""
    tests = [f"tests/algorithms/test_{name}.py" for name in ("advantages", "all_policy_losses")]
    chosen = ["-k", "(ranked or penalised) and not written_out", "-p", "no:cacheprovider", "-rp"]
    command = [sys.executable, "-m", "pytest", *tests, *chosen]
    output = run(command, seconds=600, PYTHONPATH=f"{inside}{os.pathsep}{ROOT}").succeeded().output
    for name in ("ranked", "penalised"):
        assert len(re.findall(rf"^PASSED tests/algorithms/.*{name}", output, flags=re.MULTILINE)) >= 4


# ---- what functions may take -----------------------------------------------------------------------------------------


def parameters(after: str) -> list[str]:
    """The first column of the table of parameters below a heading."""
    section = PAGE.partition(f"## {after}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)


def test_the_tables_have_every_parameter_there_is() -> None:
    assert set(parameters("An advantage estimator")) == set(shaping.OFFERED)
    assert set(parameters("A policy loss")) == set(ppo_loss.OFFERED) - {"selected"}  # only for losses with a chooser


# ---- what is touched inside the package ------------------------------------------------------------------------------

INSIDE = PAGE.partition("## What you touch when you add something to the toolkit itself\n")[2]
KINDS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", INSIDE, flags=re.MULTILINE | re.DOTALL))
TOUCHED = {kind: re.findall(r"^\| `([\w./-]+)` \|", text, flags=re.MULTILINE) for kind, text in KINDS.items()}
EXAMPLES = {
    "An estimator": "opo",
    "A loss with a knob of its own": "sapo",
    "A setting that several losses take": "dual_clip",
    "A reward": "think_answer_format",
    "A role": "reward",
    "A launch target": "zero2_4gpu.yaml",
}
"""One of each kind that is there already."""
ROLE_WORDS = r"\bREWARD\b|\breward_adapter\b|\bAdapterReward\b"
TRAINS_REWARD_MODELS = {f"src/rlhf_toolkit/{name}.py" for name in ("trainers/fine_tuner", "trainers/objectives")}
TRAINS_REWARD_MODELS |= {"src/rlhf_toolkit/runs/fine_tuning.py"}


def files_with(pattern: str) -> set[str]:
    """The files of the package, and the launch configs and pages, in which the pattern is found."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.py")]
    names = [
        str(path.relative_to(ROOT)) for path in [*files, ROOT / "README.md"] if re.search(pattern, path.read_text())
    ]
    return set(names)


def test_every_kind_has_a_table_of_files_that_exist() -> None:
    assert TOUCHED.keys() == EXAMPLES.keys()
    for kind, files in TOUCHED.items():
        assert len(files) == len(set(files)) >= 2, kind
        assert not [file for file in files if not (ROOT / file).is_file()], kind
        assert f"Look at `{EXAMPLES[kind]}`" in KINDS[kind]


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind not in ("A role", "A launch target")])
def test_no_file_of_the_package_that_names_the_example_is_left_out(kind: str) -> None:
    """Nor does a table name a file that the example is not in."""
    named = files_with(rf"\b{EXAMPLES[kind]}\b")
    in_package = {file for file in named if file.startswith("src/")}
    assert in_package == {file for file in TOUCHED[kind] if file.startswith("src/")}
    knob = {"tests/reference_vectors.py"}  # names the loss's knobs, not the loss
    assert {file for file in TOUCHED[kind] if not file.endswith(".json")} <= named | knob


def test_a_role_is_known_where_its_table_says() -> None:
    known = {file for file in files_with(ROLE_WORDS) if file.startswith("src/")} - TRAINS_REWARD_MODELS
    named = set(re.findall(r"`(src/[\w/]+\.py)`", KINDS["A role"]))
    assert known <= named, "a file that knows the role by name"


def test_a_launch_target_is_its_file_and_a_row() -> None:
    named = files_with(re.escape(EXAMPLES["A launch target"])) - {"docs/extending.md", "tests/docs/test_extending.py"}
    assert named == {"README.md"}
