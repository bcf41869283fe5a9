"""Sections that measure: decoding beside ``generate``, memory beside the estimate, updates beside the card's rate."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from common import milliseconds, prepared
from exam.agreement import rates
from exam.subject import (
    DEVICE,
    UNSTOPPED,
    Exam,
    config_of,
    made_on,
    measured,
    random_base,
    sections_of,
)

UNDERESTIMATE, OVERESTIMATE = 1.05, 1.1  # measured over predicted, predicted over measured


# ---- 6: decoding and memory ------------------------------------------------------------------------------------------


def decode(exam: Exam) -> None:
    """For each shape a rollout and its update, tokens a second beside those of ``generate``, and bytes beside the
    estimate's."""
    for shape in exam.sizes.shapes:
        with emptied():
            found = ours(exam, shape)
        with emptied():
            found["generate_tokens_per_second"] = generate(exam, shape, found["prompt_tokens"])
        found["ratio"] = found["tokens_per_second"] / found["generate_tokens_per_second"]
        exam.report.figure(**{shape: found})
        if DEVICE == "cuda":  # speed and memory of a rehearsal say nothing
            exam.report.check(f"{shape}: generate's rate over ours", 1 / found["ratio"], 1.0)
            check_memory(exam, shape, found)


def check_memory(exam: Exam, name: str, found: dict[str, Any]) -> None:
    """Measured bytes against predicted ones, of a rollout and of an update."""
    for phase, needed in found["predicted_gib"].items():
        over = found[f"{phase}_gib"] / needed
        exam.report.check(f"{name}: memory of a {phase}, measured over predicted", over, UNDERESTIMATE)
        exam.report.check(f"{name}: memory of a {phase}, predicted over measured", 1 / over, OVERESTIMATE)


@contextmanager
def emptied() -> Iterator[None]:
    """What the block made is gone afterwards, so that the next model has the whole card."""
    try:
        yield
    finally:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def seven_billion(exam: Exam) -> None:
    """The largest shape with its layers in 4 bits where 24 GiB are free, and in bfloat16 on the whole card; both with
    gradient checkpointing."""
    shape = exam.sizes.shapes[-1]
    for kind in ("nf4", "none"):
        changes = {"model__quantization": kind, "model__gradient_checkpointing": True}
        with emptied(), free_of(24) if kind == "nf4" else nullcontext():
            found = ours(exam, shape, **changes)
        exam.report.figure(**{kind: found})
        if DEVICE == "cuda":
            check_memory(exam, kind, found)


@contextmanager
def free_of(gib: float) -> Iterator[None]:
    """Inside, the GPU has no more than ``gib`` GiB free: the rest is taken."""
    if DEVICE == "cuda":
        free, _ = torch.cuda.mem_get_info()
        taken = torch.empty(max(0, free - int(gib * 2**30)), dtype=torch.uint8, device=DEVICE)
        yield
        del taken
    else:
        yield


def ours(exam: Exam, shape: str, **changes: Any) -> dict[str, Any]:
    """Two rollouts and updates of ``shape`` by the trainer; the second is timed. Responses have their full length."""
    sizes = exam.sizes
    name = "_".join(["decode", shape, *map(str, changes.values())])
    sections = sections_of(exam, shape, name, model__dtype="bfloat16", ppo__num_rollouts=2, **UNSTOPPED, **changes)
    with made_on():
        run = prepared(sections, stops=False)
    trainer = run.trainer
    model, loader = trainer.model, iter(trainer.get_train_dataloader())
    found: dict[str, Any] = {}
    optimizer = trainer.create_optimizer()
    placement = trainer.maker.scored_sampler.sampler.place(model)
    for _ in range(2):
        trainer.maker.scored_sampler.clock.take()
        with measured(found, "rollout"):
            batch = next(loader)
        with measured(found, "update"):
            trainer.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        phases = trainer.maker.scored_sampler.clock.take()
    tokens = sizes.prompts * sizes.new_tokens
    prompts = trainer.maker.source.prompts[: sizes.prompts]
    found |= {
        "slots": placement.slots,
        "placement": placement.description(),
        "predicted_gib": predicted(trainer.maker.scored_sampler.sampler),
        "phases": phases,
        "tokens_per_second": tokens / phases["gen"],
        "prompt_tokens": [len(prompt.token_ids) for prompt in prompts],
    }
    run.trainer.maker.scored_sampler.scorer.close()
    return found


