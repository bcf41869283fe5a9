"""Sampling responses: this toolkit's decode loop against transformers' ``generate`` and ``generate_batch``.

    python bench/rollout.py        # result in bench/results/rollout.json; about 6 minutes

64 prompts, up to 128 new tokens, natural stops: useful tokens (the response, its stop token included) per second. All
have key-value memory for 16 sequences; ``generate`` uses it for batches of 16, one after another. ``generate_batch``
(continuous batching) gets fewer prompts, since it is slow on a CPU. Beside it, 16 sequences of exactly 48 tokens. The
policy's LoRA adapter is there and unmerged; temperature 1, no top-k or top-p.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import SMOKE, arguments, experiment, keep, models, prepared, rounded

SLOTS, PROMPTS, TOKENS, FIXED_TOKENS, CONTINUOUS_PROMPTS = (2, 4, 4, 4, 2) if SMOKE else (16, 64, 128, 48, 8)
Sampler = Callable[[int], int]
"""Samples with the seed given and returns the useful tokens made."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=1 if SMOKE else 3, help="default: %(default)s")
    parser.add_argument("--slots", type=int, default=SLOTS, help="default: %(default)s")
    options = parser.parse_args()
    figures = []
    for model in models(options.set):
        with tempfile.TemporaryDirectory() as folder:
            figures.append(compare(model, Path(folder), options.turns, options.slots))
    keep("rollout", rounded(figures), slots=options.slots)


def compare(model: str, folder: Path, turns: int, slots: int) -> dict[str, Any]:
    """Tokens per second of each way in each setting, and ours over ``generate``'s."""
    bench = Bench(model, folder, slots)
    natural = take_turns(
        {
            "ours": lambda seed: bench.ours(PROMPTS, TOKENS, seed, stops=True),
            "generate": lambda seed: bench.generate(PROMPTS, TOKENS, seed, stops=True),
        },
        turns,
    )
    fixed = take_turns(
        {
            "ours": lambda seed: bench.ours(slots, FIXED_TOKENS, seed, stops=False),
            "generate": lambda seed: bench.generate(slots, FIXED_TOKENS, seed, stops=False),
        },
        turns,
    )
    found = {"model": model, "natural_stops": natural, "fixed_lengths": fixed}
    return {**found, "generate_batch": bench.generate_batch(CONTINUOUS_PROMPTS, TOKENS)}


def take_turns(samplers: dict[str, Sampler], turns: int) -> dict[str, Any]:
    """Medians over turns, A B A B; a short warm-up has happened when the bench was built."""
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    lengths: dict[str, list[int]] = {name: [] for name in samplers}
    for seed, (name, sample) in itertools.product(range(turns), samplers.items()):
        began = time.perf_counter()
        tokens = sample(seed)
        rates[name].append(tokens / (time.perf_counter() - began))
        lengths[name].append(tokens)
        print(f"turn {seed}  {name}: {tokens} tokens, {rates[name][-1]:.1f} a second", file=sys.stderr, flush=True)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["generate"], strict=True))
    medians = {f"{name}_tokens_per_second": statistics.median(found) for name, found in rates.items()}
    return {**medians, "ratio": ratio, "useful_tokens": lengths}


class Bench:
    """The prepared run's model and prompts, and the ways to sample from it."""

    def __init__(self, model: str, folder: Path, slots: int) -> None:
        changes = {"rollout.prompts_per_rollout": PROMPTS, "rollout.max_new_tokens": TOKENS, "data.system_prompt": ""}
        changes["rollout.slots"] = slots
        self.run = prepared(experiment(model, folder, changes))
        self.slots, self.tokenizer = slots, self.run.trainer.processing_class
        self.shared = self.run.trainer.model.eval()
        self.maker = self.run.trainer.maker
        self.sampler, self.sampling = self.maker.scored_sampler.sampler, self.maker.scored_sampler.sampling
        self.plain = plain_peft_model(self.shared, self.run, folder)
        self.ours(2, 4, 0, stops=False)
        self.generate(2, 4, 0, stops=False)

    def ours(self, prompts: int, tokens: int, seed: int, *, stops: bool) -> int:
        """As a run samples: its ``Sampler``, which decodes in ``rollout.slots`` slots."""
        from rlhf_toolkit.types import PromptBatch

        sampling = self.sampling
        sampling = replace(sampling, max_new_tokens=tokens, stop_ids=sampling.stop_ids if stops else ())
        batch = PromptBatch(tuple(self.maker.source.prompts[:prompts]), samples=(0,) * prompts)
        with self.sampler.opened(self.shared) as shared:
            return int(self.sampler.decode(shared, batch, sampling, stream=(seed,)).lengths.sum())

    def generate(self, prompts: int, tokens: int, seed: int, *, stops: bool) -> int:
        """transformers' ``generate`` in batches of ``slots``."""
        torch.manual_seed(seed)
        ids = [list(prompt.token_ids) for prompt in self.maker.source.prompts[:prompts]]
        return sum(self._generate(ids[i : i + self.slots], tokens, stops) for i in range(0, prompts, self.slots))

    def _generate(self, ids: list[list[int]], tokens: int, stops: bool) -> int:
        width, sampling = max(map(len, ids)), self.sampling
        device = next(self.plain.parameters()).device
        inputs = torch.tensor([[sampling.pad_id] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        with torch.no_grad():
            out = self.plain.generate(
                input_ids=inputs,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=tokens,
                eos_token_id=list(sampling.stop_ids) if stops else None,
                pad_token_id=sampling.pad_id,
            )
        return sum(self._useful(row, stops) for row in out[:, width:].tolist())

    def _useful(self, row: list[int], stops: bool) -> int:
        ends = [i for i, token in enumerate(row) if token in self.sampling.stop_ids] if stops else []
        return ends[0] + 1 if ends else len(row)

    def generate_batch(self, prompts: int, tokens: int) -> dict[str, Any]:
        """transformers' continuous batching; what it raises where it does not run."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        sampling = self.sampling
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            eos_token_id=sampling.stop_ids[0],
            pad_token_id=sampling.pad_id,
        )
        cache = ContinuousBatchingConfig(num_blocks=16) if SMOKE else None  # by default nearly all memory that is free
        ids = [list(prompt.token_ids) for prompt in self.maker.source.prompts[:prompts]]
        model = self.plain.get_base_model()
        model.set_attn_implementation("sdpa")
        began = time.perf_counter()
        try:
            with torch.no_grad():
                out = model.generate_batch(ids, config, cache)
        except Exception as error:  # reported, since this contestant is not ours to mend
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        made = sum(len(answer.generated_tokens) for answer in out.values())
        return {"prompts": prompts, "useful_tokens": made, "tokens_per_second": made / (time.perf_counter() - began)}


def plain_peft_model(shared: Any, run: Any, folder: Path) -> Any:
    """A plain PeftModel with the policy's adapter, as anyone would load it for ``generate``."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run.trainer.save_model(str(folder / "saved"))
    base = AutoModelForCausalLM.from_pretrained(run.experiment.model.name, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(folder / "saved/policy"))
    return model.to(next(shared.parameters()).device).eval()


if __name__ == "__main__":
    main()
