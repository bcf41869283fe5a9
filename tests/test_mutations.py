"""Every mistake of ``tests/mutations.py`` is caught, none that should be there is missing, and the runner tells a
survivor from a caught one and both from an entry that proves nothing."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS
from rlhf_toolkit.algorithms.policy_losses import POLICY_LOSSES
from tests.mutation_runner import mutated
from tests.mutations import MUTATIONS, markdown
from tests.support.launch import run
from tests.support.offenders import for_each

ROOT = Path(__file__).parents[1]
EVERY_KIND = ("sign flipped", "index shifted", "mask dropped")


@pytest.mark.thorough
@pytest.mark.timeout(0)  # each mutation has a limit of its own
def test_no_mutation_survives() -> None:
    finished = run([sys.executable, "-m", "tests.mutations"], seconds=None)
    lines = finished.output.splitlines()
    wrong = "\n".join(line for line in lines if not line.startswith("caught "))
    assert finished.status == 0, wrong
    assert lines[-1] == f"{len(MUTATIONS)} mutations: {len(MUTATIONS)} caught", wrong


@for_each("name", [*ADVANTAGE_ESTIMATORS, *POLICY_LOSSES])
def test_every_estimator_and_loss_has_sign_index_and_mask(name: str) -> None:
    assert {f"{name}: {kind}" for kind in EVERY_KIND} <= {mutation.name for mutation in MUTATIONS}


def test_names_and_mistakes_are_there_once() -> None:
    assert max(Counter(mutation.name for mutation in MUTATIONS).values()) == 1
    texts = [mutated(mutation) for mutation in MUTATIONS]
    assert max(Counter(texts).values()) == 1
    assert not [path for path, text in texts if path.read_text() == text]


def test_the_page_shows_this_table() -> None:
    page = (ROOT / "docs/algorithms.md").read_text()
    section = page.split("## What the tests catch\n")[1].split("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert rows == markdown(MUTATIONS), "put the output of python -m tests.mutations --markdown there"


# ---- the runner ------------------------------------------------------------------------------------------------------

FAULTY = """
from tests import mutation_runner
from tests.mutation_runner import Mutation, verdicts

mutation_runner.SECONDS = 10
KL, TEST = "src/rlhf_toolkit/algorithms/kl.py", "tests/algorithms/test_kl.py::test_the_estimators_by_hand"
K1, OLD = f"{KL}:kl_k1", "logprobs - ref_logprobs"
TABLE = [
    Mutation("caught", K1, OLD, "ref_logprobs - logprobs", TEST),
    Mutation("changes nothing", K1, OLD, "logprobs - 1 * ref_logprobs", TEST),
    Mutation("found nowhere", K1, "no such text", "", TEST),
    Mutation("found often", KL, OLD, "0", TEST),
    Mutation("no such function", f"{KL}:kl_k9", OLD, "0", TEST),
    Mutation("not imported", "src/rlhf_toolkit/rollout/loader.py", "column[place]", "column", TEST),
    Mutation("crashes", K1, OLD, "undefined", TEST),
    Mutation("does not compile", K1, OLD, "(", TEST),
    Mutation("fails at import", KL, "K3_BOUND = 10.0", "K3_BOUND = 1 / 0", TEST),
    Mutation("never ends", K1, f"return {OLD}", "while True: pass", TEST),
]
for verdict in verdicts(TABLE, heavy=("torch", "pytest")):
    print(verdict.mutation.name, "|", verdict.outcome, "|", verdict.reason.replace(chr(10), " "))
for test in ("tests/algorithms/test_kl.py::test_no_such_test", "{FOLDER}/test_fails.py"):
    try:
        list(verdicts([Mutation("", K1, OLD, "0", test)], heavy=()))
    except SystemExit as error:
        print(str(error).splitlines()[-1])
"""
VERDICTS = {
    "caught": ("caught", "AssertionError"),
    "changes nothing": ("SURVIVED", ""),
    "found nowhere": ("DEFECT", "is found 0 times"),
    "found often": ("DEFECT", "is found 4 times"),
    "no such function": ("DEFECT", "kl_k9 is defined 0 times"),
    "not imported": ("DEFECT", "does not import src/rlhf_toolkit/rollout/loader.py"),
    "crashes": ("DEFECT", "raises NameError"),
    "does not compile": ("DEFECT", "SyntaxError"),
    "fails at import": ("DEFECT", "ZeroDivisionError"),
    "never ends": ("DEFECT", "ran out of time"),
}


@pytest.mark.thorough
def test_the_runner_calls_only_a_wrong_number_caught(tmp_path: Path) -> None:
    (tmp_path / "test_fails.py").write_text("def test_fails():\n    assert False\n")
    finished = run([sys.executable, "-c", FAULTY.replace("{FOLDER}", str(tmp_path))], seconds=600).succeeded()
    *lines, missing, failing = finished.output.splitlines()
    found = {name: rest for name, *rest in (line.split(" | ", 2) for line in lines)}
    assert found.keys() == VERDICTS.keys(), finished.output
    for name, (outcome, reason) in VERDICTS.items():
        assert found[name][0] == outcome and reason in found[name][1], found[name]
    assert missing == failing == "without a mutation these tests must pass"
