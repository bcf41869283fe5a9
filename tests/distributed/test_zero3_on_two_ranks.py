"""ZeRO-3's shards, the window and streaming on two real ranks, held against a copy of the model that is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.distributed.engine import backward, step
from rlhf_toolkit.distributed.streaming import streamed
from rlhf_toolkit.distributed.topology import Topology, deepspeed_settings
from rlhf_toolkit.distributed.zero3 import (
    element_count,
    full_shape,
    gathered,
    is_here,
    is_partitioned,
    is_sharded,
    offloads_optimizer,
    own_part,
    share_parameters,
    whole,
    zero_stage,
)
from rlhf_toolkit.errors import DataError, RLHFError
from tests.support.launch import run_worker

WORDS, WIDTH, RANK, LAYERS = 31, 15, 2, 3  # odd, so that shards are padded
FROZEN = ["embedding.weight", *(f"layers.{i}.base.weight" for i in range(LAYERS))]
LEARNING_RATE = 0.05
PASSES = (1, 3)  # forward passes of each rank


# ---- a model with a frozen base, adapters, and an output layer that another module owns ------------------------------


class Adapted(nn.Module):
    """A frozen linear with a small trained one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return states + torch.tanh(self.base(states) + self.up(self.down(states)))


class Tied(nn.Module):
    """An output layer whose matrix is the embedding's."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.owner = [embedding]  # in a list, so that the parameter has one owner
        share_parameters(self, embedding.parameters())

    def forward(self, states: Tensor) -> Tensor:
        return functional.linear(states, self.owner[0].weight)


class Net(nn.Module):
    """Logits of the next token. The same numbers each time it is made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Adapted() for _ in range(LAYERS))
        self.head = Tied(self.embedding)

    def logits(self, tokens: Tensor) -> Tensor:
        """Like ``SharedBase``'s decoding: a pass that does not begin at the root."""
        states = self.embedding(tokens)
        for layer in self.layers:
            states = layer(states)
        return self.head(states)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def tokens_of(number: int, rows: int = 4) -> Tensor:
    return torch.randint(WORDS, (rows, 5), generator=torch.Generator().manual_seed(number))


def loss_of(model: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """A sum over rows, so that the shares of ranks and micro-batches add up."""
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / 16


# ---- what two ranks find ---------------------------------------------------------------------------------------------


class Ranks:
    """A rank's engine, and beside it the whole copy that it is held against."""

    def __init__(self, topology: Topology) -> None:
        self.me, self.plain, sharded = topology.rank, Net(), Net()
        self.plain_optimizer = torch.optim.SGD(self.plain.trained(), lr=LEARNING_RATE)
        settings = deepspeed_settings(
            topology, rows_per_rank=1, max_grad_norm=1e6, largest_adapter=WIDTH * RANK, trained=6 * WIDTH * RANK
        )
        optimizer = torch.optim.SGD(sharded.trained(), lr=LEARNING_RATE)
        self.engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizer, config=settings)
        self.net: Net = self.engine.module
        self.parameters, self.whole = dict(self.net.named_parameters()), dict(self.plain.named_parameters())

    def train(self, number: int) -> None:
        """An update of both: each rank has two micro-batches of its own, the copy all four at once."""
        batches = [tokens_of(10 * number + i) for i in range(4)]
        for place, tokens in enumerate(batches[2 * self.me : 2 * self.me + 2]):
            backward(self.engine, loss_of(self.engine, tokens), last=place == 1)
        step(self.engine)
        torch.stack([loss_of(self.plain, tokens) for tokens in batches]).sum().backward()
        self.plain_optimizer.step()
        self.plain_optimizer.zero_grad()

    def furthest(self) -> float:
        """The largest difference of any parameter to the copy's, all gathered one by one."""
        found = []
        for name, parameter in self.parameters.items():
            with whole([parameter]):
                found.append((parameter - self.whole[name]).abs().max().item())
        return max(found)

    def here(self) -> list[str]:
        return [name for name, parameter in self.parameters.items() if is_here(parameter)]

    def hooks(self) -> dict[str, list[Any]]:
        """Every forward hook of every module, in the order in which they run."""
        return {
            f"{name}{kind}": [(number, hook) for number, hook in getattr(module, kind).items()]
            for name, module in self.net.named_modules()
            for kind in ("_forward_pre_hooks", "_forward_hooks")
        }

    def pass_error(self, number: int) -> float:
        """Of one forward pass that does not begin at the engine's root."""
        with torch.no_grad():
            return (self.net.logits(tokens_of(number)) - self.plain.logits(tokens_of(number))).abs().max().item()

    def knows_order(self) -> bool:
        return bool(self.engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace())


