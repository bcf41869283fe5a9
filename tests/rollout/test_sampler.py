"""Where and how responses are sampled: decided once, by what the decode loop itself gives, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_toolkit.distributed.streaming import InStep
from rlhf_toolkit.errors import ConfigError, NotFiniteError
from rlhf_toolkit.models.decoding_weights import EXACT, MERGED
from rlhf_toolkit.models.inference import bare, inference
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import column_bytes
from rlhf_toolkit.planning.memory import STREAM, WINDOW, Placement
from rlhf_toolkit.rollout import sampler as module
from rlhf_toolkit.rollout.decoding import Alone, Sampling, decode
from rlhf_toolkit.rollout.sampler import Sampler, bare_tensors, one_token, tokens_of
from rlhf_toolkit.rollout.sizes import RolloutSize, sharding
from rlhf_toolkit.rollout.turns import Environment
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.support.builders import tiny_tokenizer
from tests.support.roles import tiny_shared
from tests.support.tiny import SIZES, WORDS, tiny_llama

BUDGET, PROMPTS, STREAM_NAME = 9, ((7, 8), (9,), (10, 11, 12, 13, 14), (9, 9, 3, 9)), (42, "sample", 3)
SAMPLING = Sampling(BUDGET, stop_ids=(1, 4, 5), pad_id=0, temperature=1.3)
GIB = 2**30


@cache
def model() -> SharedBase:
    return tiny_shared()


@cache
def tokenizer() -> Any:
    return tiny_tokenizer(words=WORDS, pad="</s>", chat_template=None)


def batch() -> PromptBatch:
    """Two responses to each prompt."""
    rows = [(index, sample) for index in range(len(PROMPTS)) for sample in range(2)]
    prompts = tuple(Prompt(index, str(index), PROMPTS[index], {}) for index, _ in rows)
    return PromptBatch(prompts, tuple(sample for _, sample in rows))


def sampler_of(**options: Any) -> Sampler:
    size = RolloutSize(len(batch()), 5 + BUDGET, role_pass_tokens=64, longest_prompt=5)
    return Sampler(tokenizer(), size, **options)


def sampled(sampler: Sampler, shared: SharedBase | None = None, **options: Any) -> Rollout:
    with sampler.opened(shared or model()) as opened:
        return sampler.decode(opened, batch(), SAMPLING, stream=STREAM_NAME, **options)


def decoded() -> Rollout:
    """What the decode loop gives, without a sampler."""
    with torch.no_grad():
        return decode(model().eval(), tokenizer(), batch(), SAMPLING, stream=STREAM_NAME)


def assert_same(found: Rollout, expected: Rollout, *, atol: float = 1e-5) -> None:
    assert tokens_of(found) == tokens_of(expected)
    assert torch.equal(found.finished, expected.finished) and torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, rtol=0, atol=atol)


# ---- what is sampled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, 1, 3])
@pytest.mark.parametrize("weights", [EXACT, MERGED])
def test_a_sampler_gives_what_the_decode_loop_gives(slots: int | None, weights: str) -> None:
    expected = decoded()
    assert len({len(row) for row in tokens_of(expected)}) > 3, "rows that end at different times"
    assert_same(sampled(sampler_of(slots=slots, weights=weights)), expected)


def test_what_is_sampled_can_be_trained_on() -> None:
    """Tensors of inference mode could not be saved for backward."""
    rollout = sampled(sampler_of())
    for name in ("responses", "lengths", "rollout_logprobs", "finished"):
        assert not getattr(rollout, name).is_inference(), name
    (torch.ones(rollout.rollout_logprobs.shape, requires_grad=True) * rollout.rollout_logprobs).sum().backward()


def test_it_tells_of_every_token_and_of_each_row_once() -> None:
    counts: list[int] = []
    ended: list[tuple[int, list[int]]] = []
    rollout = sampled(sampler_of(on_tokens=counts.append), on_finished=lambda *row: ended.append(row))
    assert sum(counts) == int(rollout.lengths.sum())
    assert sorted(ended) == list(enumerate(tokens_of(rollout)))
    assert [row for row, _ in ended] != sorted(row for row, _ in ended), "as soon as each has ended"


def test_prompts_expected_to_be_long_begin_first() -> None:
    ended: list[int] = []
    sampled(sampler_of(slots=1), expected=lambda prompt: prompt.index, on_finished=lambda row, _: ended.append(row))
    assert [row // 2 for row in ended] == [3, 3, 2, 2, 1, 1, 0, 0]


def test_tokens_are_those_of_each_row_without_padding() -> None:
    columns: dict[str, Any] = {"rollout_logprobs": torch.zeros(3, 2), "finished": torch.tensor([True, False, True])}
    rollout = Rollout(torch.tensor([[7, 8], [9, 0], [0, 0]]), torch.tensor([2, 1, 0]), **columns)
    assert tokens_of(rollout) == [[7, 8], [9], []]


# ---- several turns ---------------------------------------------------------------------------------------------------


def silent(prompts: Sequence[str], responses: Sequence[str], *, turn: int) -> list[str | None]:
    return [None] * len(responses)


def answers_all(prompts: Sequence[str], responses: Sequence[str], *, turn: int) -> list[str | None]:
    return ["w27"] * len(responses)


def test_an_environment_that_says_nothing_changes_nothing() -> None:
    ended: list[tuple[int, list[int]]] = []
    environment = Environment(silent, max_turns=3)
    found = sampled(sampler_of(environment=environment), on_finished=lambda *row: ended.append(row))
    assert_same(found, decoded())
    assert found.written is not None and int(found.written.sum()) == int(found.lengths.sum())
    assert ended == list(enumerate(tokens_of(found))), "rewards are told of whole responses"


def test_each_turn_has_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first those of a single turn, so that an environment changes nothing before it speaks."""
    calls: list[tuple[Any, list[int]]] = []

    def watched(*args: Any, stream: Any, budgets: list[int] | None = None, **options: Any) -> Rollout:
        calls.append((stream, budgets or []))
        return decode(*args, stream=stream, budgets=budgets, **options)

    monkeypatch.setattr(module, "decode", watched)
    found = sampled(sampler_of(environment=Environment(answers_all, max_turns=3)))
    streams = [stream for stream, _ in calls]
    assert streams[0] == STREAM_NAME and len(streams) == 3 == len(set(streams))
    assert all(stream[: len(STREAM_NAME)] == STREAM_NAME for stream in streams), "named by seed and rollout too"
    assert calls[0][1] == [BUDGET] * len(batch()) and all(budget < BUDGET for budget in calls[1][1])
    assert max(found.lengths.tolist()) <= BUDGET and found.written is not None and not found.written.all()


