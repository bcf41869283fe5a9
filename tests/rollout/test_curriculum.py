"""Who chooses a rollout's prompts: a function, from what it is given, the same on every rank and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError, DataError
from rlhf_toolkit.rollout.curriculum import Curriculum, near_target
from rlhf_toolkit.rollout.dealing import LastMeans
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.types import Prompt
from tests.support.offenders import for_each
from tests.support.tiny import merged, write_task

PROMPTS = [Prompt(10 + i, f"p{i}", (i,), {}) for i in range(6)]


def seen(**scores: float) -> LastMeans:
    return LastMeans({name.removeprefix("p"): mean for name, mean in scores.items()})


def test_unseen_prompts_come_first_then_those_nearest_to_the_target() -> None:
    curriculum = Curriculum(near_target, PROMPTS, 3, seed=0, kwargs={"target": 0.4})
    assert len(set(curriculum.indices(0, seen()))) == 3
    scores = {"p10": 0.0, "p11": 0.45, "p12": 1.0, "p13": 0.3, "p14": 0.9}
    assert curriculum.indices(5, seen(**scores)) == [5, 1, 3]


def test_a_rollouts_choice_follows_from_its_number_and_the_scores() -> None:
    curriculum = Curriculum(near_target, PROMPTS, 4, seed=3)
    assert curriculum.indices(2, seen()) == curriculum.indices(2, seen())
    assert len({tuple(curriculum.indices(rollout, seen())) for rollout in range(8)}) > 3


@for_each("found", [[0, 1], [0, 1, 1], [0, 1, 6], [0, 1, -1], [0, 1, 2.0], [0, 1, 2, 3], None, 3])
def test_what_a_curriculum_may_not_give(found: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.curriculum gave .* it must give 3 different positions from 0 to 5"):
        Curriculum(lambda: found, PROMPTS, 3, seed=0).indices(0, seen())


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"data\.curriculum_kwargs\.goal: near_target has no such parameter"):
        Curriculum(near_target, PROMPTS, 3, seed=0, kwargs={"goal": 1})
    with pytest.raises(DataError, match="prompts_per_rollout=7 is more than the 6 prompts"):
        Curriculum(near_target, PROMPTS, 7, seed=0)
    with pytest.raises(ConfigError, match=r"data\.curriculum_kwargs is set but data\.curriculum is none"):
        experiment_from_dict({"data": {"train": "t", "curriculum_kwargs": {"target": 1}}})


CURRICULUM = '''

def hardest(*, rollout, count, prompts, scores):
    """Prompts with the lowest score last time, unseen ones first; writes down what it was given."""
    import json
    from pathlib import Path

    order = sorted(range(len(prompts)), key=lambda i: scores.get(prompts[i].index, -1.0))[:count]
    with Path(__file__).with_name("asked.jsonl").open("a") as file:
        file.write(json.dumps({"rollout": rollout, "scores": scores, "chosen": order}) + "\\n")
    return order
'''


def test_a_run_asks_with_the_scores_of_the_rollouts_before(tmp_path: Path) -> None:
    task = merged(write_task(tmp_path, prompts=12), {"data.curriculum": f"{tmp_path}/reward.py:hardest"})
    with (tmp_path / "reward.py").open("a") as file:
        file.write(CURRICULUM)
    run = prepare(experiment_from_dict(merged(task, {"run.samples": 100})))
    run.train()
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [each["rollout"] for each in asked] == [0, 1, 2] and asked[0]["scores"] == {}
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    text = {prompt.index: prompt.text for prompt in run.trainer.maker.source.prompts}
    first = {sample["prompt"]: sample["score"] for sample in samples if sample["rollout"] == 1}
    assert {text[int(index)]: score for index, score in asked[1]["scores"].items()} == pytest.approx(first)
    assert set(asked[1]["chosen"][:4]) == set(range(12)) - set(asked[0]["chosen"]), "the unseen ones"
