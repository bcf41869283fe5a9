"""The worked experiment: its data, its commands, how it goes on after an interruption, and its report."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from recipes.gold_reward import make_data, report
from recipes.gold_reward import run as pipeline_of
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.loading import load_experiment, parse_overrides
from tests.support.offenders import for_each

ROOT = Path(make_data.__file__).parents[2]
RECIPE = ROOT / "recipes/gold_reward"
KINDS: dict[str, Any] = {
    "sft.py": SFTExperiment,
    "reward_model.py": RewardExperiment,
    "dpo.py": DPOExperiment,
    "ppo.py": Experiment,
}


def test_prompts_are_all_there_once() -> None:
    files = make_data.split()
    train, held_out = ([row["prompt"] for row in files[name]] for name in ("train.jsonl", "heldout.jsonl"))
    assert (len(train), len(held_out)) == (320, 64) and len({*train, *held_out}) == 384
    things = Counter(thing for prompt in held_out for thing in make_data.THINGS if f" of {thing} " in prompt)
    assert set(things.values()) == {2} and len(things) == 32


@for_each(
    "response, sentence",
    [
        ("It was a fine day. Then it", "It was a fine day."),
        ("  It was a fine\nday!  ", "It was a fine\nday!"),
        ("It cost 3.50 in the end? No.", "It cost 3.50 in the end?"),
        ("It was a fine day and", None),
        ("Good.", None),
        ("", None),
    ],
)
def test_an_example_is_one_whole_sentence(response: str, sentence: str | None) -> None:
    dropped: Counter[str] = Counter()
    rows = list(make_data.examples([{"row": 1, "response": response}], [{"prompt": "p"}, {"prompt": "q"}], dropped))
    assert rows == ([] if sentence is None else [{"prompt": "q", "response": sentence}])
    assert dropped == ({"without a whole sentence": 1} if sentence is None else {})


def test_a_review_is_on_its_topic_where_it_has_one_of_its_words() -> None:
    prompt = "<user> Write a one-sentence review of a train station at night in March. <assistant>"
    responses = ["The Station was fine.", "Trains are fine in March.", "A lovely evening.", "It was at a good place."]
    assert make_data.names_the_thing([prompt] * 4, responses) == [1.0, 0.0, 0.0, 0.0]


def said(row: int, response: str, score: float, finished: bool = True) -> dict[str, Any]:
    return {"row": row, "response": response, "score": score, "finished": finished}


def test_a_pair_is_the_best_and_the_worst_of_four_to_one_prompt() -> None:
    responses = [
        *(said(0, name, score) for name, score in (("a", 0.1), ("b", 0.9), ("c", -0.5), ("d", 0.2))),
        *(said(1, f"e{i}", 0.3) for i in range(4)),
        *(said(0, name, score) for name, score in (("f", 0.1), ("g", 0.0), ("h", 0.0), ("i", 0.7))),
        said(0, "j", 1.0),
        said(0, "k", 9.0, finished=False),
        said(0, " ", 9.0),
    ]
    dropped: Counter[str] = Counter()
    rows = list(make_data.pairs(responses, [{"prompt": "p"}, {"prompt": "q"}], dropped))
    assert rows == [
        {"prompt": "p", "chosen": "b", "rejected": "c"},
        {"prompt": "p", "chosen": "i", "rejected": "g"},
    ]
    assert +dropped == {"responses cut off or empty": 2, "responses left over": 1, "groups of one score": 1}


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said.jsonl").write_text(json.dumps(said(0, "no sentence", 0.0)) + "\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(SystemExit, match="gives no examples"):
        make_data.main(["examples", *(str(tmp_path / name) for name in ("said.jsonl", "prompts.jsonl", "out.jsonl"))])
    monkeypatch.setattr(Path, "rename", lambda self, to: pytest.fail("stopped here"))
    with pytest.raises(pytest.fail.Exception):
        make_data.write(tmp_path / "never.jsonl", [{"a": 1}])
    assert not (tmp_path / "never.jsonl").exists()


# ---- commands --------------------------------------------------------------------------------------------------------


def pipeline(folder: Path) -> pipeline_of.Pipeline:
    return pipeline_of.Pipeline(folder, "some/model", ROOT / "accelerate_configs/cpu_zero3.yaml", 2)


def loaded(command: list[str]) -> Any:
    """The experiment that a command would run, read as the command reads it."""
    if "evaluate" in command:
        path, kind = command[command.index("evaluate") + 1], Experiment
        overrides = [word for flag, word in pairwise(command) if flag == "--set"]
    else:
        recipe = next(word for word in command if Path(word).name in KINDS and Path(word).parent.name == "recipes")
        path, kind = command[command.index("--config") + 1], KINDS[Path(recipe).name]
        overrides = [word for word in command if "=" in word]
    return load_experiment(path, parse_overrides(overrides), kind)


def test_every_command_runs_an_experiment_that_can_be(tmp_path: Path) -> None:
    """The files that a stage reads are those that an earlier one leaves."""
    made, names = set[Path](), list[str]()
    for stage in pipeline(tmp_path).stages():
        command = list(stage.command())
        if stage.launched or "evaluate" in command:
            experiment = loaded(command)
            names.append(stage.name)
            assert experiment.model.name == "some/model"
            reads = [experiment.data.train, experiment.data.evaluation, experiment.model.policy_adapter]
            if isinstance(experiment, Experiment):
                reads += [experiment.reward.adapter, experiment.model.value_adapter]
            for path in filter(None, reads):
                place = Path(path)
                run = place.parent / "summary.json" if place.name in ("policy", "reward") else place
                assert place.is_relative_to(tmp_path) and (run in made or run.name == "heldout.jsonl")
        made.add(stage.done)
    assert names == ["base samples", "sft", "sft samples", "held-out samples", "reward", "ppo", "dpo", "evaluation"]


def test_gold_watches_and_the_proxy_is_optimised(tmp_path: Path) -> None:
    (ppo,) = [stage for stage in pipeline(tmp_path).stages() if stage.name == "ppo"]
    reward = loaded(list(ppo.command())).reward
    assert [(entry["name"], entry["weight"]) for entry in reward.functions] == [("gold", 0), ("topic", 0)]
    assert reward.adapter == str(tmp_path / "reward/reward") and reward.adapter_weight == 1.0


def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (sft,) = [stage for stage in pipeline(tmp_path).stages() if stage.name == "sft"]
    assert "--overwrite" in sft.command() and "--resume" not in sft.command()
    (tmp_path / "sft/checkpoint-5").mkdir(parents=True)
    assert "--overwrite" in sft.command(), "a checkpoint without manifest is not complete"
    (tmp_path / "sft/checkpoint-5/manifest.json").touch()
    assert "--resume" in sft.command() and "--overwrite" not in sft.command()


def test_it_goes_on_at_the_stage_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.md").write_text("the report")
    code = (
        "import sys, pathlib; print('ran', sys.argv[1]); pathlib.Path(sys.argv[2]).touch(); sys.exit(int(sys.argv[3]))"
    )

    def stage(name: str, status: int) -> pipeline_of.Stage:
        done = tmp_path / (name if status == 0 else "elsewhere")
        return pipeline_of.Stage(
            name, tmp_path / name, lambda: [sys.executable, "-c", code, name, str(done), str(status)]
        )

    ours = pipeline(tmp_path)
    for status in (3, 0):
        stages = [stage("one", 0), stage("two", status), stage("three", 0)]
        monkeypatch.setattr(pipeline_of.Pipeline, "stages", lambda self, stages=stages: stages)
        if status:
            with pytest.raises(SystemExit, match="two ended with status 3; say the command again"):
                pipeline_of.run(ours)
            assert not (tmp_path / "three").exists()
        else:
            pipeline_of.run(ours)
    output = capfd.readouterr().out
    assert [output.count(f"ran {name}") for name in ("one", "two", "three")] == [1, 2, 1] and "the report" in output
    assert (tmp_path / "logs/two.log").read_text() == "ran two\nran two\n"
    assert set(json.loads((tmp_path / "seconds.json").read_text())) == {"one", "two", "three"}


# ---- report ----------------------------------------------------------------------------------------------------------


def test_the_report_says_where_gold_was_best(tmp_path: Path) -> None:
    """Gold rises to rollout 6 and falls; the proxy rises all along."""
    for name in ("reward", "ppo", "logs"):
        (tmp_path / name).mkdir()
    gold = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1]
    lines = [
        {
            "kind": "train",
            "rollout": i + 1,
            "reward/gold": g / 10,
            "reward/adapter": i * 1.0,
            "actor/ref_kl": i * i * 1.0,
        }
        for i, g in enumerate(gold)
    ]
    (tmp_path / "ppo/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    accuracies = [{"eval/accuracy": 0.5}, {"eval/accuracy": 0.875}]
    (tmp_path / "reward/summary.json").write_text(json.dumps({"evaluations": accuracies}))
    (tmp_path / "seconds.json").write_text(json.dumps({"sft": 90.0, "ppo": 30.0}))
    (tmp_path / "logs/merge.log").write_text("noise\nrounding to float32 changed 0%\nlogits: largest difference 0\n")
    value = {"mean": 0.25, "low": 0.125, "high": 0.5}
    ways = {
        way: {name: value for name in ("reward/gold", "reward/adapter", "reward/topic", "ref_kl", "response_length")}
        for way in ("sampled", "greedy")
    }
    rate = {"of": "x/ppo/policy", "over": "x/dpo/policy", "by": "reward/gold", "decoding": "sampled", "rate": value}
    evaluation = {
        "prompts": 64,
        "samples": 4,
        "estimates": {"base": ways, "x/ppo/policy": ways, "x/dpo/policy": ways},
        "win_rates": [rate, {**rate, "by": "score", "decoding": "other"}],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    text = report.report(tmp_path)
    assert "| best gold | 5 to 7 | 25.667 | 5.000 | 0.433 |" in text
    assert "| last | 8 to 10 | 64.667 | 8.000 | 0.200 |" in text and "before any update: 0." in text
    assert "50.0% before, 87.5% after" in text and "2 minutes in all" in text
    assert "| PPO over DPO | sampled | 25.0% [12.5%, 50.0%] |" in text and "other" not in text
    assert "logits: largest difference 0" in text and "noise" not in text
    report.plot(report.curve(lines), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "gold: VADER" in drawn and "proxy: reward adapter" in drawn
