"""How near the update comes to the machine's own matrix rate, and decoding to its memory rate; what takes the rest.

    python bench/roofline.py        # result in bench/results/roofline.json; about 2 minutes

Update: operations that the base's products, attention and the output layer need, forward and backward of policy and
value, over the time it takes, against the rate of bfloat16 products of the same shapes, measured between the updates.
Adapters, norms and everything else are not counted as work. Decoding: bytes of the weights that a step must read over
its time, against the rate at which those very weights are read. 16 sequences.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, keep, milliseconds, models, rounded
from one_update import DEVICE, PROMPT, RESPONSE, ROWS, linear_shapes, load, micro_batches, update
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from rlhf_toolkit.models.decoding_weights import EXACT, decoding_weights
from rlhf_toolkit.models.roles import POLICY
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import SlotCache

ROLES, ROUNDS = 2, 5
GROUPS = {  # first match of the operation's name
    "products": ("aten::mm", "aten::addmm", "aten::linear", "mkldnn::_linear"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "attention"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::_to_copy", "aten::index", "aten::gather"),
    "functions' own": ("RoleLora", "TokenScores", "RMSNorm", "GatedProduct", "Backward"),
}


def main() -> None:
    options = arguments(__doc__).parse_args()
    keep("roofline", rounded([line for model in models(options.set) for line in (both(model))]))


def both(model: str) -> list[dict[str, Any]]:
    """The figures of update and decoding."""
    shared = load(model)
    return [{"model": model, **update_figures(shared)}, {"model": model, **decode_figures(shared)}]


# ---- update ----------------------------------------------------------------------------------------------------------


def update_figures(shared: SharedBase) -> dict[str, Any]:
    """Rates in GFLOP/s; updates and bare products take turns."""
    layouts = list(micro_batches(shared, ROWS))
    tokens = sum(ROLES * layout.tokens.numel() for layout in layouts)
    products = bare_products(shared, tokens)
    work = {
        "base": base_flops(shared, tokens),
        "attention": attention_flops(shared),
        "output layer": head_flops(shared),
    }
    update(shared, layouts)
    products()
    times = [(milliseconds(lambda: update(shared, layouts)), milliseconds(products)) for _ in range(ROUNDS)]
    seconds, bare = (statistics.median(column) / 1e3 for column in zip(*times, strict=True))
    rate, machine = sum(work.values()) / seconds / 1e9, work["base"] / bare / 1e9
    return {
        "of": "update",
        "tokens": tokens,
        "gflop": {name: value / 1e9 for name, value in work.items()},
        "seconds": seconds,
        "bare_products_seconds": bare,
        "rate": rate,
        "machine_rate": machine,
        "fraction": rate / machine,
        "time_by_group": by_group(lambda: update(shared, layouts)),
        "matrix_products_by_shape": by_shape(lambda: update(shared, layouts), tokens),
    }


def bare_products(shared: SharedBase, tokens: int) -> Callable[[], None]:
    """Every product of the base in one forward and backward, and nothing else: x W^T, and dy W."""
    shapes = linear_shapes(shared.causal_lm.config)
    makes: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    left = {size: torch.randn(tokens, size, **makes) for size in {side for shape in shapes for side in shape}}
    weights = {shape: torch.randn(shape[1], shape[0], **makes) for shape in shapes}

    def run() -> None:
        for (inputs, outputs), count in shapes.items():
            weight = weights[inputs, outputs]
            for _ in range(count):
                torch.mm(left[inputs], weight.t())
                torch.mm(left[outputs], weight)

    return run


def base_flops(shared: SharedBase, tokens: int) -> float:
    """Forward, and backward into the input: the base is frozen."""
    return sum(
        2 * 2 * tokens * inputs * outputs * count
        for (inputs, outputs), count in linear_shapes(shared.causal_lm.config).items()
    )


def attention_flops(
    shared: SharedBase, *, sequences: int = ROWS, prompt: int = PROMPT, response: int = RESPONSE
) -> float:
    """Scores and mixed values of the causal half: two products forward, four backward."""
    config = shared.causal_lm.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    length = prompt + response
    return 6 * 2 * ROLES * sequences * width * length * (length + 1) / 2 * config.num_hidden_layers


def head_flops(shared: SharedBase, positions: int = ROWS * RESPONSE) -> float:
    """Logits of the policy's response tokens, and their gradient."""
    vocabulary, size = shared.causal_lm.get_output_embeddings().weight.shape
    return 2 * 2 * positions * vocabulary * size


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode_figures(shared: SharedBase) -> dict[str, Any]:
    """Milliseconds of a step of a rollout after 64 tokens, against the time in which its weights can be read."""
    with decoding_weights(shared.eval(), POLICY, EXACT), torch.inference_mode():
        return step_figures(shared)


