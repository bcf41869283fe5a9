"""The decode loop: where a row's tokens come from, where they end, and that its company does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import SlotCache
from rlhf_toolkit.rollout import decoding, prefill
from rlhf_toolkit.rollout.decoding import Sampling, decode, longest_first, most_columns
from rlhf_toolkit.rollout.prefill import common_prefix, left_padded
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.support.builders import tiny_tokenizer
from tests.support.roles import plain_peft, rows_of, tiny_shared
from tests.support.tiny import WORDS, tiny_llama

EOS = 1
SAMPLING = Sampling(max_new_tokens=12, stop_ids=(EOS, 4, 5), pad_id=0, temperature=1.3)
PROMPTS = ((7, 8), (9,), (10, 11, 12, 13, 14), (9, 9, 1, 9), (15, 16, 17))
STREAM = (42, "sample", 3)


@cache
def model() -> SharedBase:
    return tiny_shared().eval()


def batch_of(rows: Sequence[tuple[int, int]]) -> PromptBatch:
    """``rows`` are (prompt, sample)."""
    prompts = tuple(Prompt(index, "", PROMPTS[index], {}) for index, _ in rows)
    return PromptBatch(prompts, tuple(sample for _, sample in rows))


ROWS = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 5), (3, 0), (4, 0), (4, 1)]


def run(rows: Sequence[tuple[int, int]] = ROWS, sampling: Sampling = SAMPLING, stream: Any = STREAM) -> Rollout:
    with torch.no_grad():
        return decode(model(), tiny_tokenizer(words=WORDS), batch_of(rows), sampling, stream=stream)


def responses(rollout: Rollout) -> list[list[int]]:
    return [row[:n] for row, n in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)]


def by_row(rollout: Rollout, rows: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    return dict(zip(rows, responses(rollout), strict=True))


# ---- company does not matter -----------------------------------------------------------------------------------------


def test_these_rows_are_worth_testing() -> None:
    """They end at different times, so that rows leave early, and no two are equal."""
    found = responses(run())
    assert len({len(row) for row in found}) >= 4 and len({tuple(row) for row in found}) == len(ROWS)


def test_order_and_company_do_not_matter() -> None:
    expected = by_row(run(), ROWS)
    assert by_row(run(ROWS[::-1]), ROWS[::-1]) == expected
    halves = (ROWS[1::2], ROWS[::2])
    assert {**by_row(run(halves[0]), halves[0]), **by_row(run(halves[1]), halves[1])} == expected
    for row in ROWS:
        assert by_row(run([row]), [row]) == {row: expected[row]}


@pytest.mark.parametrize("share", [0.01, 0.5, 1.1])
def test_when_idle_rows_leave_does_not_matter(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    widths: list[int] = []
    own = SharedBase.next_token_logits

    def watched(self: SharedBase, input_ids: Tensor, *rest: Any) -> Tensor:
        widths.append(len(input_ids))
        return own(self, input_ids, *rest)

    expected = run()
    monkeypatch.setattr(SharedBase, "next_token_logits", watched)
    monkeypatch.setattr(decoding, "IDLE_SHARE", share)
    found = run()
    assert responses(found) == responses(expected)
    torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.finished, expected.finished)
    going = [sum(n > step for n in expected.lengths.tolist()) for step in range(len(widths))]
    assert widths[0] == len({prompt for prompt, _ in ROWS})  # the samples of one prompt are prefilled once
    if share == 0.01:
        assert widths[1:] == going[1:]
    elif share > 1:
        assert widths[1:] == [len(ROWS)] * (len(widths) - 1)
    else:
        assert widths[1:] != going[1:] and min(widths) < len(ROWS)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("entry", [0.01, 0.6])
def test_the_number_of_slots_does_not_matter(monkeypatch: pytest.MonkeyPatch, slots: int, entry: float) -> None:
    """Nor when prompts enter, nor that columns move left all the time for want of spare ones."""
    expected = run()
    widths: list[tuple[int, int]] = []
    own = SharedBase.next_token_logits

    def watched(self: SharedBase, input_ids: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        widths.append((len(input_ids), mask.shape[1]))
        return own(self, input_ids, mask, *rest)

    monkeypatch.setattr(SharedBase, "next_token_logits", watched)
    monkeypatch.setattr(decoding, "ENTRY_SHARE", entry)
    monkeypatch.setattr(decoding, "SPARE_COLUMNS", 1)
    with torch.no_grad():
        found = decode(model(), tiny_tokenizer(words=WORDS), batch_of(ROWS), SAMPLING, stream=STREAM, slots=slots)
    assert responses(found) == responses(expected)
    torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.finished, expected.finished)
    longest = max(map(len, PROMPTS)) + SAMPLING.max_new_tokens
    assert max(rows for rows, _ in widths) <= slots and max(columns for _, columns in widths) <= longest + 1


@pytest.mark.parametrize("threshold", [8, 100])
def test_a_step_reads_the_columns_of_the_longest_living_sequence(
    monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    """Also where a long one entered beside it, with or without a prefix in common, and columns moved for it."""
    lengths, budgets = (3, 4, 30, 2, 12, 3), [9, 6, 2, 12, 3, 4]
    prompts = tuple(Prompt(i, "", tuple(range(10, 10 + n)), {}) for i, n in enumerate(lengths))
    seen: list[int] = []
    own = Chain.next_token_logits

    def watched(self: Chain, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        if isinstance(cache, SlotCache):
            seen.append(mask.shape[1])
            assert seen[-1] == int(mask.sum(1).max())
        return own(self, input_ids)

    monkeypatch.setattr(Chain, "next_token_logits", watched)
    monkeypatch.setattr(prefill, "SHARED_PREFIX", threshold)
    monkeypatch.setattr(decoding, "SPARE_COLUMNS", 1)
    chain: Any = Chain(COUNTING)
    sampling = Sampling(max_new_tokens=12, stop_ids=(), pad_id=0, greedy=True)
    batch = PromptBatch(prompts, (0,) * len(prompts))
    decode(chain, tiny_tokenizer(), batch, sampling, stream=(), slots=2, budgets=budgets)
    assert max(seen) == 30 + 2 - 1 and min(seen) < 12


def test_the_columns_of_a_rollout_are_those_of_its_longest_row() -> None:
    """In a later turn a row that has written much has little budget left."""
    turn = [Prompt(i, "", (5,) * length, {}) for i, length in enumerate((50 + 90, 50 + 1))]
    assert most_columns(turn, [10, 99]) == 150 and most_columns([], []) == 1


def test_expected_lengths_order_the_beginning_and_nothing_else() -> None:
    assert longest_first(batch_of(ROWS), lambda prompt: 0.0) == list(range(len(ROWS)))
    order = longest_first(batch_of(ROWS), lambda prompt: float(prompt.index))
    assert [ROWS[row] for row in order] == [(4, 0), (4, 1), (3, 0), (2, 0), (2, 5), (1, 0), (0, 0), (0, 1)]
    with torch.no_grad():
        found = decode(
            model(),
            tiny_tokenizer(words=WORDS),
            batch_of(ROWS),
            SAMPLING,
            stream=STREAM,
            slots=2,
            expected=lambda prompt: float(prompt.index),
        )
    assert responses(found) == responses(run())


def test_what_prompts_have_in_common_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = tuple(range(6, 16))
    prompts = tuple(Prompt(i, "", (*template, *tail), {}) for i, tail in enumerate([(7,), (8, 9, 10), (7, 11)]))
    batch, seen = PromptBatch(prompts, (0, 0, 0)), list[tuple[int, ...]]()
    own = SharedBase.next_token_logits

    def watched(self: SharedBase, input_ids: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(input_ids.shape))
        return own(self, input_ids, *rest)

    monkeypatch.setattr(SharedBase, "next_token_logits", watched)
    found = {}
    for threshold in (8, 100):
        monkeypatch.setattr(prefill, "SHARED_PREFIX", threshold)
        with torch.no_grad():
            found[threshold] = decode(model(), tiny_tokenizer(words=WORDS), batch, SAMPLING, stream=STREAM)
    assert seen[:2] == [(1, 10), (3, 3)] and (3, 13) in seen
    assert responses(found[8]) == responses(found[100])
    torch.testing.assert_close(found[8].rollout_logprobs, found[100].rollout_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tails", "shared"),
    [([(1,), (2,)], 9), ([(1,), (1,)], 9), ([(), (1, 2)], 8), ([(1, 2)], 0)],
)
def test_a_common_prefix_leaves_every_prompt_a_token(tails: list[tuple[int, ...]], shared: int) -> None:
    template = tuple(range(6, 15))
    assert common_prefix([Prompt(i, "", (*template, *tail), {}) for i, tail in enumerate(tails)]) == shared
    short = [Prompt(i, "", (*template[:5], *tail), {}) for i, tail in enumerate(tails)]
    assert common_prefix(short) == 0


def test_what_pads_does_not_matter() -> None:
    """Even where it is the stop token, as for models whose pad is their eos."""
    expected = run()
    for pad in (EOS, 9):
        found = run(sampling=replace(SAMPLING, pad_id=pad))
        assert responses(found) == responses(expected) and torch.equal(found.finished, expected.finished)
        torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs)
        beyond = torch.arange(found.responses.shape[1]) >= found.lengths[:, None]
        assert set(found.responses[beyond].tolist()) == {pad}
        assert set(found.rollout_logprobs[beyond].tolist()) == {0.0}


# ---- random streams --------------------------------------------------------------------------------------------------


def test_a_stream_repeats() -> None:
    assert responses(run()) == responses(run())


@pytest.mark.parametrize("stream", [(43, "sample", 3), (42, "sample", 4), (42, "evaluation", 3)])
def test_another_stream_gives_other_tokens(stream: Any) -> None:
    ours, theirs = responses(run()), responses(run(stream=stream))
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) <= 2


def test_samples_of_one_prompt_and_prompts_of_one_text_differ() -> None:
    found = by_row(run([(4, sample) for sample in range(6)]), [(4, sample) for sample in range(6)])
    assert len({tuple(row) for row in found.values()}) >= 5
    same = PromptBatch(tuple(Prompt(index, "", PROMPTS[4], {}) for index in range(6)), (0,) * 6)
    with torch.no_grad():
        rollout = decode(model(), tiny_tokenizer(words=WORDS), same, SAMPLING, stream=STREAM)
    assert len({tuple(row) for row in responses(rollout)}) >= 5


def test_tokens_and_log_probs_are_those_of_the_named_stream_and_the_plain_model() -> None:
    """Inverse-CDF by hand, from (stream, prompt, sample) and the logits of whole sequences."""
    rollout, plain = run(), plain_peft(model(), "policy", tiny_llama())
    for (index, sample), response, logprobs in zip(ROWS, responses(rollout), rollout.rollout_logprobs, strict=True):
        generator = derived_generator(*STREAM, index, sample)
        uniforms = torch.rand(SAMPLING.max_new_tokens, generator=generator, dtype=torch.float64)
        for t, token in enumerate(response):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([[*PROMPTS[index], *response[:t]]])).logits[0, -1]
            logp = (logits.double() / SAMPLING.temperature).log_softmax(-1)
            edges = logp.exp().cumsum(-1)
            assert (edges[token - 1] if token else 0.0) - 1e-5 <= uniforms[t] <= edges[token] + 1e-5
            assert logprobs[t].item() == pytest.approx(logp[token].item(), abs=1e-4)


def test_log_probs_are_those_of_one_forward_pass() -> None:
    rollout = run(sampling=replace(SAMPLING, top_k=5, top_p=0.9))
    for (index, _), response, logprobs in zip(ROWS, responses(rollout), rollout.rollout_logprobs, strict=True):
        ids = torch.tensor([[*PROMPTS[index], *response]])
        mask = torch.arange(ids.shape[1])[None] >= len(PROMPTS[index])
        with torch.no_grad():
            out = model()(rows_of(ids, mask), roles=("policy",), temperature=SAMPLING.temperature)
        torch.testing.assert_close(logprobs[: len(response)], out.policy_logprobs, rtol=1e-4, atol=1e-4)


def test_top_k_of_one_is_greedy() -> None:
    greedy = run(sampling=replace(SAMPLING, greedy=True), stream=())
    assert responses(run(sampling=replace(SAMPLING, top_k=1))) == responses(greedy)


# ---- where a response ends -------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """A model that always follows one token by the same next: ``links[token]``."""

    def __init__(self, links: dict[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.causal_lm = SimpleNamespace(config=LlamaConfig(num_hidden_layers=1))
        self.links = links

    def next_token_logits(self, input_ids: Tensor, *rest: Any) -> Tensor:
        logits = torch.zeros(len(input_ids), 256)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            logits[row, self.links[token]] = 50.0
        return logits


COUNTING = {token: token + 1 for token in range(255)}


def follow(
    links: dict[int, int], prompts: Sequence[tuple[int, ...]], *, tokenizer: Any = None, **sampling: Any
) -> Rollout:
    batch = PromptBatch(tuple(Prompt(i, "", ids, {}) for i, ids in enumerate(prompts)), (0,) * len(prompts))
    settings = Sampling(**{"max_new_tokens": 5, "stop_ids": (), "pad_id": 0, "greedy": True, **sampling})
    chain: Any = Chain(links)
    return decode(chain, tokenizer or tiny_tokenizer(), batch, settings, stream=())


def test_a_stop_token_belongs_to_the_response_and_finishes_it() -> None:
    rollout = follow(COUNTING, [(10,), (12,), (13,)], stop_ids=(13, 15))
    assert responses(rollout) == [[11, 12, 13], [13], [14, 15]]
    assert rollout.responses.tolist() == [[11, 12, 13], [13, 0, 0], [14, 15, 0]]
    assert rollout.lengths.tolist() == [3, 1, 2] and rollout.finished.tolist() == [True] * 3


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    assert responses(follow(COUNTING, [(13, 10)], stop_ids=(13,))) == [[11, 12, 13]]


def test_the_budget_ends_a_response_without_finishing_it() -> None:
    rollout = follow(COUNTING, [(10,), (20,)], stop_ids=(12,))
    assert responses(rollout) == [[11, 12], [21, 22, 23, 24, 25]]
    assert rollout.finished.tolist() == [True, False]


def test_a_stop_token_as_the_last_of_the_budget_finishes() -> None:
    rollout = follow(COUNTING, [(10,), (11,)], stop_ids=(15,))
    assert rollout.lengths.tolist() == [5, 4] and rollout.finished.tolist() == [True, True]
    assert follow(COUNTING, [(10,)], stop_ids=(16,)).finished.tolist() == [False]


def test_without_anything_to_stop_at_the_budget_is_used_up() -> None:
    rollout = follow(COUNTING, [(10,), (20,)])
    assert rollout.lengths.tolist() == [5, 5] and rollout.finished.tolist() == [False, False]


def test_a_response_is_cut_where_the_longest_ends() -> None:
    assert follow(COUNTING, [(10,), (11,)], stop_ids=(12,), max_new_tokens=100).responses.shape == (2, 2)


def test_stop_strings_of_one_token_and_of_several() -> None:
    tokenizer = tiny_tokenizer(words=WORDS)
    ids = [tokenizer.get_vocab()[word] for word in ("w3", "w4", "w5", "w6", "w7")]
    links = dict(pairwise([*ids, ids[0]]))
    rollout = follow(links, [(ids[0],), (ids[2],)], tokenizer=tokenizer, stop_strings=("w5 w6",))
    assert responses(rollout) == [ids[1:4], [*ids[3:], *ids[:3]]]
    assert rollout.finished.tolist() == [True, False]
    rollout = follow(links, [(ids[0],)], tokenizer=tokenizer, stop_strings=("zzz", "w4"))
    assert responses(rollout) == [[ids[1]]] and rollout.finished.tolist() == [True]


def test_a_stop_string_in_the_prompt_stops_nothing() -> None:
    tokenizer = tiny_tokenizer(words=WORDS)
    first, second, third = (tokenizer.get_vocab()[word] for word in ("w3", "w4", "w5"))
    links = {second: third, third: third}
    rollout = follow(links, [(first, second)], tokenizer=tokenizer, stop_strings=("w3", "w4"))
    assert rollout.finished.tolist() == [False]


class Bytes:
    """A tokenizer of bytes, in which token n stands for byte n of ``text``: a chain's tokens never repeat."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [bytes(self.text[token] for token in row).decode(errors="replace") for row in rows]


