"""The scripts that write prompts of countdown, GSM8K and reasoning-gym: same bytes, disjoint files, right solutions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.countdown import make_prompts as countdown_prompts
from recipes.gsm8k import make_prompts as gsm8k_prompts
from recipes.reasoning_gym import make_prompts as gym_prompts
from rlhf_toolkit.data.prompts import RESERVED_COLUMNS
from rlhf_toolkit.rewards.verifiable import countdown, gsm8k, reasoning_gym
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.loading import load_experiment
from tests.support.offenders import for_each

ROOT = Path(countdown_prompts.__file__).parents[2]
Rows = list[dict[str, Any]]
Files = dict[str, Rows]
NAMES = ("train.jsonl", "heldout.jsonl")


def read(folder: Path) -> Files:
    return {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in NAMES}


def columns(rows: Rows) -> dict[str, Any]:
    """What the reward gets: every column but the prompt."""
    assert not set(rows[0]) & set(RESERVED_COLUMNS)
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / script / "make_prompts.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---- countdown -------------------------------------------------------------------------------------------------------


def test_countdown_writes_problems_whose_solutions_are_right(tmp_path: Path) -> None:
    countdown_prompts.write(tmp_path, countdown_prompts.split(train=300, heldout=50, seed=1))
    files = read(tmp_path)
    assert {name: len(rows) for name, rows in files.items()} == {"train.jsonl": 300, "heldout.jsonl": 50}
    for rows in files.values():
        responses = [f"<think>hm</think> <answer>{row['solution']}</answer>" for row in rows]
        given = columns(rows)
        assert countdown(["p"] * len(rows), responses, **given) == [1.0] * len(rows)
        assert {len(row["numbers"]) for row in rows} == {3, 4}
        assert all(str(row["target"]) in row["prompt"] and str(row["numbers"]) in row["prompt"] for row in rows)
        assert all(10 <= row["target"] <= 99 for row in rows)
        signs = [{sign for sign in "+-*/" if f" {sign} " in row["solution"]} for row in rows]
        assert set.union(*signs) == set("+-*/")


def test_countdown_example_in_the_prompt_is_a_right_answer() -> None:
    assert countdown(["p"], [countdown_prompts.PROMPT], numbers=[[1, 2, 3]], target=[1]) == [1.0]


def test_countdown_problems_differ_whatever_their_order() -> None:
    files = countdown_prompts.split(train=2000, heldout=200, seed=0)
    keys = [(row["target"], tuple(sorted(row["numbers"]))) for rows in files.values() for row in rows]
    assert len(set(keys)) == len(keys) == 2200


# ---- gsm8k -----------------------------------------------------------------------------------------------------------

PROBLEMS = [
    {"question": "Ann has 3 bags of 4 apples. How many?", "answer": "3 * 4 = <<3*4=12>>12 apples.\n#### 12"},
    {"question": "A car costs $1,200 and Bo pays half. How much?", "answer": "1200 / 2 = 600\n#### 600"},
    {"question": "A town of 900 grows by 350. How many live there?", "answer": "900 + 350 = 1250\n#### 1,250"},
    {"question": "It was 3 degrees and fell by 5. What is it now?", "answer": "3 - 5 = -2\n#### -2"},
    {"question": "Half of 5 is what?", "answer": "5 / 2 = 2.5\n#### 2.5"},
]
TEST = [{"question": "Cy reads 7 pages a day for 6 days. How many?", "answer": "7 * 6 = 42\n#### 42"}]


def lines(path: Path, problems: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def test_gsm8k_from_a_folder(tmp_path: Path) -> None:
    """A question of the test file that stands in the training file, too, is held out alone."""
    lines(tmp_path / "source/train.jsonl", [*PROBLEMS, PROBLEMS[0], TEST[0]])
    lines(tmp_path / "source/test.jsonl", TEST)
    done = run("gsm8k", "--source", str(tmp_path / "source"), "--to", str(tmp_path / "to"))
    assert done.returncode == 0 and "train.jsonl: 5 rows" in done.stdout and "left out as repeated: 2" in done.stdout
    files = read(tmp_path / "to")
    assert [row["answer"] for row in files["train.jsonl"]] == ["12", "600", "1250", "-2", "2.5"]
    instruction = 'Let\'s think step by step and output the final answer after "####".'
    assert [row["prompt"] for row in files["heldout.jsonl"]] == [f"{TEST[0]['question']} {instruction}"]
    for rows in files.values():
        assert gsm8k(["p"] * len(rows), [row["solution"] for row in rows], **columns(rows)) == [1.0] * len(rows)
        assert gsm8k(["p"] * len(rows), ["#### 13"] * len(rows), **columns(rows)) == [0.0] * len(rows)


def test_gsm8k_from_the_hubs_layout(tmp_path: Path) -> None:
    """Parquet in the folder `main`, beside the other configuration of the dataset."""
    from datasets import Dataset

    for config, problems in (("main", PROBLEMS), ("socratic", PROBLEMS[:1])):
        (tmp_path / config).mkdir()
        Dataset.from_list(problems).to_parquet(tmp_path / config / "train-00000-of-00001.parquet")
        Dataset.from_list(TEST).to_parquet(tmp_path / config / "test-00000-of-00001.parquet")
    train, heldout = gsm8k_prompts.load(str(tmp_path), heldout=0, seed=0)
    assert (train, heldout) == (PROBLEMS, TEST)


def test_gsm8k_from_one_file_draws_what_is_held_out(tmp_path: Path) -> None:
    lines(tmp_path / "all.jsonl", PROBLEMS)
    draws = [gsm8k_prompts.load(str(tmp_path / "all.jsonl"), heldout=2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    for train, heldout in draws:
        assert len(heldout) == 2 and [p for p in PROBLEMS if p in train or p in heldout] == PROBLEMS
        assert not [problem for problem in train if problem in heldout]
    assert draws[0] == draws[1] and any(draw != draws[0] for draw in draws)


@for_each(
    "name, text, message",
    [
        ("nowhere", None, "needs train* and test* files"),
        ("rows.txt", "x", "none of .parquet, .jsonl, .json"),
        ("rows.jsonl", "no json", "cannot read"),
        ("rows.jsonl", '{"question": "q", "answer": "42"}\n' * 3, "is no problem of GSM8K"),
        ("rows.jsonl", '{"question": "", "answer": "#### 42"}\n' * 3, "is no problem of GSM8K"),
        ("rows.jsonl", '{"question": "q", "answer": "#### many"}\n' * 3, "is no problem of GSM8K"),
        ("rows.jsonl", '{"question": "q", "answer": "#### 4"}\n' * 2, "leaves none of 2 problems"),
    ],
)
def test_gsm8k_says_in_one_line_what_is_wrong(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    done = run("gsm8k", "--source", str(tmp_path / name), "--heldout", "2", "--to", str(tmp_path / "to"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("make_prompts: ") and message in last
    assert not (tmp_path / "to").exists()


# ---- reasoning-gym ---------------------------------------------------------------------------------------------------


@for_each("dataset", ["chain_sum", "gcd", "number_sorting", "knights_knaves", "arc_agi", "time_intervals"])
def test_gym_writes_items_whose_answers_are_right(dataset: str, tmp_path: Path) -> None:
    gym_prompts.write(
        tmp_path, gym_prompts.split(dataset, {}, train=20, heldout=5, seed=3, template="Q: {question}\nA:")
    )
    files = read(tmp_path)
    assert {name: len(rows) for name, rows in files.items()} == {"train.jsonl": 20, "heldout.jsonl": 5}
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(set(prompts)) == 25 and all(text.startswith("Q: ") and text.endswith("\nA:") for text in prompts)
    for rows in files.values():
        answers = [json.loads(row["entry"])["answer"] for row in rows]
        assert reasoning_gym(["p"] * len(rows), answers, **columns(rows)) == [1.0] * len(rows)


def test_gym_files_are_what_the_script_writes(tmp_path: Path) -> None:
    done = run("reasoning_gym", "--to", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (ROOT / "recipes/reasoning_gym" / name).read_bytes()
    files = read(tmp_path)
    answers = [json.loads(row["entry"])["answer"] for row in files["train.jsonl"]]
    rows = files["train.jsonl"]
    assert reasoning_gym(["p"] * len(rows), answers, exact=True, **columns(rows)) == [1.0] * len(rows)
    assert len({row["prompt"] for each in files.values() for row in each}) == 512 + 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "chain_sums"], "cannot build chain_sums"),
        (["--dataset", "gcd", "--config", '{"nonsense": 1}'], "cannot build gcd"),
        (["--dataset", "gcd", "--config", '{"min_numbers": 0}'], "cannot build gcd"),
        (["--config", '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'], "200 distinct prompts"),
    ],
)
def test_gym_says_in_one_line_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run("reasoning_gym", *arguments, "--to", str(tmp_path / "to"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("make_prompts: ") and message in last
    assert not (tmp_path / "to").exists()


# ---- all of them -----------------------------------------------------------------------------------------------------

SPLITS: dict[str, Callable[[int], Files]] = {
    "countdown": lambda seed: countdown_prompts.split(train=40, heldout=10, seed=seed),
    "reasoning_gym": lambda seed: gym_prompts.split("chain_sum", {}, train=40, heldout=10, seed=seed),
}


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_the_same_seed_gives_the_same_rows_and_another_gives_others(name: str) -> None:
    first, again, other = (SPLITS[name](seed) for seed in (0, 0, 1))
    assert first == again
    shared = {row["prompt"] for row in first["train.jsonl"]} & {row["prompt"] for row in other["train.jsonl"]}
    assert len(shared) < 40
    assert not {row["prompt"] for row in first["train.jsonl"]} & {row["prompt"] for row in first["heldout.jsonl"]}


KINDS = {"sft": SFTExperiment, "reward_model": RewardExperiment, "dpo": DPOExperiment}


@for_each("yaml", sorted(ROOT.glob("recipes/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_can_be_loaded(yaml: Path) -> None:
    """Prompts lie beside the recipe, beside another of the same task, or where ``recipes/gold_reward/run.py`` puts what
    it makes."""
    experiment: Any = load_experiment(str(yaml), {}, KINDS.get(yaml.stem, Experiment))
    made = yaml.parent.name == "gold_reward"
    task = {"qlora": "gsm8k"}.get(yaml.parent.name, yaml.parent.name)
    folder = f"runs/{task}/data/" if made else f"recipes/{task}/"
    files = {path and path.removeprefix(folder) for path in (experiment.data.train, experiment.data.evaluation)}
    expected = {
        "sft": {"examples.jsonl", None},
        "reward_model": {"pairs.jsonl", "pairs_heldout.jsonl"},
        "dpo": {"pairs.jsonl", "pairs_heldout.jsonl"},
    }
    assert files == expected.get(yaml.stem, {"train.jsonl", "heldout.jsonl"})
    assert experiment.run.output_dir.startswith("runs/")
