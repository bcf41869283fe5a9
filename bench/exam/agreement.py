"""Sections that ask whether the GPU computes what the CPU does: environment, update, attention."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, prepared, versions
from exam.subject import DEVICE, Exam, config_of, made_on, random_base, relative, sections_of, wait

from rlhf_toolkit.models.quantised import ERROR, Quantisation, dequantised, quantised
from tests.support.values import there

IMPORTED = ("deepspeed", "peft", "datasets", "pyarrow", "trl.experimental.ppo", "wandb", "vaderSentiment")
NEEDED = IMPORTED[:4]
CLOSE = 1e-4


# ---- 1: environment --------------------------------------------------------------------------------------------------


def environment(exam: Exam) -> None:
    """The machine, versions, what can be imported, and the rates of one large product and of one large copy."""
    exam.report.figure(**machine(), versions=versions(), python=sys.version.split()[0], torch_cuda=torch.version.cuda)
    exam.report.figure(nvcc=shutil.which("nvcc"), cuda_home=os.environ.get("CUDA_HOME"))
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        exam.report.figure(
            gpu_gib=properties.total_memory / 2**30,
            capability=f"{properties.major}.{properties.minor}",
            driver=said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            nccl=".".join(map(str, torch.cuda.nccl.version())),
            bf16=torch.cuda.is_bf16_supported(),
        )
    exam.report.figure(**rates(exam.sizes.matrix))
    imports = {name: imported(name) for name in IMPORTED}
    exam.report.figure(imports=imports)
    exam.report.check("the packages that the toolkit needs import", all(imports[name][0] for name in NEEDED))


def imported(name: str) -> tuple[bool, str]:
    """Whether a module imports, and its version or why not."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # reported: other people's packages raise anything
        return False, f"{type(error).__name__}: {error}"[:300]
    return True, str(getattr(module, "__version__", ""))


def said_by(*command: str) -> str | None:
    """What a command prints, or None where there is none or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else None


def rates(size: int) -> dict[str, float]:
    """TFLOP/s of a square product in bfloat16, and GB/s of a copy, bytes read and written; best of ten."""
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    other = torch.empty_like(left.repeat(4, 1))
    source = left.repeat(4, 1)
    found = {"matrix_tflop_per_s": (lambda: left @ right, 2 * size**3 / 1e12)}
    found["copy_gb_per_s"] = (lambda: other.copy_(source), 2 * source.nbytes / 1e9)
    result = {}
    for name, (action, work) in found.items():
        seconds = []
        for _ in range(13):
            wait()
            began = time.perf_counter()
            action()
            wait()
            seconds.append(time.perf_counter() - began)
        result[name] = work / min(seconds[3:])
    return result


# ---- 2: the same update on both --------------------------------------------------------------------------------------


def update(exam: Exam) -> None:
    """One rollout and its update by the trainer itself, in float32 and over a base of each kind, on the GPU and on a
    CPU: tokens, log-probs, gradients and parameters. Without a GPU the other side packs nothing."""
    sections_of(exam, "tiny", "update_here")  # both sides find prompts and config, neither writes them
    script = str(Path(__file__).parents[1] / "gpu_exam.py")
    command = [sys.executable, script, "--section", "update_other", "--work", str(exam.work)]
    command += [] if exam.sizes.small != "tiny" else ["--rehearse"]
    without_gpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    other = subprocess.Popen(command, env={**os.environ, **without_gpu})
    mine = {kind: one_update(exam, f"update_here_{kind}", packing="on", kind=kind) for kind in Quantisation}
    if other.wait() != 0:
        raise RuntimeError("the update on the CPU failed; its output is above")
    theirs = torch.load(exam.work / "update_other.pt")
    for kind in Quantisation:
        compare(exam, kind, mine[kind], theirs[kind])


def update_other(exam: Exam) -> None:
    """The CPU's side of ``update``, in a process that sees no GPU."""
    packing = "on" if torch.version.cuda and exam.sizes.small != "tiny" else "off"
    found = {str(k): one_update(exam, f"update_there_{k}", packing=packing, kind=k) for k in Quantisation}
    torch.save(found, exam.work / "update_other.pt")


