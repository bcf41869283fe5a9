"""Whatever the prompts, budgets, slots, turns, stop strings and ways to choose a token: each row's tokens and log-probs
are those of the row alone, decoded without any cache, in one process and on two ranks, in the window and streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from rlhf_toolkit.distributed.topology import Topology, deepspeed_settings
from rlhf_toolkit.models.recurrent import layer_memory
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import SlotCache
from rlhf_toolkit.planning import memory
from rlhf_toolkit.rollout import decoding, prefill
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.logit_changes import LogitRules
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.rollout.sampling import choose_tokens
from rlhf_toolkit.rollout.sizes import RolloutSize
from rlhf_toolkit.rollout.turns import Environment
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.models.test_architectures import WORKS
from tests.support.builders import tiny_tokenizer
from tests.support.launch import run_worker
from tests.support.logits import by_transformers
from tests.support.offenders import for_each
from tests.support.roles import tiny_shared
from tests.support.tiny import WORDS

LONGEST, BUDGET = 24, 9  # tokens of a prompt; of a response
TEMPLATE = tuple(range(3, 15))
MODELS = (
    *("llama", "mistral, window 4", "gemma3 text", "gemma4, shared keys", "lfm2", "qwen3_5", "falcon_h1", "mamba2"),
    *("gpt2", "mpt"),
)
"""Full attention, a window in every layer, in some, layers that read others' keys, a short convolution, states in some
layers, beside attention, and alone, positions that end at the longest row, and biases by the distance of columns."""
EXAMPLES = {"llama": 30, "falcon_h1": 4, "mamba2": 4}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"min_p": 0.1},
    {"rules": LogitRules(penalty=1.4)},
    {"top_k": 9, "rules": LogitRules(bias=((6, 3.0), (9, -2.0)), bad_words=((5,), (6, 6), (9, 6)))},
    {"greedy": True, "rules": LogitRules(((8, 4.0),), 1.2, ((6, 8), (8, 8, 8)))},
)
"""Ways to choose tokens, some by what a row has in its own prompt and response."""
POSITIONS = {name: {"n_positions": LONGEST + BUDGET} for name in ("gpt2",)}


@dataclass(frozen=True)
class Situation:
    """A rollout: its prompts as (token ids, sample), in the ``order`` in which they begin."""

    rows: tuple[tuple[tuple[int, ...], int], ...]
    order: tuple[int, ...]
    budget: int
    slots: int
    turns: int
    prefill_tokens: int
    stop_strings: tuple[str, ...]
    constants: dict[str, float]
    shared_prefix: int
    options: dict[str, Any]

    def batch(self, part: slice) -> PromptBatch:
        """The rows of one rank. Prompts of equal tokens are one prompt."""
        numbers = {ids: number for number, ids in enumerate(dict.fromkeys(ids for ids, _ in self.rows))}
        rows = self.rows[part]
        return PromptBatch(
            tuple(Prompt(numbers[ids], str(len(ids)), ids, {}) for ids, _ in rows), tuple(s for _, s in rows)
        )


def situation_of(seed: int) -> Situation:
    """The situation that dice throw. Hypothesis chooses the seed and nothing else: its own choices are the simplest or
    repeat the last ones, depend on what has been imported, and half of them decode no second token."""
    dice = Random(seed)
    alike = dice.random() < 1 / 3

    def prompt() -> tuple[int, ...]:
        most = dice.choice((4, LONGEST))
        count = dice.randint(1, LONGEST - len(TEMPLATE)) if alike else dice.choice((dice.randint(1, most), most))
        return (*(TEMPLATE if alike else ()), *(dice.randint(2, 31) for _ in range(count)))

    prompts = list(dict.fromkeys(prompt() for _ in range(dice.randint(1, 7))))
    return Situation(
        rows=tuple((ids, sample) for ids in prompts for sample in range(dice.randint(1, 2))),
        order=tuple(dice.sample(range(len(prompts)), len(prompts))),
        budget=dice.randint(1, BUDGET),
        slots=dice.randint(1, 5),
        turns=dice.randint(1, 3),
        prefill_tokens=dice.choice((LONGEST, 2 * LONGEST, 999)),
        stop_strings=dice.choice(((), ("w4",), ("w9 w2", "w20"))),
        constants={
            "SPARE_COLUMNS": dice.choice((1, 2, 32)),
            "ENTRY_SHARE": dice.choice((0.01, 0.6)),
            "IDLE_SHARE": dice.choice((0.01, 0.5, 1.1)),
        },
        shared_prefix=dice.choice((2, 8)),
        options=dice.choice(OPTIONS),
    )


SITUATION = st.integers(0, 2**32 - 1).map(situation_of)
LIKE: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
LIKE |= {"phases": [Phase.generate]}  # a failing situation is small as it is


def tool(prompts: Sequence[str], responses: Sequence[str], *, turn: int) -> list[str | None]:
    """Answers three of four responses, with up to four words."""
    return [" ".join(["w27"] * (len(r + p) % 4)) or None for p, r in zip(prompts, responses, strict=True)]


@cache
def tokenizer() -> Any:
    return tiny_tokenizer(words=WORDS, pad="</s>", chat_template=None)


@cache
def model(name: str) -> SharedBase:
    case = WORKS[name]
    config = CONFIG_MAPPING[case.model_type](**{**case.sizes, **POSITIONS.get(name, {}), "vocab_size": 33})
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=case.attention)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # attention that matters
    base.get_input_embeddings().weight.data[0].normal_(std=0.1)  # a checkpoint's padding token is not zero
    return tiny_shared(base, roles=("policy",)).eval()


# ---- what happens on the way ----------------------------------------------------------------------------------------

HAPPENS = ("ragged prompts enter", "ragged ones enter behind a prefix", "columns move left", "columns move right")
"""What the situations must bring about to say anything, in a model of full attention."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts of what happens inside."""
    seen: Counter[str] = Counter()

    def watch(owner: Any, name: str, happens: Callable[..., str]) -> None:
        own = getattr(owner, name)

        def watched(*args: Any, **more: Any) -> Any:
            seen[happens(*args)] += 1
            return own(*args, **more)

        patched.enter_context(mock.patch.object(owner, name, watched))

    with ExitStack() as patched:
        watch(prefill, "left_padded", lambda each: "ragged prompts enter" if len(set(map(length_of, each))) > 1 else "")
        watch(prefill, "close_holes", lambda cache, mask: "" if mask.all() else "ragged ones enter behind a prefix")
        watch(SlotCache, "_move", lambda cache, by: "columns move left" if by < 0 else "columns move right")
        yield seen