# ---- where: decided once ---------------------------------------------------------------------------------------------


def test_the_place_is_decided_once_from_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def free_memory(device: torch.device) -> int:
        asked.append(device)
        return GIB

    monkeypatch.setattr(module, "free_memory", free_memory)
    sampler = sampler_of()
    assert sampler.placement is None and sampler.estimate is None
    first = sampler.place(model())
    sampled(sampler)
    assert sampler.place(model()) is first is sampler.placement
    assert asked == [torch.device("cpu")]
    assert (first.mode, first.slots, first.free) == (WINDOW, len(batch()), GIB)
    assert sampler.estimate is not None and sampler.estimate.needs.column_bytes == bytes_of_a_token()


def test_what_was_placed_is_what_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def noted(*args: Any, **options: Any) -> Rollout:
        calls.append(options)
        return decoded()

    monkeypatch.setattr(module, "decode", noted)
    sampler = sampler_of()
    sampler.placement = Placement(WINDOW, slots=3, prefill_tokens=17, needed=0, free=GIB)
    sampled(sampler)
    assert (calls[0]["slots"], calls[0]["prefill_tokens"]) == (3, 17)


def test_too_little_memory_is_an_error_before_anything_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match="GiB are usable"):
        sampler_of().place(model())


def test_one_process_has_nothing_to_stream() -> None:
    with pytest.raises(ConfigError, match="streaming needs ZeRO-3"):
        sampler_of(mode=STREAM).place(model())


def bytes_of_a_token() -> int:
    """Keys and values of all layers in fp32, by hand."""
    width = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    return 2 * SIZES["num_hidden_layers"] * SIZES["num_key_value_heads"] * width * 4


def test_a_tokens_keys_and_values_are_measured() -> None:
    with torch.no_grad():
        assert column_bytes(one_token(model().eval(), Alone())) == bytes_of_a_token()
        wide = tiny_shared(tiny_llama(num_hidden_layers=3)).eval()
        assert column_bytes(one_token(wide, Alone())) == bytes_of_a_token() * 3 // 2


def test_measuring_is_a_pass_that_other_ranks_hear_of() -> None:
    passes: list[str] = []

    class Noted(Alone):
        @contextmanager
        def forward_pass(self, idle: Any = None) -> Iterator[None]:  # type: ignore[override]
            passes.append("pass")
            yield

    with torch.no_grad():
        one_token(model(), Noted())
    assert passes == ["pass"]


# ---- nothing is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_inside_it_is_evaluated_and_afterwards_as_it_was(training: bool, fails: bool) -> None:
    shared = model().train(training)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), inference(shared) as inside:
        assert inside is shared and not shared.training and not torch.is_grad_enabled()
        assert not any(part.training for part in shared.modules())
        if fails:
            raise ZeroDivisionError
    assert shared.training == training and torch.is_grad_enabled()
    assert all(part.training == training for part in shared.causal_lm.modules())


