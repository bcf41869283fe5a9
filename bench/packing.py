"""The role pass and update of a micro-batch, packed against padded rows: 16 real prompts, responses of 48 tokens.

    python bench/packing.py CASE [FOLDER OF SmolLM2-135M-Instruct]        # result in bench/results/packing_CASE.json
    python bench/packing.py plan                    # seconds that planning 4,096 rows takes; no model

A bfloat16 base, LoRA of rank 16 on policy and value, prompts of recipes/sentiment under the model's own system prompt.
A case is one micro-batch: ``prompts``, 16 of them; ``ragged``, the same with responses of 12 to 48 tokens; ``groups``,
4 prompts with 4 responses each.
"""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch
from common import SMOKE, TINY, arguments, fetch_smollm, keep, model_folder, paired_medians

from rlhf_toolkit.data.layout import TokenLayout, packed_layout, padded_layout
from rlhf_toolkit.data.packing import packed_micro_batches
from rlhf_toolkit.data.prompts import load_rows, tokenise_prompts
from rlhf_toolkit.distributed.topology import Launch, Topology
from rlhf_toolkit.models.loading import build_ppo_roles, load_base, load_model_config, load_tokenizer, lora_config
from rlhf_toolkit.models.shared_base import SharedBase

ROWS, LONGEST = 16, 48
CASES = {"prompts": (1, LONGEST), "ragged": (1, 12), "groups": (4, LONGEST)}


PLANNED = {"prompts": 1, "groups": 8}
"""Responses to each of the prompts, 4,096 in all."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("case", choices=(*CASES, "plan"))
    parser.add_argument("folder", nargs="?", help="of SmolLM2-135M-Instruct; default: fetched once")
    options = parser.parse_args()
    if options.case == "plan":
        keep("packing_plan", [{name: plan(group) for name, group in PLANNED.items()}])
        return
    name = model_folder(TINY) if SMOKE else options.folder or fetch_smollm()
    keep(f"packing_{options.case}", [compare(*load(name), *CASES[options.case])])


def plan(group: int, *, rows: int = 4096, budget: int = 16384) -> dict[str, float]:
    """Seconds of cutting ``rows`` into micro-batches: prompts of 40 to 240 tokens, of which a template is 20, and
    responses of 10 to 400."""
    draw, prompts = random.Random(0), list[tuple[int, ...]]()
    template = tuple(range(20))
    for _ in range(rows // group):
        prompts += [(*template, *draw.choices(range(50000), k=draw.randint(20, 220)))] * group
    draw.shuffle(prompts)
    lengths = [len(prompt) + draw.randint(10, 400) for prompt in prompts]
    began = time.perf_counter()
    (share,) = packed_micro_batches(range(rows), lengths, prompts, ranks=1, budget=budget)
    return {"rows": rows, "micro_batches": len(share), "seconds": time.perf_counter() - began}


def load(name: str) -> tuple[SharedBase, list[tuple[int, ...]]]:
    """The roles on the model, and the recipe's prompts as tokens."""
    here = Topology(Launch.from_environment({}), rank=0, world_size=1, device=torch.device("cpu"))
    base = load_base(name, load_model_config(name), here, dtype=torch.bfloat16, attention="sdpa")
    adapter = lora_config(rank=16, alpha=32, rslora=False, target_modules="all-linear", exclude_modules=[])
    found = tokenise_prompts(
        load_rows("recipes/sentiment/train.jsonl", "train"),
        load_tokenizer(name),
        column="prompt",
        chat_template=True,
        system_prompt=None,
        max_prompt_tokens=512,
    )
    return build_ppo_roles(base, adapter, policy_adapter=None), [prompt.token_ids for prompt in found.prompts]


def compare(shared: SharedBase, prompts: list[tuple[int, ...]], group: int, least: int) -> dict[str, Any]:
    """Tokens and median milliseconds of both layouts, and their ratios."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(prompts), generator=generator)[: ROWS // group].tolist()
    rows = [prompts[number] for number in chosen for _ in range(group)]
    starts = torch.tensor([len(row) for row in rows])
    sizes = torch.randint(least, LONGEST + 1, (ROWS,), generator=generator)
    sequences = torch.randint(100, 40000, (ROWS, int((starts + sizes).max())), generator=generator)
    for row, prompt in enumerate(rows):
        sequences[row, : len(prompt)] = torch.tensor(prompt)
    layouts = [make(sequences, starts, sizes) for make in (padded_layout, packed_layout)]
    figures: dict[str, Any] = {"real_tokens": int((starts + sizes).sum())}
    figures |= dict(zip(("padded_tokens", "packed_tokens"), (one.tokens.numel() for one in layouts), strict=True))
    for name, work in (("role_pass", score), ("update", update)):
        runs = [partial(work, shared, layout) for layout in layouts]
        rows_ms, packed_ms = paired_medians(runs[0], runs[1], repeats=2)
        figures |= {f"{name}_padded_ms": rows_ms, f"{name}_packed_ms": packed_ms, f"{name}_ratio": packed_ms / rows_ms}
    return figures


def score(shared: SharedBase, layout: TokenLayout) -> None:
    with torch.no_grad():
        shared.eval()(layout, roles=("policy", "value", "reference"))


def update(shared: SharedBase, layout: TokenLayout) -> None:
    out = shared.train()(layout, roles=("policy", "value"))
    (out.policy_logprobs.sum() + out.token_values.square().sum()).backward()


if __name__ == "__main__":
    main()
