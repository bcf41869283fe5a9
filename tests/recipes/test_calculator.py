"""The calculator: what the tool says, what a response scores, and a tiny model that learns to use it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from recipes.calculator.make_prompts import HELD_OUT, TRAIN, rows
from recipes.calculator.tool import calculator, score, solved, value_of
from rlhf_toolkit import PPOTrainer
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt
from tests.support.chat_tokenizers import word_tokenizer
from tests.support.launch import ROOT
from tests.support.tiny import tiny_llama

FOLDER = ROOT / "recipes/calculator"
SIZES = {"prompts_per_rollout": 12, "responses_per_prompt": 16}
NUMBERS = [str(number) for number in range(7)]
WORDS = ("<user>", "<assistant>", "<tool>", "CALC:", "ANSWER:", "+", "error", *NUMBERS)


def response(*contents: str) -> list[dict[str, Any]]:
    return [{"role": "tool" if n % 2 else "assistant", "content": text} for n, text in enumerate(contents)]


def test_the_tool_works_out_sums_and_runs_nothing() -> None:
    good = {"12 + 30": "42", "2*(3-5)": "-4", " - 7 ": "-7", "007": "error", "2**9": "error", "1 +": "error"}
    assert {text: value_of(text) for text in good} == good
    assert value_of("*".join(["9" * 9] * 4)) == "error" and value_of("(" * 30 + ")" * 30) == "error"
    turns = [response("CALC: 12 + 30"), response("It is 42."), response("CALC: 1", "1", "ANSWER: 1")]
    assert calculator([], [], turns) == [{"role": "tool", "content": "42"}, None, None]


def test_the_page_shows_the_recipe_as_it_is() -> None:
    page = (ROOT / "docs/extending.md").read_text()
    assert all(inspect.getsource(function) in page for function in (calculator, solved, score))


def test_what_responses_score() -> None:
    cases = {
        ("It is 42.",): 0.0,
        ("CALC: 1 + 1", "2", "ANSWER: 42"): 0.2,
        ("CALC: 12 + 30", "42", "Well."): 0.5,
        ("CALC: 12 + 30", "42", "ANSWER: 42"): 1.0,
    }
    found = solved([], [], ["42"] * len(cases), [response(*case) for case in cases])
    assert found == pytest.approx(list(cases.values()))


@pytest.mark.parametrize("workers", [0, 1])
def test_rewards_get_the_turns_in_the_process_and_in_a_worker(workers: int) -> None:
    entry = {"function": f"{FOLDER}/tool.py:solved", **({"workers": workers} if workers else {})}
    rewards = Rewards([RewardSpec.parse(entry)])
    prompts = [Prompt(0, "12 + 30", (1,), {"answer": "42"}), Prompt(1, "1 + 1", (1,), {"answer": "2"})]
    turns = [response("CALC: 12 + 30", "42", "ANSWER: 42"), response("ANSWER: 2")]
    assert rewards.collect(prompts, ["a", "b"], [[1], [1]], turns).totals == [1.0, 0.0]
    rewards.submit(0, prompts[1], "CALC: 2", [1])
    assert rewards.collect(prompts[1:], ["CALC: 2"], [[1]]).totals == [0.0], "one turn, which nobody has answered"
    rewards.close()


def test_the_rows_are_those_that_the_script_writes() -> None:
    found = [json.loads(line) for name in ("train", "heldout") for line in (FOLDER / f"{name}.jsonl").open()]
    assert found == rows() and len({row["prompt"][-1]["content"] for row in found}) == TRAIN + HELD_OUT


@pytest.mark.thorough
def test_a_tiny_model_learns_to_call_the_tool(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(words=WORDS, pad="</s>")
    trainer = PPOTrainer(
        model=tiny_llama(vocab_size=len(tokenizer), initializer_range=0.1, eos_token_id=tokenizer.eos_token_id),
        processing_class=tokenizer,
        reward_funcs=solved,
        train_dataset=[
            {"prompt": f"{left} + {right}", "answer": str(left + right)} for left in range(4) for right in range(3)
        ],
        data={"max_prompt_tokens": 8},
        reward={"missing_eos_penalty": 0.3},
        rollout={"environment": calculator, "max_turns": 2, "max_turn_tokens": 6, "max_new_tokens": 20, **SIZES},
        ppo={"advantage": "grpo", "num_rollouts": 40, "mini_batches": 2, "kl_coef": 0.001, "entropy_coef": 0.01},
        policy_lr=1e-2,
        run={"output_dir": str(tmp_path / "run"), "wandb": "off"},
    )
    scores = trainer.train()["mean_raw_scores"]
    assert sum(scores[-10:]) / 10 > sum(scores[:10]) / 10 + 0.1, scores