def predicted(sampler: Any) -> dict[str, float]:
    """GiB that the estimate expects of a rollout and of an update once the optimizer has its moments, which are there
    before either is measured."""
    placement, later = sampler.placement, sampler.estimate.needs.later_bytes
    return {"rollout": (placement.needed - later) / 2**30, "update": (placement.update - later) / 2**30}


def generate(exam: Exam, shape: str, lengths: list[int]) -> float:
    """Tokens a second of transformers' ``generate`` with an unmerged adapter of the same kind, all prompts in one
    batch, left-padded; the second of two calls."""
    from peft import LoraConfig, get_peft_model

    sizes = exam.sizes
    base = random_base(config_of(shape, sizes.vocabulary), dtype=torch.bfloat16, attention="sdpa")
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter).to(DEVICE).eval()
    width = max(lengths)
    tokens = torch.randint(6, sizes.vocabulary, (len(lengths), width), device=DEVICE)
    mask = torch.arange(width, device=DEVICE)[None] >= width - torch.tensor(lengths, device=DEVICE)[:, None]
    count = sizes.new_tokens
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 2}
    length = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None}

    def call() -> None:
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=mask.long(), **sampling, **length)
        assert out.shape[1] == width + count, out.shape

    call()
    return len(lengths) * count / (milliseconds(call) / 1e3)


# ---- 7: updates ------------------------------------------------------------------------------------------------------


def rate(exam: Exam) -> None:
    """Forward and backward of policy and value over the time they take, against the card's rate of one large product
    and of the base's own products, all in bfloat16."""
    card = rates(exam.sizes.matrix)["matrix_tflop_per_s"]
    exam.report.figure(card_tflop_per_s=card)
    for shape in exam.sizes.shapes:
        with emptied():
            found = update_rate(exam, shape)
        found["fraction_of_card"] = found["tflop_per_s"] / card
        exam.report.figure(**{shape: found})


def update_rate(exam: Exam, shape: str) -> dict[str, Any]:
    """TFLOP/s of updates of ``shape``, packed; the counted work is that of ``bench/roofline.py``."""
    from one_update import adapted, micro_batches, update
    from roofline import ROLES, attention_flops, bare_products, base_flops, head_flops

    shared = adapted(random_base(config_of(shape, exam.sizes.vocabulary), dtype=torch.bfloat16))
    prompt, response = exam.sizes.prompt_words, exam.sizes.new_tokens
    rows = max(1, exam.sizes.update_tokens[shape] // (prompt + response))
    of_rows = {"sequences": rows, "prompt": prompt, "response": response}
    layouts = list(micro_batches(shared, rows, vocabulary=exam.sizes.vocabulary, **of_rows))
    tokens = sum(ROLES * layout.tokens.numel() for layout in layouts)
    base = base_flops(shared, tokens)
    work = base + attention_flops(shared, **of_rows) + head_flops(shared, rows * response)
    products = bare_products(shared, tokens)
    found: dict[str, Any] = {"tokens": tokens, "tflop": work / 1e12}
    update(shared, layouts)
    with measured(found, "one_update"):
        update(shared, layouts)
    products()
    seconds = statistics.median(milliseconds(lambda: update(shared, layouts)) for _ in range(exam.sizes.turns)) / 1e3
    bare = statistics.median(milliseconds(products) for _ in range(exam.sizes.turns)) / 1e3
    return {
        **found,
        "seconds": seconds,
        "tflop_per_s": work / seconds / 1e12,
        "bare_products_tflop_per_s": base / bare / 1e12,
        "fraction_of_bare_products": work / seconds / (base / bare),
    }
