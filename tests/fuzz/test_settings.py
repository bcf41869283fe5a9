"""The configuration fuzz in a short form, and what it must be able to find."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import settings as module
from tests.fuzz.cases import Case, base, make
from tests.fuzz.play import ACCEPTED, BARE, DIED, HUNG, RAN, REFUSED, Outcome, nested, outcome
from tests.fuzz.settings import LEAST_TRIES, Table
from tests.fuzz.values import KINDS, LEFT_ALONE, LEGAL, knobs, mistake
from tests.support.forked import shared
from tests.support.launch import ROOT


def test_some_cases_of_every_kind() -> None:
    """In a fork of the process that has imported everything, which forks for each case."""
    finished = shared().run(str(ROOT / "tests/fuzz/settings.py"), "--count", "24", "--seed", "7", seconds=500)
    finished.succeeded()
    assert finished.output.rstrip().endswith("24 passed, 0 failed")
    assert "ran" in finished.output and "refused" in finished.output


def test_a_case_is_made_of_its_seed_and_number_alone() -> None:
    assert [repr(make(3, number)) for number in range(50)] == [repr(make(3, number)) for number in range(50)]
    made = [make(3, number) for number in range(200)]
    assert {case.kind for case in made} == set(KINDS)
    assert Counter(case.shape for case in made).keys() == {"legal", "border", "mistake", "rows"}
    assert repr(made[0].changes) != repr(make(4, 0).changes)


def test_every_knob_has_legal_values_or_is_the_cases_own() -> None:
    known = {name for kind in KINDS for name in knobs(kind)}
    missing = {name for name in known if name not in LEGAL and name not in LEFT_ALONE}
    assert not missing, f"give {sorted(missing)} values in tests/fuzz/values.py"
    assert not set(LEGAL) - known


@pytest.mark.parametrize(
    ("left", "status", "expected"),
    [
        (None, None, HUNG),
        (None, 9, DIED),
        ('{"how": "ran", "text": "", "left": ""}', 0, ACCEPTED),
        ('{"how": "refused", "text": "", "left": ""}', 0, REFUSED),
        ('{"how": "bare traceback", "text": "", "left": ""}', 0, BARE),
    ],
)
def test_what_a_wrong_case_may_end_in(tmp_path: Path, left: str | None, status: int | None, expected: str) -> None:
    if left is not None:
        (tmp_path / "outcome.json").write_text(left)
    case = Case(0, "ppo", "mistake", {**base("ppo"), "ppo.gamma": 7}, [], wrong="ppo.gamma")
    assert outcome(case, tmp_path, status).how == expected


def test_a_setting_that_never_changes_anything_is_a_failure() -> None:
    table = Table()
    table.tried.update({"ppo.gamma": LEAST_TRIES, "ppo.kl_coef": LEAST_TRIES, "run.name": LEAST_TRIES, "run.seed": 3})
    table.differed.update({"ppo.kl_coef": 1})
    assert table.idle() == ["ppo.gamma"]
    table.add(make(0, 0), Outcome(BARE))
    table.add(make(0, 1), Outcome(RAN))
    assert len(table.failures) == 1 and sum(table.counts.values()) == 2


def test_paths_take_the_place_of_their_names() -> None:
    case = Case(0, "ppo", "legal", {"model.name": "HERE/model", "reward.functions": [{"function": "HERE/p.py:f"}]})
    assert nested(case, {"HERE": "/x"}) == {
        "model": {"name": "/x/model"},
        "reward": {"functions": [{"function": "/x/p.py:f"}]},
    }


def test_a_process_that_hangs_is_ended_at_its_limit() -> None:
    sleeper = subprocess.Popen(["sleep", "100"], start_new_session=True)
    assert module._ended(sleeper.pid, late=False) == ""
    assert module._ended(sleeper.pid, late=True) == HUNG
    sleeper.returncode = -9  # it has been waited for


def test_mistakes_are_mistakes() -> None:
    """Each is refused by the setting's own section, or by its type, before any other rule is looked at."""
    import random

    from rlhf_toolkit.errors import ConfigError
    from rlhf_toolkit.settings.loading import experiment_from_dict

    chance = random.Random(0)
    for kind, classes in KINDS.items():
        for name, (setting, hint) in knobs(kind).items():
            section, _, key = name.partition(".")
            for _ in range(8):
                value = mistake(setting, hint, chance)
                sections = nested(Case(0, kind, "", {**base(kind), name: value}), {})
                with pytest.raises(ConfigError) as caught:
                    experiment_from_dict(sections, classes)  # type: ignore[type-var]
                assert f"{section}.{key}" in str(caught.value), (name, value, str(caught.value))