def length_of(prompt: Prompt) -> int:
    return len(prompt.token_ids)


# ---- the oracle: one row, no cache, no slots -------------------------------------------------------------------------


@dataclass
class Written:
    """Tokens, their log-probs in the policy and in what they were drawn from, and whether the response finished."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    finished: bool = False


def written(shared: SharedBase, ids: list[int], uniforms: torch.Tensor, budget: int, sampling: Sampling) -> Written:
    """What the policy writes after ``ids``: every token from a pass over the whole sequence, drawn from what
    transformers' own processors make of its logits."""
    found = Written()
    tokens = found.tokens
    while len(tokens) < budget:
        whole = torch.tensor([[*ids, *tokens]])
        nothing = DynamicCache(config=shared.causal_lm.config)
        logits = shared.next_token_logits(whole, torch.ones_like(whole), torch.arange(whole.shape[1])[None], nothing)
        allowed = by_transformers(logits[0], whole[0].tolist(), sampling)
        number = None if sampling.greedy else uniforms[None, len(tokens)]
        (token,), (drawn,), _ = choose_tokens(allowed[None], number, temperature=1.0)
        tokens.append(int(token))
        found.logprobs.append(float((logits[0] / 1.3).log_softmax(-1)[token]))
        found.drawn.append(float(drawn))
        text = tokenizer().decode(tokens)
        if tokens[-1] in sampling.stop_ids or any(string in text for string in sampling.stop_strings):
            found.finished = True
            break
    return found


def alone(shared: SharedBase, prompt: Prompt, sample: int, situation: Situation, sampling: Sampling) -> Written:
    """The response, turn by turn."""
    found = Written()
    for turn in range(situation.turns):
        generator = derived_generator(*((5,) if turn == 0 else (5, "turn", turn)), prompt.index, sample)
        uniforms = torch.rand(situation.budget, generator=generator, dtype=torch.float64)
        left = situation.budget - len(found.tokens)
        more = written(shared, [*prompt.token_ids, *found.tokens], uniforms, left, sampling)
        found.tokens += more.tokens
        found.logprobs += more.logprobs
        found.drawn += more.drawn
        found.finished = more.finished
        if not found.finished or turn + 1 == situation.turns:
            break
        (answer,) = tool([prompt.text], [tokenizer().decode(found.tokens, skip_special_tokens=True)], turn=turn)
        if answer is None:
            break
        own = tokenizer()(answer, add_special_tokens=False).input_ids
        found.finished = False
        if len(found.tokens) + len(own) >= situation.budget:
            break
        found.tokens += own
        found.logprobs += [0.0] * len(own)
        found.drawn += [0.0] * len(own)
    return found