def shards(ranks: Ranks) -> dict[str, Any]:
    """The parts of all ranks against the whole, and what is told of sizes."""
    parts = all_gather({name: own_part(p) for name, p in ranks.parameters.items()})
    joined = {name: torch.cat([part[name][0] for part in parts]) for name in ranks.parameters}
    return {
        "stage": (zero_stage(ranks.engine), is_sharded(ranks.engine), offloads_optimizer(ranks.engine)),
        "all managed": all(map(is_partitioned, ranks.parameters.values())),
        "shapes": {name: (full_shape(p), element_count(p)) for name, p in ranks.parameters.items()},
        "parts differ": [n for n in joined if not torch.equal(joined[n], ranks.whole[n].detach().flatten())],
        "starts": [parts[1][name][1] == len(parts[0][name][0]) for name in joined],
        "empty parts": [name for name in FROZEN if not all(len(part[name][0]) for part in parts)],
    }


def gathers(ranks: Ranks) -> dict[str, Any]:
    """``whole``, to read and to write."""
    name = FROZEN[1]
    parameter, expected = ranks.parameters[name], ranks.whole[name]
    before = ranks.here()
    with whole([parameter]):
        read = torch.equal(parameter, expected), sorted(set(ranks.here()) - set(before))
        with whole([parameter]):
            pass
        nested = is_here(parameter) and torch.equal(parameter, expected)
    after = ranks.here() == before
    with whole([parameter], write=True):
        parameter.data.fill_(7.0 + ranks.me)
    with whole([parameter]):
        written = parameter.unique().tolist()
    with whole([parameter], write=True):
        parameter.data.copy_(expected if ranks.me == 0 else torch.zeros_like(expected))
    return {"read": read, "nested": nested, "after": after, "written": written, "error": ranks.furthest()}


def window(ranks: Ranks) -> dict[str, Any]:
    """``gathered``: what lies here inside, with a different number of passes on each rank, and what is there after."""
    hooks, before = ranks.hooks(), ranks.here()
    with gathered(ranks.engine):
        inside = {
            "all here": len(ranks.here()) == len(ranks.parameters),
            "hooks": [hook.__qualname__ for hooks in ranks.hooks().values() for _, hook in hooks],
            "equal": all(torch.allclose(p, ranks.whole[name], atol=1e-6) for name, p in ranks.parameters.items()),
            "errors": [ranks.pass_error(number) for number in range(PASSES[ranks.me])],
            "still here": len(ranks.here()) == len(ranks.parameters),
        }
    return {
        **inside,
        "hooks before": sum(map(len, hooks.values())),
        "here": before,
        "hooks are back": ranks.hooks() == hooks,
        "here as before": ranks.here() == before,
        "knows the order": ranks.knows_order(),
    }


def failing_window(ranks: Ranks) -> dict[str, Any]:
    """What is there after an exception in the window, and whether training goes on as if there had been none."""
    hooks, before, told = ranks.hooks(), ranks.here(), ""
    try:
        with gathered(ranks.engine):
            ranks.pass_error(0)
            raise DataError("in the window")
    except DataError as error:
        told = str(error)
    found = {"told": told, "hooks are back": ranks.hooks() == hooks, "here as before": ranks.here() == before}
    found["knows the order"] = ranks.knows_order()
    if found["hooks are back"]:  # or the next pass would find empty tensors
        ranks.train(3)
        found["error after"] = ranks.furthest()
    return found


def streams(ranks: Ranks) -> dict[str, Any]:
    """Passes in step: rank 1 has more to do; then it fails between two of them."""
    idle: list[float] = []
    errors: list[float] = []
    with streamed(ranks.engine) as pace, pace.together():
        for number in range(PASSES[ranks.me]):
            with pace.forward_pass():
                errors.append(ranks.pass_error(number))
        pace.until_others_finish(lambda: idle.append(ranks.pass_error(9)))
    told = ""
    try:
        with streamed(ranks.engine) as pace, pace.together():
            with pace.forward_pass():
                ranks.pass_error(1)
            if ranks.me == 1:
                raise DataError("a bad row")
            pace.until_others_finish(lambda: ranks.pass_error(9))
    except RLHFError as error:
        told = f"{type(error).__name__}: {error}"
    ranks.train(4)
    return {"errors": errors, "idle": idle, "told": told, "here": ranks.here(), "error after": ranks.furthest()}