def step_figures(shared: SharedBase) -> dict[str, Any]:
    """The same, inside what a rollout runs in."""
    tokens = torch.randint(100, 40000, (ROWS, 64), device=DEVICE)
    config = shared.causal_lm.config
    prefilled, places, rows = DynamicCache(config=config), torch.arange(64, device=DEVICE), list(range(ROWS))
    shared.next_token_logits(tokens, torch.ones_like(tokens), places.expand(ROWS, -1), prefilled)
    cache = SlotCache(config, slots=ROWS, capacity=256, device=torch.device(DEVICE))
    cache.make_room([], entering=64)
    cache.admit(prefilled, torch.ones_like(tokens), [64] * ROWS, rows, rows)

    def step() -> None:
        cache.make_room([0])
        position = torch.full((ROWS, 1), cache.columns.now, device=DEVICE)
        shared.next_token_logits(tokens[:, :1], cache.step_mask, position, cache)
        cache.advance()

    weights = [m.weight for m in shared.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.bfloat16]
    count = sum(weight.numel() * weight.element_size() for weight in weights)

    def read() -> None:
        for weight in weights:
            weight.view(torch.int32).sum(dtype=torch.int32) if weight.is_cuda else weight.view(torch.int32).amax()

    step()
    read()
    times = [(milliseconds(step), milliseconds(read)) for _ in range(20)]
    taken, reading = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "of": "decoding",
        "step_ms": taken,
        "weights_mb": count / 1e6,
        "read_ms": reading,
        "memory_gb_per_s": count / reading / 1e6,
        "fraction": reading / taken,
        "operations": operations(step),
        "time_by_group": by_group(step),
    }


# ---- what takes the time ---------------------------------------------------------------------------------------------


def events(action: Callable[[], object], **options: Any) -> Any:
    """The profiler's averages over one call."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities, record_shapes=bool(options)) as profiler:
        action()
    return profiler.key_averages(**options)


def own_time(event: Any) -> float:
    """Microseconds on the device that does the work."""
    return event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total


def by_group(action: Callable[[], object]) -> dict[str, float]:
    """Share of each group of operations in one call."""
    found = events(action)
    total, shares = sum(map(own_time, found)), dict.fromkeys([*GROUPS, "elementwise and other"], 0.0)
    for event in found:
        names = (name for name, starts in GROUPS.items() if any(start in event.key for start in starts))
        shares[next(names, "elementwise and other")] += own_time(event) / total
    return shares


def by_shape(action: Callable[[], object], tokens: int) -> dict[str, float]:
    """Share of the base's products, of the adapters' thin ones, and of the output layer's in one call."""
    found = events(action, group_by_input_shape=True)
    total, shares = sum(map(own_time, found)), {"base": 0.0, "adapters": 0.0, "output layer": 0.0}
    for event in found:
        if event.key.startswith(("aten::mm", "aten::addmm")):
            sides = [side for shape in event.input_shapes if isinstance(shape, list) for side in shape]
            kind = "base" if tokens in sides else "adapters" if 16 in sides else "output layer"
            shares[kind] += own_time(event) / total
    return shares


def operations(action: Callable[[], object]) -> int:
    """How many ATen operations one call runs."""
    return sum(event.count for event in events(action) if event.key.startswith("aten::"))


if __name__ == "__main__":
    main()