# ---- what is decoded in slots ----------------------------------------------------------------------------------------


def sampling_of(situation: Situation) -> Sampling:
    return Sampling(
        situation.budget,
        stop_ids=(1, 4, 7, 15),
        pad_id=0,
        temperature=1.3,
        stop_strings=situation.stop_strings,
        **situation.options,
    )


def decoded(engine: Any, situation: Situation, batch: PromptBatch, mode: str) -> Rollout:
    environment = Environment(tool, situation.turns) if situation.turns > 1 else None
    size = RolloutSize(len(situation.rows), LONGEST + BUDGET, role_pass_tokens=64, longest_prompt=LONGEST)
    sampler = Sampler(tokenizer(), size, mode=mode, slots=situation.slots, environment=environment)
    expected: Callable[[Prompt], float] = lambda prompt: float(situation.order[prompt.index])  # noqa: E731
    entering = mock.patch.object(memory, "PREFILL_TOKENS", situation.prefill_tokens)
    values: Any = situation.constants
    constants = mock.patch.multiple(decoding, **values)
    shared_prefix = mock.patch.object(prefill, "SHARED_PREFIX", situation.shared_prefix)
    with entering, constants, shared_prefix, sampler.opened(engine) as shared:
        return sampler.decode(shared, batch, sampling_of(situation), stream=(5,), expected=expected)


def differences(shared: SharedBase, situation: Situation, batch: PromptBatch, found: Rollout) -> list[str]:
    """Rows of ``found`` that are not what they are alone, to rounding, which grows in a recurrent state."""
    wrong, within = list[str](), 1e-4 if layer_memory(shared.causal_lm).layers else 1e-5
    with torch.no_grad():
        for row, (prompt, sample) in enumerate(zip(batch.prompts, batch.samples, strict=True)):
            sampling = sampling_of(situation)
            expected = alone(shared, prompt, sample, situation, sampling)
            length = int(found.lengths[row])
            ours = found.responses[row, :length].tolist(), bool(found.finished[row])
            if ours != (expected.tokens, expected.finished):
                wrong.append(f"row {row}: {ours}, alone {expected}")
                continue
            if (found.drawn_logprobs is None) != (sampling.is_whole or sampling.greedy):
                wrong.append(f"drawn log-probs are {found.drawn_logprobs} where {sampling}")
            columns = [(found.rollout_logprobs, expected.logprobs), (found.drawn_logprobs, expected.drawn)]
            wrong += [
                f"row {row}: log-probs {said[row, :length].tolist()}, alone {numbers}"
                for said, numbers in columns
                if said is not None and not torch.allclose(said[row, :length], torch.tensor(numbers), 0, within)
            ]
    return wrong


@for_each("name", MODELS)
def test_a_row_in_company_is_the_row_alone(name: str) -> None:
    @settings(max_examples=EXAMPLES.get(name, 12), **LIKE)
    @given(SITUATION)
    def holds(situation: Situation) -> None:
        batch = situation.batch(slice(None))
        found = decoded(model(name), situation, batch, "window")
        assert not differences(model(name), situation, batch, found)

    with counted() as seen:
        holds()
    assert name != "llama" or seen.keys() >= set(HAPPENS), seen


# ---- two ranks -------------------------------------------------------------------------------------------------------


def compare(topology: Topology, name: str, situations: list[Situation]) -> list[str]:
    """On every rank: what differs, case by case. It raises nothing, so that the ranks stay in step."""
    plain, sharded = model(name), model.__wrapped__(name)
    config = deepspeed_settings(topology, rows_per_rank=1, max_grad_norm=1.0, largest_adapter=1, trained=64)
    trained = [parameter for parameter in sharded.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=sharded, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)
    wrong = []
    for number, situation in enumerate(situations):
        batch = situation.batch(slice(topology.rank, None, topology.world_size))
        for mode in ("window", "stream"):
            found = decoded(engine, situation, batch, mode)
            wrong += [f"{number}, {mode}, {each}" for each in differences(plain, situation, batch, found)]
    return wrong


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_on_two_ranks_too(name: str, tmp_path: Path) -> None:
    situations: list[Situation] = []

    @settings(max_examples=12 if name == "llama" else 6, **LIKE)
    @given(SITUATION)
    def draw(situation: Situation) -> None:
        situations.append(situation)

    draw()
    found = run_worker("tests.rollout.test_slots_property:compare", tmp_path, name=name, situations=situations)
    assert found == [[], []], situations