def compare(exam: Exam, kind: str, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every tensor of both sides: gradients relative to the largest of their group, all else absolutely."""
    of = "" if kind == Quantisation.NONE else f"{kind}: "
    exam.report.check(f"{of}the same tokens are sampled", torch.equal(mine["sequences"], theirs["sequences"]))
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "advantages"):
        exam.report.check(f"{of}largest difference of {name}", apart(mine[name], theirs[name]), CLOSE)
    for part in ("gradients", "parameters"):
        names = sorted(mine[part])
        scale = max(float(theirs[part][name].abs().max()) for name in names) if part == "gradients" else 1.0
        worst = max(apart(mine[part][name], theirs[part][name]) for name in names) / scale
        exam.report.check(f"{of}largest difference of {part}", worst, CLOSE)
    moved = max(apart(theirs["start"][name], theirs["parameters"][name]) for name in theirs["start"])
    exam.report.check(f"{of}the update moves parameters by more than that", moved > 10 * CLOSE)
    found = {"moved": moved, "metrics": mine["metrics"]}
    exam.report.figure(device=mine["device"], other=theirs["device"], **{str(kind): found})


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference; not a number where shapes differ."""
    return float((found - right).abs().max()) if found.shape == right.shape else float("nan")


def one_update(exam: Exam, name: str, *, packing: str, kind: str) -> dict[str, Any]:
    """What a run of one rollout and one update has made. AdamW's epsilon is so large that its first step is nearly
    proportional to the gradient and not to its sign."""
    from transformers import TrainerCallback

    shape = {"model__dtype": "float32", "model__value_head_std": 0.1, "rollout__max_new_tokens": 8}
    shape |= {"model__quantization": str(kind)}
    task = {"rollout__prompts_per_rollout": 8, "ppo__num_rollouts": 1, "update__packing": packing}
    rates = {f"update__{which}_lr": 1e-1 for which in ("policy", "value", "value_head")}
    small = {"update__adam_epsilon": 1.0, "update__micro_batch_tokens": 256}
    sections = sections_of(exam, "tiny", name, **shape, **task, **rates, **small)
    with made_on("cpu"):
        run = prepared(sections)
    trainer, kept = run.trainer, {}
    collect = trainer.maker.collect

    def collected(model: Any, rollout: int) -> Any:
        found = collect(model, rollout)
        kept["experience"] = found.tokens
        return found

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            kept["gradients"] = trained(lambda parameter: parameter.grad)

    def trained(part: Any) -> dict[str, torch.Tensor]:
        return {n: part(p).detach().cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    trainer.maker.collect = collected
    trainer.add_callback(Keep())
    start = trained(lambda parameter: parameter)
    run.train()
    columns = ("sequences", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "advantages")
    return {
        **{column: getattr(kept["experience"], column).cpu() for column in columns},
        "gradients": kept["gradients"],
        "parameters": trained(lambda parameter: parameter),
        "start": start,
        "device": str(run.topology.device),
        "metrics": {key: value for key, value in trainer.state.log_history[0].items() if "timing" not in key},
    }


# ---- quantised matrices ----------------------------------------------------------------------------------------------


def kernels(exam: Exam) -> None:
    """Bytes that the GPU makes of a matrix against a CPU's, and matrices that both make of the same bytes."""
    generator = torch.Generator().manual_seed(3)
    for kind in (kind for kind in Quantisation if kind != Quantisation.NONE):
        for shape in map(torch.Size, ((96, 200), (64, 96), (1024, 4864))):
            matrix = torch.randn(shape, generator=generator)
            stored = quantised(matrix, kind)
            right = dequantised(stored, shape, kind, torch.float32)
            theirs = dequantised(quantised(matrix.to(DEVICE), kind).cpu(), shape, kind, torch.float32)
            # A scale that is rounded another way turns a few numbers that lie between two.
            exam.report.check(f"{kind} {tuple(shape)}: quantised there", relative(theirs, right), ERROR[kind] / 10)
            exam.report.check(f"{kind} {tuple(shape)}: change of a matrix", relative(right, matrix), ERROR[kind])
            for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
                again = dequantised(stored.to(DEVICE), shape, kind, dtype)
                exam.report.check(f"{kind} {tuple(shape)} in {dtype}", relative(again, right), most)


# ---- 5: packed attention against padded ------------------------------------------------------------------------------


def attention(exam: Exam) -> None:
    """Packed micro-batches, on a GPU by flash attention, against padded ones: the module alone, then a model with its
    gradients; both in bfloat16, judged by float32."""
    for window in (None, exam.sizes.prompt_words):
        for name, error in kernel_errors(exam, window).items():
            exam.report.check(f"{name}, window {window}: error over dense attention's", error, 2.0)
    worst = model_errors(exam)
    exam.report.figure(model_errors=worst)
    for name in worst["packed"]:
        ratio = worst["packed"][name] / max(worst["padded"][name], 1e-9)
        exam.report.check(f"{name}: error of packed over padded", ratio, 2.0)


def layouts(exam: Exam, *, packs: bool) -> Any:
    """Sequences in groups of four with one prompt each, as a rollout with several responses has them."""
    from rlhf_toolkit.data.layout import packed_layout, padded_layout

    generator = torch.Generator().manual_seed(0)
    prompt, response, rows = exam.sizes.prompt_words, exam.sizes.new_tokens, exam.sizes.prompts
    tokens = torch.randint(6, exam.sizes.vocabulary, (rows, prompt + response), generator=generator)
    tokens[:, :prompt] = tokens[::4, :prompt].repeat_interleave(4, 0)
    responses = torch.randint(1, response + 1, (rows,), generator=generator)
    lay_out = packed_layout if packs else padded_layout
    return lay_out(tokens, torch.full((rows,), prompt), responses).to(torch.device(DEVICE))


def kernel_errors(exam: Exam, window: int | None) -> dict[str, float]:
    """For output and gradients: the packed kernel's error in bfloat16 over that of dense attention in bfloat16."""
    from rlhf_toolkit.models.segment_attention import SegmentAttention, flash_fits

    config, layout = config_of(exam.sizes.small, exam.sizes.vocabulary), layouts(exam, packs=True)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    size, count = config.hidden_size // heads, layout.tokens.numel()
    generator = torch.Generator().manual_seed(1)
    q, k, v, seed = (
        torch.randn(2, number, count, size, generator=generator).to(DEVICE)
        for number in (heads, key_heads, key_heads, heads)
    )
    attention, scale = SegmentAttention(layout), size**-0.5
    exam.report.figure(flash=flash_fits(q.bfloat16().transpose(1, 2), v.bfloat16().transpose(1, 2)))

    def run(dtype: torch.dtype, *, dense: bool) -> list[torch.Tensor]:
        parts = [part.to(dtype).detach().requires_grad_() for part in (q, k, v)]
        if dense:
            query, key, value = (part.transpose(1, 2) for part in parts)
            output = attention._in_buckets(query, key, value, scale, window)
        else:
            output = attention(*parts, scale=scale, window=window)
        return [output, *torch.autograd.grad(output, parts, seed.transpose(1, 2).to(dtype))]

    right, dense, found = (
        run(torch.float32, dense=True),
        run(torch.bfloat16, dense=True),
        run(torch.bfloat16, dense=False),
    )
    names = ("output", "dq", "dk", "dv")
    return {n: relative(f, r) / relative(d, r) for n, f, d, r in zip(names, found, dense, right, strict=True)}


def model_errors(exam: Exam) -> dict[str, dict[str, float]]:
    """Relative errors against padded float32 of log-probs, values and the gradients of both adapters."""
    found = {}
    for name, dtype, packs in (
        ("right", torch.float32, False),
        ("padded", torch.bfloat16, False),
        ("packed", torch.bfloat16, True),
    ):
        found[name] = model_pass(exam, dtype, packs=packs)
    right = found.pop("right")
    return {name: {part: relative(one[part], right[part]) for part in right} for name, one in found.items()}


def model_pass(exam: Exam, dtype: torch.dtype, *, packs: bool) -> dict[str, torch.Tensor]:
    """Forward and backward of policy and value over the same sequences, in one layout."""
    from rlhf_toolkit.models.loading import lora_config
    from rlhf_toolkit.models.shared_base import SharedBase

    config = config_of(exam.sizes.small, exam.sizes.vocabulary)
    config.num_hidden_layers = min(6, config.num_hidden_layers)
    base = random_base(config, dtype=torch.bfloat16).to(dtype)  # the same rounded weights in both dtypes
    adapter = lora_config(rank=16, alpha=32, rslora=False, target_modules="all-linear", exclude_modules=())
    shared = SharedBase(base, {"policy": adapter, "value": adapter}, value_head_std=0.02).to(DEVICE).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for each, parameter in shared.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.02 if "lora_" in each else 0.1))
    out = shared(layouts(exam, packs=packs), roles=("policy", "value"))
    (out.policy_logprobs.mean() + out.token_values.square().mean()).backward()
    groups = {
        f"gradient of {role}'s {part}": torch.cat(
            [there(p.grad).flatten() for n, p in shared.named_parameters() if f"{part}.{role}" in n]
        )
        for role in ("policy", "value")
        for part in ("lora_A", "lora_B")
    }
    return {"log-probs": out.policy_logprobs.detach(), "values": out.token_values.detach(), **groups}