@pytest.mark.parametrize("string", ["🙂🙂🙂", "日本語です", "end."])
def test_a_stop_string_of_byte_tokens_is_seen(string: str) -> None:
    """Each character of the first is four tokens of a byte-level vocabulary."""
    before = f"..{string}"
    text = Bytes(f"?{before}~~~~".encode())
    rollout = follow(COUNTING, [(0,)], tokenizer=text, stop_strings=(string,), max_new_tokens=len(text.text) - 1)
    assert rollout.lengths.tolist() == [len(before.encode())] and rollout.finished.tolist() == [True]


def test_on_tokens_hears_of_every_token_once() -> None:
    heard: list[int] = []
    batch = PromptBatch(tuple(Prompt(i, "", (10 + i,), {}) for i in range(4)), (0,) * 4)
    settings = Sampling(max_new_tokens=5, stop_ids=(12,), pad_id=0, greedy=True)
    chain: Any = Chain(COUNTING)
    rollout = decode(chain, tiny_tokenizer(), batch, settings, stream=(), on_tokens=heard.append)
    assert heard == [4, 3, 2, 2, 2] and sum(heard) == int(rollout.lengths.sum())


# ---- left padding ----------------------------------------------------------------------------------------------------


def test_prompts_end_in_the_same_column() -> None:
    ids, mask = left_padded(batch_of([(0, 0), (1, 0), (2, 0)]).prompts, pad_id=99)
    assert ids.tolist() == [[99, 99, 99, 7, 8], [99, 99, 99, 99, 9], [10, 11, 12, 13, 14]]
    assert mask.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]


def test_a_prompt_of_pad_tokens_is_not_padding() -> None:
    prompts = (Prompt(0, "", (0, 0), {}), Prompt(1, "", (3, 4, 0), {}))
    ids, mask = left_padded(prompts, pad_id=0)
    assert ids.tolist() == [[0, 0, 0], [3, 4, 0]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]
