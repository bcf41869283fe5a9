from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference_vectors import EVALUATORS, Case, differences, main, output_for
from tests.support.offenders import for_each

CHECKOUT = Path(__file__).parents[1]
STORED = CHECKOUT / "tests" / "data" / "reference_vectors"
SHARED = CHECKOUT.parent / "shared" / "reference" / "algorithms"


def case(**changes: Any) -> dict[str, Any]:
    """GAE by hand: gamma and lambda 1/2, delta (-2, 2, 0), so A = (-1.5, 2, 0) and returns A + V. The 7s are masked."""
    rewards, values, mask = [[1.0, 0.0, 8.0, 7.0]], [[4.0, 2.0, 8.0, 7.0]], [[1.0, 1.0, 1.0, 0.0]]
    raw = {
        "id": "by hand",
        "inputs": {"rewards": rewards, "values": values, "mask": mask},
        "params": {"gamma": 0.5, "lam": 0.5, "whiten": False},
        "expected": {"advantages_where_mask": [[-1.5, 2.0, 0.0, 0.0]], "returns_where_mask": [[2.5, 4.0, 8.0, 0.0]]},
    }
    return {**raw, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file of one case that passes."""
    return with_file(tmp_path, "advantages__gae", [case()])


def with_file(folder: Path, stem: str, cases: list[dict[str, Any]]) -> Path:
    """Write a file of vectors."""
    (folder / f"{stem}.json").write_text(json.dumps(cases))
    return folder


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What the checker ended with."""
    return capsys.readouterr().out.splitlines()[-1]


def test_a_case_by_hand_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert last_line(capsys) == "1 passed, 0 failed"


@for_each(
    "expected, message",
    [
        ({"advantages_where_mask": [[-1.5, 2.0, 0.0, 1e-3]]}, "advantages_where_mask differs by up to 0.001"),
        ({"returns_where_mask": [[2.5, 4.0001, 8.0, 0.0]]}, "returns_where_mask differs by up to 0.0001"),
        ({"returns_where_mask": [[2.5, 4.0, 8.0]]}, "returns_where_mask has shape (1, 4), expected (1, 3)"),
        ({"returns_where_mask": [[2.5, float("nan"), 8.0, 0.0]]}, "returns_where_mask differs by up to nan"),
        ({"loss": 1.0}, "loss is not computed"),
        ({"metric_kl": 1.0}, "expects nothing that could be compared"),
    ],
)
def test_a_wrong_expectation_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], expected: dict[str, Any], message: str
) -> None:
    with_file(folder, "advantages__gae", [case(), case(id="wrong", expected=expected)])
    assert main([str(folder)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("advantages__gae.json wrong {'gamma': 0.5") and printed[0].endswith(message)
    assert printed[-1] == "1 passed, 1 failed"


def test_a_wrong_metric_is_not_looked_at(folder: Path) -> None:
    right = case()["expected"]
    assert main([str(with_file(folder, "advantages__gae", [case(expected={**right, "metric_kl": 9.0})]))]) == 0


@pytest.mark.parametrize(("error", "status"), [(0.9e-5, 0), (1.2e-5, 1)])
def test_the_tolerance_is_relative(folder: Path, error: float, status: int) -> None:
    expected = {"returns_where_mask": [[2.5, 4.0, 8.0 * (1 + error), 0.0]]}
    assert main([str(with_file(folder, "advantages__gae", [case(expected=expected)]))]) == status


def test_a_case_that_raises_fails_and_the_others_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_file(folder, "advantages__gae", [case(id="bad", params={}), case()])
    assert main([str(folder)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "raised TypeError: gae() missing 2 required" in printed[0] and printed[-1] == "1 passed, 1 failed"


def test_an_unknown_file_fails_with_all_its_cases(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_file(folder, "policy_loss__kl_xyz", [case(), case(), case()])
    assert main([str(folder)]) == 1
    assert capsys.readouterr().out.splitlines() == ["unknown file: policy_loss__kl_xyz.json", "1 passed, 3 failed"]


def test_only_leaves_out_what_it_does_not_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_file(folder, "policy_loss__kl_xyz", [case()])
    with_file(folder, "kl__k1", [case(inputs={"logprobs": [0.5], "ref_logprobs": [0.75]}, expected={"value": [-0.25]})])
    with_file(folder, "value_loss", [case()])
    for words, count in ((["kl"], 1), (["gae"], 1), (["kl", "advantages__gae"], 2), (["advantages"], 1)):
        assert main([str(folder), "--only", *words]) == 0
        assert capsys.readouterr().out == f"{count} passed, 0 failed\n"


def test_only_mentions_an_unknown_file_and_does_not_count_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_file(folder, "advantages__xyz", [case()])
    assert main([str(folder), "--only", "advantages"]) == 0
    assert capsys.readouterr().out.splitlines() == ["unknown file: advantages__xyz.json", "1 passed, 0 failed"]


def test_where_mask_frees_what_stands_outside() -> None:
    outputs = {"advantages": torch.arange(4.0).unsqueeze(0)}
    inside = output_for("advantages_where_mask", outputs, Case.parse(case()))
    assert inside is not None
    assert inside.tolist() == [[0.0, 1.0, 2.0, 0.0]]
    assert output_for("advantages", outputs, Case.parse(case())) is outputs["advantages"]


@pytest.mark.parametrize("word", ["ga", "policy_loss", "kl"])
def test_only_with_a_word_that_names_no_known_file_is_an_error(folder: Path, word: str) -> None:
    with_file(folder, "policy_loss__kl_xyz", [case()])
    with pytest.raises(SystemExit, match=f"--only {word}: no known file"):
        main([str(folder), "--only", "gae", word])


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no \*\.json file"):
        main([str(tmp_path)])


def test_a_folder_without_a_case_does_not_pass(tmp_path: Path) -> None:
    assert main([str(with_file(tmp_path, "value_loss", []))]) == 1


@pytest.mark.parametrize(("expected", "status"), [(0.0, 0), (0.5, 1)])
def test_the_command_exits_with_the_verdict(tmp_path: Path, expected: float, status: int) -> None:
    raw = case(inputs={"logprobs": [1.0], "ref_logprobs": [1.0]}, expected={"value": [expected]})
    command = [sys.executable, "-m", "tests.reference_vectors", str(with_file(tmp_path, "kl__k3", [raw]))]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[-1] == ("0 passed, 1 failed" if status else "1 passed, 0 failed")


def test_the_stored_vectors_pass_and_cover_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.stem for path in STORED.glob("*.json")} == set(EVALUATORS)
    assert main([str(STORED)]) == 0
    assert last_line(capsys) == f"{len(EVALUATORS)} passed, 0 failed"


@for_each("stem", sorted(EVALUATORS))
def test_a_stored_case_with_any_of_its_numbers_changed_fails(tmp_path: Path, stem: str) -> None:
    (stored,) = json.loads((STORED / f"{stem}.json").read_text())
    compared = [key for key in stored["expected"] if not key.startswith("metric_")]
    for key in compared:
        wrong = torch.tensor(stored["expected"][key], dtype=torch.float64)
        wrong.view(-1)[0] += 2e-5 * max(1.0, wrong.view(-1)[0].abs().item())
        changed = {**stored, "expected": {**stored["expected"], key: wrong.tolist()}}
        assert main([str(with_file(tmp_path, stem, [changed]))]) == 1


@pytest.mark.parametrize("kind", ["advantages", "policy_loss"])
def test_no_family_passes_under_the_name_of_another(tmp_path: Path, kind: str) -> None:
    stems = [stem for stem in EVALUATORS if stem.startswith(f"{kind}__")]
    for mine, other in itertools.permutations(stems, 2):
        raw = json.loads((STORED / f"{mine}.json").read_text())
        assert differences(Case.parse(raw[0]), EVALUATORS[other]), f"{mine} passes as {other}"


def test_empty_rows_count_in_the_mean_of_geo_mean_alone() -> None:
    # One token, A = 1, d = 0: the loss of its row is -1. verl's geo_mean divides by all rows, other losses by one.
    numbers = {"logprobs": [[0.0], [0.0]], "old_logprobs": [[0.0], [0.0]], "advantages": [[1.0], [1.0]]}
    params = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "aggregation": "seq-mean-token-mean"}
    for name, expected in (("geo_mean", -0.5), ("gspo", -1.0), ("vanilla", -1.0)):
        raw = case(inputs={**numbers, "mask": [[1.0], [0.0]]}, params=params, expected={"loss": expected})
        assert differences(Case.parse(raw), EVALUATORS[f"policy_loss__{name}"]) == []


@pytest.mark.parametrize("folder", [STORED, *([SHARED] if SHARED.exists() else [])], ids=lambda path: path.parent.name)
def test_every_family_of_a_folder_is_known_and_passes(folder: Path) -> None:
    assert main([str(folder)]) == 0
