"""Twenty questions: what the user answers, what a game scores, and a tiny model that learns to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.twenty_questions.game import answer, found, game_master, score
from recipes.twenty_questions.make_prompts import HELD_OUT, NUMBERS, TRAIN, rows
from rlhf_toolkit import PPOTrainer
from tests.support.chat_tokenizers import word_tokenizer
from tests.support.launch import ROOT
from tests.support.tiny import tiny_llama

FOLDER = ROOT / "recipes/twenty_questions"
SIZES = {"prompts_per_rollout": 12, "responses_per_prompt": 16}
WORDS = ("<user>", "<assistant>", "ABOVE", "EQUALS", "Yes.", "No.", *map(str, range(1, 5)))
MOVES = st.tuples(st.sampled_from(["ABOVE", "EQUALS"]), st.integers(0, 20))


def test_the_user_answers_questions_and_wrong_numbers_and_ends_at_the_right_one() -> None:
    yes, no = {"role": "user", "content": "Yes."}, {"role": "user", "content": "No."}
    about_7 = {
        "ABOVE 6": yes,
        "ABOVE 7": no,
        "EQUALS 8": no,
        "EQUALS 7": None,
        "Hm.": None,
        "EQUALS many": None,
    }
    assert {text: answer(text, 7) for text in about_7} == about_7
    turns = [[{"role": "assistant", "content": text}] for text in about_7]
    assert game_master([], [], turns, secret=[7] * len(turns)) == list(about_7.values())


def played(secret: int, moves: list[tuple[str, int]]) -> list[dict[str, Any]]:
    messages = list[dict[str, Any]]()
    for words, number in moves:
        messages.append({"role": "assistant", "content": f"{words} {number}"})
        said = answer(messages[-1]["content"], secret)
        if said is None:
            break
        messages.append(said)
    return messages


@given(st.integers(1, 16), st.lists(MOVES, min_size=1, max_size=6))
def test_a_question_is_worth_something_where_it_rules_numbers_out(secret: int, moves: list[tuple[str, int]]) -> None:
    messages = played(secret, moves)
    left, worth = set(range(1, 17)), 0.0
    for words, number in moves[: sum(message["role"] == "assistant" for message in messages)]:
        if words == "EQUALS":
            worth += number == secret
            continue
        kept = {each for each in left if (each > number) == (secret > number)}
        worth += 0.1 * (kept != left and bool(left - kept))
        left = kept
    assert score(messages, 1, 16, secret) == pytest.approx(worth)


def test_who_halves_what_is_left_names_every_number_in_time() -> None:
    for secret in range(1, NUMBERS + 1):
        low, high, moves = 1, NUMBERS, list[tuple[str, int]]()
        while low < high:
            middle = (low + high) // 2
            moves.append(("ABOVE", middle))
            low, high = (middle + 1, high) if secret > middle else (low, middle)
        messages = played(secret, [*moves, ("EQUALS", low)])
        assert sum(message["role"] == "assistant" for message in messages) == 5 and messages[-1]["role"] == "assistant"
        assert found([], [], [1], [NUMBERS], [secret], [messages]) == pytest.approx([1.4])


def test_the_rows_are_those_that_the_script_writes() -> None:
    written = [json.loads(line) for name in ("train", "heldout") for line in (FOLDER / f"{name}.jsonl").open()]
    assert written == rows() and len({(row["low"], row["secret"]) for row in written}) == TRAIN + HELD_OUT
    assert all(row["low"] <= row["secret"] <= row["high"] for row in written)


@pytest.mark.thorough
def test_a_tiny_model_learns_to_ask(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(words=WORDS, pad="</s>")
    trainer = PPOTrainer(
        model=tiny_llama(vocab_size=len(tokenizer), initializer_range=0.1, eos_token_id=tokenizer.eos_token_id),
        processing_class=tokenizer,
        reward_funcs=found,
        train_dataset=[
            {"prompt": f"{number}", "low": 1, "high": 4, "secret": secret}
            for number, secret in ((a, b) for a in range(1, 4) for b in range(1, 5))
        ],
        data={"max_prompt_tokens": 8},
        reward={"missing_eos_penalty": 0.1},
        rollout={"environment": game_master, "max_turns": 4, "max_turn_tokens": 6, "max_new_tokens": 40, **SIZES},
        ppo={"advantage": "grpo", "num_rollouts": 60, "mini_batches": 2, "kl_coef": 0.001, "entropy_coef": 0.01},
        policy_lr=1e-2,
        run={"output_dir": str(tmp_path / "run"), "wandb": "off"},
    )
    scores = trainer.train()["mean_raw_scores"]
    assert sum(scores[-10:]) / 10 > sum(scores[:10]) / 10 + 0.1, scores
