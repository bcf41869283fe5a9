"""Records check their shapes where they are born, and give back their rows."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from rlhf_toolkit.errors import DataError
from rlhf_toolkit.types import Experience, Prompt, PromptBatch, Rollout
from tests.support.offenders import for_each

ROWS, WIDTH, TOTAL = 3, 4, 7
PER_ROW = ("prompt_lengths", "response_lengths")
PER_TOKEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "drawn_logprobs", "values", "advantages", "returns")


def rollout() -> Rollout:
    tokens = torch.zeros(ROWS, WIDTH, dtype=torch.long)
    return Rollout(tokens, torch.ones(ROWS), torch.zeros(ROWS, WIDTH), torch.ones(ROWS, dtype=torch.bool))


def experience() -> Experience:
    numbers = {name: torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) + i for i, name in enumerate(PER_TOKEN)}
    return Experience(
        sequences=torch.arange(ROWS * TOTAL).view(ROWS, TOTAL),
        prompt_lengths=torch.tensor([3, 1, 2]),
        response_lengths=torch.tensor([4, 2, 1]),
        token_mask=torch.tensor([[True] * 4, [True] * 3 + [False], [True, False, False, False]]),
        response_mask=torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]]),
        **numbers,
    )


@pytest.mark.parametrize("name", ["lengths", "rollout_logprobs", "finished"])
def test_a_rollout_has_one_shape(name: str) -> None:
    misshapen: dict[str, Any] = {name: torch.zeros(ROWS + 1, WIDTH)}
    with pytest.raises(DataError, match=f"^{name} has shape .*, expected "):
        replace(rollout(), **misshapen)


@for_each("name", [*PER_ROW, *PER_TOKEN])
@for_each("wrong", [(ROWS, WIDTH + 1), (ROWS - 1, WIDTH), (ROWS, 1), (ROWS, WIDTH, 1), (1,)])
def test_an_experience_has_one_shape(name: str, wrong: tuple[int, ...]) -> None:
    expected = (ROWS,) if name in PER_ROW else (ROWS, WIDTH)
    with pytest.raises(DataError) as error:
        replace(experience(), **{name: torch.zeros(wrong)})
    assert str(error.value) == f"{name} has shape {wrong}, expected {expected}"


def test_sequences_have_as_many_rows() -> None:
    with pytest.raises(DataError, match=r"^sequences has shape \(2, 7\), expected \(3, 7\)"):
        replace(experience(), sequences=torch.zeros(ROWS - 1, TOTAL))


def test_every_field_of_an_experience_is_named_above() -> None:
    names = {field.name for field in fields(Experience)}
    assert names == {*PER_ROW, *PER_TOKEN, "sequences", "token_mask", "response_mask"}


def test_prompts_and_sample_numbers_go_together() -> None:
    prompt = Prompt(0, "a", (1,), {})
    assert len(PromptBatch((prompt, prompt), (0, 1))) == 2
    with pytest.raises(DataError, match="2 prompts but 1 sample numbers"):
        PromptBatch((prompt, prompt), (0,))


def test_an_experience_knows_its_rows_and_their_lengths() -> None:
    assert len(experience()) == ROWS
    assert experience().lengths() == [7, 3, 3]


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0])])
def test_rows_come_back_in_the_order_asked_for(index: Any) -> None:
    whole = experience()
    part = Experience.of({**whole.rows(index), "micro_batch": torch.zeros(2)})
    for field in fields(Experience):
        expected = torch.stack([getattr(whole, field.name)[2], getattr(whole, field.name)[0]])
        assert torch.equal(getattr(part, field.name), expected), field.name


def test_what_scoring_left_out_is_no_column_and_comes_back_as_none() -> None:
    part = replace(experience(), old_logprobs=None, ref_logprobs=None)
    columns = part.rows([1])
    assert not {"old_logprobs", "ref_logprobs"} & columns.keys()
    assert Experience.of(columns).old_logprobs is None and Experience.of(columns).ref_logprobs is None


def test_records_are_frozen() -> None:
    for record, name in ((experience(), "values"), (rollout(), "lengths"), (Prompt(0, "", (), {}), "index")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, 1)
