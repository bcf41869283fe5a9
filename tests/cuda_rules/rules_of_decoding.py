"""Decoding gives the CPU's tokens on the pretended GPU, and a step launches and waits no more than it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_toolkit.errors import NotFiniteError
from rlhf_toolkit.models.decoding_weights import EXACT, MERGED, DecodingKind, decoding_weights
from rlhf_toolkit.rollout.decoding import Alone, InFlight, Responses, Sampling, decode
from rlhf_toolkit.rollout.logit_changes import LogitRules
from rlhf_toolkit.types import Rollout
from tests.cuda_rules.device import GPU, MixedDevices, Rules, to_gpu
from tests.cuda_rules.subjects import prompts, shared_base
from tests.support.builders import tiny_tokenizer
from tests.support.tiny import WORDS

STOP, ABSENT = 1, -1
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "bias": {"rules": LogitRules(bias=((5, 3.0), (6, -100.0)))},
    "penalty": {"rules": LogitRules(penalty=1.5)},
    "bad words": {"rules": LogitRules(bad_words=((7,), (9, 8), (5, 5, 5)))},
    "greedy": {"greedy": True},
    "stop strings": {"stop_strings": ("w5", "w7 w")},
}
ENDS = {"max_new_tokens", "stop_ids", "pad_id"}
"""What every decoding here has."""
LAUNCHES_OF_A_LAYER = {"exact": 47, "merged": 33}
LAUNCHES_BESIDE = 67
WAITS, WAITS_FOR_STRINGS, WAITS_OF_AN_ENTRY = 1, 3, 17
"""Upper bounds for a step of decoding, which may only fall: a waiting CPU launches nothing, and a small model's time on
a fast card is the time that launching takes. Stop strings are looked for in texts, on the CPU. An entry
copies prompts, slots and rows to the GPU, whatever their number."""


def sampling(**options: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 8, "stop_ids": (STOP,), "pad_id": STOP, **options})


def decoded(model: nn.Module, weights: str, options: dict[str, Any]) -> Rollout:
    tokenizer = tiny_tokenizer(words=WORDS, pad="</s>", chat_template=None)
    with Rules(), torch.no_grad(), decoding_weights(model, "policy", weights), torch.inference_mode():
        return decode(model, tokenizer, prompts(), sampling(**options), stream=(0,), slots=3)  # type: ignore[arg-type]


def test_every_way_of_sampling_gives_the_cpus_tokens() -> None:
    assert {option for options in OPTIONS.values() for option in options} == {f.name for f in fields(Sampling)} - ENDS
    wrong = []
    for weights, name in [*((EXACT, name) for name in OPTIONS), (MERGED, "as it is")]:
        models = to_gpu(shared_base()), shared_base()
        found, expected = (decoded(model, weights, OPTIONS[name]) for model in models)
        same = [torch.equal(getattr(found, c), getattr(expected, c)) for c in ("responses", "lengths", "finished")]
        if not all(same) or not torch.allclose(found.rollout_logprobs, expected.rollout_logprobs, atol=1e-4):
            wrong.append((weights, name))
        ours, theirs = (rollout.drawn_logprobs for rollout in (found, expected))
        if ours is None or theirs is None:
            assert ours is theirs
        elif not torch.allclose(ours, theirs, atol=1e-4):
            wrong.append((weights, f"what {name} draws from"))
        assert {column.device.type for column in vars(found).values() if column is not None} == {"cpu"}
    assert wrong == []


def test_logits_that_are_not_finite_stop_it_with_the_cpus_words() -> None:
    """A sampler that went on would index what is not there, after which CUDA answers nothing any more."""
    messages = set()
    for move in (lambda model: model, to_gpu):
        model = shared_base()
        nn.init.constant_(model.causal_lm.get_parameter("model.layers.1.mlp.down_proj.base_layer.weight"), torch.nan)
        with pytest.raises(NotFiniteError) as raised:
            decoded(move(model), EXACT, {})
        messages.add(str(raised.value))
    assert len(messages) == 1 and "down_proj is the first layer" in messages.pop()


def a_step(weights: str, *, layers: int, **options: Any) -> tuple[Rules, Counter[str]]:
    """The second step of a decoding in which nothing ends and nobody enters, and the waits of everybody's entry. In
    inference mode operators come whole, as a GPU runs them."""
    model = to_gpu(shared_base(dtype=torch.bfloat16, layers=layers))
    tokenizer = tiny_tokenizer(words=WORDS, pad="</s>", chat_template=None)
    batch = prompts()
    with (
        Rules(traced=True) as rules,
        torch.no_grad(),
        decoding_weights(model, "policy", weights),
        torch.inference_mode(),
    ):
        chosen, rows = sampling(stop_ids=(ABSENT,), **options), len(batch)
        responses = Responses(tokenizer, batch, chosen, [8] * rows, (0,), GPU)
        state = InFlight(model, responses, list(range(rows)), rows, Alone())  # type: ignore[arg-type]
        rules.forget()
        state.enter()
        entry = rules.waits.copy()
        state.step()
        rules.forget()
        state.step()
    assert len(state.living) == rows, "the step must be one in which nothing ends"
    return rules, entry


@pytest.mark.parametrize("weights", list(DecodingKind))
def test_a_step_launches_and_waits_no_more_than_it_did(weights: str) -> None:
    (two, entry), (four, _) = a_step(weights, layers=2), a_step(weights, layers=4)
    of_a_layer = (four.launches - two.launches) / 2
    beside = two.launches - 2 * of_a_layer
    assert of_a_layer <= LAUNCHES_OF_A_LAYER[weights], four.table()
    assert beside <= LAUNCHES_BESIDE, two.table()
    assert two.waits.total() <= WAITS and two.waits == four.waits, two.table()
    assert entry.total() <= WAITS_OF_AN_ENTRY, entry


def test_no_way_of_sampling_waits_more() -> None:
    wrong = []
    for name, options in OPTIONS.items():
        searches = "stop_strings" in options
        rules, _ = a_step(EXACT, layers=1, **(options | ({"stop_strings": ("never",)} if searches else {})))
        bound = WAITS + WAITS_FOR_STRINGS * searches
        if rules.waits.total() > bound:
            wrong.append(f"{name}: {rules.table()}")
    assert wrong == []


def test_the_rules_themselves() -> None:
    """What CUDA refuses is refused, what it allows is not, and both ways of waiting are seen."""
    with Rules() as rules:
        here, there = torch.arange(6.0, device=GPU).view(2, 3), torch.ones(2, 3)
        number, index = torch.tensor(2.0), torch.tensor([1, 0])
        refused = {
            "operands": lambda: here + there,
            "a CPU tensor by a GPU index": lambda: there[index.to(GPU)],
            "values to write": lambda: here.index_put_((index,), there),
            "a mask": lambda: here.masked_fill(there > 0, 0.0),
            "joining": lambda: torch.cat([here, there]),
            "joining numbers": lambda: torch.stack([here.sum(), number]),
            "a CPU number as result": lambda: number.add_(here.sum()),
        }
        for name, work in refused.items():
            with pytest.raises(MixedDevices):
                work()
                pytest.fail(name)
        rules.forget()
        assert here.device == GPU and here.is_cuda and rules.launches == 0
        twice = here * number + here.sum()
        assert rules.launches == 3 and not rules.waits
        assert twice.tolist() == [[15, 17, 19], [21, 23, 25]] and here[index].cpu().tolist() == [[3, 4, 5], [0, 1, 2]]
        assert rules.waits == {"copy to the CPU": 2, "index from the CPU": 1}
        rules.forget()
        here[here > 2], here[[0, 1], 0], there[0] = 1.0, 5.0, here[0].cpu()
        assert rules.waits == {"index of booleans": 1, "copy to the GPU": 1, "copy to the CPU": 1}
        assert float(here[0, 0]) == 5.0 and bool((here < 6).all()) and rules.waits["_local_scalar_dense"] == 2