@pytest.mark.parametrize("weights", [EXACT, MERGED])
@pytest.mark.parametrize("fails", [True, False])
def test_the_weights_and_what_computes_with_them_are_as_they_were(weights: str, fails: bool) -> None:
    shared = tiny_shared().train()
    if fails:
        with torch.no_grad():
            next(shared.causal_lm.parameters())[8] = torch.nan  # the embedding of a word of the first prompt
    before = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    forwards = {name: part.forward for name, part in shared.named_modules()}
    with pytest.raises(NotFiniteError) if fails else nullcontext():
        sampled(sampler_of(weights=weights), shared)
    for name, tensor in shared.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert {name: part.forward for name, part in shared.named_modules()} == forwards
    assert shared.training and not torch.is_inference_mode_enabled()


def test_the_model_of_an_engine_is_the_one_inside_it() -> None:
    class Engine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model()

    engine = Engine()
    assert bare(engine) is model() and bare(model()) is model()
    with sampler_of().opened(engine) as inside:
        assert inside is model()


# ---- with other ranks ------------------------------------------------------------------------------------------------


class Recorded:
    """Which of ``agreement``, ``gathered`` and ``streamed`` are entered, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered: list[str] = []
        monkeypatch.setattr(module, "agreement", lambda phase: self.note(f"agreement on {phase}", None))
        monkeypatch.setattr(module, "gathered", lambda model: self.note("gathered", None))
        monkeypatch.setattr(module, "streamed", lambda model: self.note("streamed", InStep(lambda: None)))

    @contextmanager
    def note(self, name: str, value: Any) -> Iterator[Any]:
        self.entered.append(name)
        yield value

    def during(self, sampler: Sampler) -> list[str]:
        sampler.place(model())
        self.entered.clear()
        sampled(sampler)
        return self.entered


def streaming(sampler: Sampler) -> Sampler:
    """A sampler that was placed as on several ranks."""
    sampler.placement = Placement(STREAM, slots=4, prefill_tokens=32, needed=0, free=GIB)
    return sampler


def test_in_the_window_ranks_agree_once_on_a_whole_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """There they run no collective, so that one which failed is noticed at the end."""
    assert Recorded(monkeypatch).during(sampler_of()) == ["gathered", "agreement on sampling"]


def test_streaming_ranks_agree_pass_by_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agreement around the decode would be a collective among those of the layers."""
    recorded = Recorded(monkeypatch)
    assert recorded.during(streaming(sampler_of())) == ["streamed"]
    environment = Environment(silent, max_turns=2)
    assert recorded.during(streaming(sampler_of(environment=environment))) == [
        "streamed",
        "agreement on the environment",
        "agreement on sampling",
    ]


def test_streamed_responses_are_those_of_the_window() -> None:
    assert_same(sampled(streaming(sampler_of())), decoded())
    environment = Environment(answers_all, max_turns=3)
    windowed = sampled(sampler_of(environment=environment))
    assert_same(sampled(streaming(sampler_of(environment=environment))), windowed)


def test_streaming_ranks_take_turns_as_long_as_any_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    votes = iter([True, False])

    def counted(*args: Any, **options: Any) -> Rollout:
        turns.append(len(args[2]))
        return decode(*args, **options)

    monkeypatch.setattr(module, "decode", counted)
    monkeypatch.setattr(module, "any_rank", lambda flag: flag or next(votes))
    sampled(streaming(sampler_of(environment=Environment(silent, max_turns=4))))
    assert turns == [len(batch()), 0], "one more, without a row of its own, to keep another company"
    turns.clear()
    monkeypatch.setattr(module, "any_rank", lambda flag: pytest.fail("a collective in the window"))
    sampled(sampler_of(environment=Environment(silent, max_turns=4)))
    assert turns == [len(batch())]


def test_only_in_the_window_tensors_do_without_autograds_bookkeeping() -> None:
    """ZeRO's hooks write to parameters while streaming."""
    modes: dict[str, bool] = {}
    paces: dict[str, Callable[[], Any]] = {"window": Alone, "stream": lambda: InStep(lambda: None)}
    for name, pace in paces.items():
        with bare_tensors(pace()):
            modes[name] = torch.is_inference_mode_enabled()
    assert modes == {"window": True, "stream": False}


def test_a_window_after_a_stream_is_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, sampler = Recorded(monkeypatch), streaming(sampler_of())
    assert recorded.during(sampler) == ["streamed"]
    sampler.placement = Placement(WINDOW, slots=4, prefill_tokens=32, needed=0, free=GIB)
    assert recorded.during(sampler) == ["gathered", "agreement on sampling"]


def test_the_estimate_is_of_the_run_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, stage, offloading and the optimizer's bits reach it."""
    told: list[dict[str, Any]] = []

    def noted(size: Any, **how: Any) -> Any:
        told.append(how)
        return sharding(size, **how)

    monkeypatch.setattr(module, "sharding", noted)
    monkeypatch.setattr(module, "world_size", lambda: 3)
    monkeypatch.setattr(module, "zero_stage", lambda model: 2)
    monkeypatch.setattr(module, "offloads_optimizer", lambda model: True)
    sampler_of().place(model())
    assert told == [{"ranks": 3, "stage": 2, "on_cpu": True, "offloaded": True, "eight_bit": False}]