def seen(topology: Topology) -> dict[str, Any]:
    """All of it on one engine, one after another."""
    ranks = Ranks(topology)
    found: dict[str, Any] = {"shards": shards(ranks), "gathers": gathers(ranks)}
    for number in range(3):  # ZeRO learns in the second in which order modules run
        ranks.train(number)
    found["error of updates"], found["knows the order"] = ranks.furthest(), ranks.knows_order()
    found["window"], found["failing_window"] = window(ranks), failing_window(ranks)
    if found["failing_window"]["hooks are back"]:
        found["streams"] = streams(ranks)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_worker("tests.distributed.test_zero3_on_two_ranks:seen", tmp_path_factory.mktemp("seen"), seconds=300)


ADAPTERS = [f"layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("down", "up")]
CLOSE = 1e-5


def test_the_parts_of_all_ranks_are_the_parameter(ranks: list[dict[str, Any]]) -> None:
    shapes = {name: (tuple(p.shape), p.numel()) for name, p in Net().named_parameters()}
    for found in (rank["shards"] for rank in ranks):
        assert found["stage"] == (3, True, False) and found["all managed"]
        assert found["shapes"] == shapes and found["parts differ"] == [] and all(found["starts"])
        assert found["empty parts"] == [], "the base is shared, not held by one rank"


def test_adapters_lie_whole_everywhere_and_the_base_nowhere(ranks: list[dict[str, Any]]) -> None:
    assert all(sorted(rank["window"]["here"]) == sorted(ADAPTERS) for rank in ranks)


def test_a_parameter_that_is_read_is_whole_and_alone(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["gathers"] for rank in ranks):
        assert found["read"] == (True, [FROZEN[1]])
        assert found["nested"], "an inner gather leaves alone what lies here already"
        assert found["after"]


def test_what_rank_0_writes_all_keep(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["gathers"] for rank in ranks):
        assert found["written"] == [7.0] and found["error"] == 0.0


def test_updates_are_those_of_the_whole_model(ranks: list[dict[str, Any]]) -> None:
    """The plain sum over ranks and micro-batches, through an output layer that another module owns."""
    assert all(rank["error of updates"] < CLOSE and rank["knows the order"] for rank in ranks)


def test_in_the_window_ranks_run_as_many_passes_as_they_like(ranks: list[dict[str, Any]]) -> None:
    for found, passes in zip((rank["window"] for rank in ranks), PASSES, strict=True):
        assert found["all here"] and found["equal"] and found["still here"], "a pass frees nothing"
        assert len(found["errors"]) == passes and max(found["errors"]) < CLOSE
        left = [name for name in found["hooks"] if not name.startswith("DeepSpeedEngine.")]
        assert left == [] and found["hooks before"] > len(found["hooks"]), "the engine's own know nothing of shards"


def test_after_the_window_everything_is_as_it_was(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["window"] for rank in ranks):
        assert found["hooks are back"] and found["here as before"]
        assert found["knows the order"], "or the next micro-batch gathers every adapter one by one"


def test_after_an_exception_in_the_window_too(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["failing_window"] for rank in ranks):
        assert found["told"] == "in the window"
        assert found["hooks are back"] and found["here as before"] and found["knows the order"]
        assert found["error after"] < CLOSE


def test_streamed_passes_are_those_of_the_whole_model_and_equally_many(ranks: list[dict[str, Any]]) -> None:
    for found, passes in zip((rank["streams"] for rank in ranks), PASSES, strict=True):
        assert len(found["errors"]) == passes and len(found["idle"]) == max(PASSES) - passes
        assert max(found["errors"] + found["idle"]) < CLOSE


def test_a_failure_while_streaming_ends_all_ranks_and_spoils_nothing(ranks: list[dict[str, Any]]) -> None:
    assert [rank["streams"]["told"] for rank in ranks] == [
        "DataError: rank 1 failed in sampling: a bad row",
        "DataError: a bad row",
    ]
    assert all(rank["streams"]["error after"] < CLOSE for rank in ranks)
