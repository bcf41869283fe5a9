"""Bytes that ZeRO-3 gathers in a PPO iteration, against the least there can be.

    python bench/traffic.py        # result in bench/results/traffic.json; about 2 minutes

Two ranks under real ZeRO-3. Every all-gather that DeepSpeed starts is counted by the size of what it puts together, and
put down to the rollout (everything while experience is collected), to a micro-batch of the update, or to what lies
between. The least is one base for each rollout and two for each micro-batch (forward and backward), the base counted in
its own dtype and a tied output layer once. The first iteration also holds what happens once; it is shown apart.

ZeRO-3 keeps, between forward and backward, what it will need again within 1e9 elements (2 GB in bfloat16): the whole of
a small model, a seventh of a 7B one. ``--like-7b`` scales that down, so that the share kept is a 7B model's.
``--quantization`` stores the base's layers in fewer bits; the base that is counted in is then that one. Embeddings stay
as they are: a fifth of SmolLM2, a twentieth of a 32B one. ``--like-32b`` takes a random model with so small a share.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import ROOT, arguments, experiment, fetch_smollm, keep, models, prepared, rounded
from ranks import on_ranks

PHASES = ("rollout", "update", "step", "between")
RANKS, ROLLOUTS, MICRO_BATCH_TOKENS = 2, 4, 448
CHANGES = {
    "ppo.num_rollouts": ROLLOUTS,
    "rollout.prompts_per_rollout": 16,
    "rollout.max_new_tokens": 16,
    "update.micro_batch_tokens": MICRO_BATCH_TOKENS,
    "data.system_prompt": "",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--like-7b", action="store_true", help="keep as small a share of the model as of a 7B one")
    parser.add_argument("--like-32b", action="store_true", help="embeddings of as small a share as a 32B model's")
    parser.add_argument("--quantization", default="none", help="model.quantization")
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(Path(options.worker).read_text()))
        return
    figures, temporary = [], TemporaryDirectory()
    for model in models(options.set):
        job = {
            "model": like_32b(Path(temporary.name)) if options.like_32b else model,
            "like_7b": options.like_7b,
            "changes": {
                **CHANGES,
                "model.gradient_checkpointing": options.checkpointing,
                "model.quantization": options.quantization,
            },
        }
        counted = on_ranks(__file__, job, ranks=RANKS)
        figures.append(rounded({"model": model, "gradient_checkpointing": options.checkpointing, **figure(counted)}))
    endings = ("_checkpointing" if options.checkpointing else "") + ("_like_7b" if options.like_7b else "")
    endings += "_like_32b" if options.like_32b else ""
    endings += "" if options.quantization == "none" else f"_{options.quantization}"
    keep(f"traffic{endings}", figures, ranks=RANKS)


def like_32b(folder: Path) -> str:
    """A folder made with a random model whose layers are SmolLM2's, and whose embedding has the share that those of
    Qwen2.5-32B have: two of 152,064 x 5,120 in 32.8 billion weights. Its words are those of the prompts."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    prompts = [json.loads(line)["prompt"] for line in (ROOT / "recipes/sentiment/train.jsonl").open()]
    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm()).train_new_from_iterator(prompts, 1024)
    share = 2 * 152064 * 5120 / 32.8e9
    config = AutoConfig.from_pretrained(fetch_smollm())
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    layers = whole.num_parameters() - whole.get_input_embeddings().weight.numel()
    config.vocab_size = int(share / (1 - share) * layers / config.hidden_size)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def figure(counted: dict[str, Any]) -> dict[str, Any]:
    """Bases gathered in the last iteration, and the ratio to the least."""
    base, iterations = counted["base_bytes"], counted["iterations"]
    in_bases = [{name: size / base for name, size in one["bytes"].items()} for one in iterations]
    last, micro_batches = in_bases[-1], iterations[-1]["micro_batches"]
    least = 1 + 2 * micro_batches
    # Each role on its own: a gather for sampling, three role passes of each micro-batch, and two updates.
    separate = 1 + 3 * micro_batches + 2 * 2 * micro_batches
    return {
        "kept_elements": counted["kept_elements"],
        "base_mb": base / 1e6,
        "micro_batches": micro_batches,
        "least_bases": least,
        "gathered_bases": sum(last.values()),
        "ratio_to_least": sum(last.values()) / least,
        "separate_forwards_bases": separate,
        "rollout_bases": last["rollout"],
        "micro_batch_bases": last["update"] / micro_batches,
        "step_bases": last["step"],
        "between_bases": last["between"],
        "by_kind_bases": {name: size / base for name, size in iterations[-1]["kinds"].items()},
        "gathers": iterations[-1]["gathers"],
        "first_iteration_bases": in_bases[0],
        "persistent_mb": counted["persistent_bytes"] / 1e6,
    }


# ---- on each rank ----------------------------------------------------------------------------------------------------


class Count:
    """Bytes and calls by the phase under way."""

    def __init__(self) -> None:
        self.phase = "between"
        self.bytes: collections.Counter[str] = collections.Counter()
        self.gathers: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.micro_batches = 0

    def add(self, size: int) -> None:
        self.bytes[self.phase] += size
        self.gathers[self.phase] += 1

    def during(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, with its gathers counted under ``phase``."""

        @functools.wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._phase(phase):
                return method(*args, **kwargs)

        return counted

    def take(self) -> dict[str, Any]:
        """What was counted since the last call."""
        taken = {
            "bytes": {phase: self.bytes[phase] for phase in PHASES},
            "gathers": {phase: self.gathers[phase] for phase in PHASES},
            "kinds": {name: size for name, size in sorted(self.kinds.items())},
            "micro_batches": self.micro_batches,
        }
        for counted in (self.bytes, self.gathers, self.kinds):
            counted.clear()
        self.micro_batches = 0
        return taken

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


def worker(job: dict[str, Any]) -> None:
    """Run the experiment with every gather counted; rank 0 writes the counts of each iteration."""
    from transformers import TrainerCallback

    count, iterations = Count(), []
    run = prepared(experiment(job["model"], Path(job["folder"]), job["changes"]))
    trainer = run.trainer
    if job["like_7b"]:
        from rlhf_toolkit.distributed.zero3 import element_count

        share = sum(map(element_count, trainer.model.parameters())) / 7.6e9
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_prefetch_bucket_size"] = int(5e7 * share)
        zero["stage3_max_reuse_distance"] = zero["stage3_max_live_parameters"] = int(1e9 * share)

    class Iterations(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch(count)
            name_kinds(trainer.model)
            trainer.model_wrapped.step = count.during("step", trainer.model_wrapped.step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "train/loss" in logs:
                iterations.append(count.take())

    trainer.add_callback(Iterations())
    trainer.maker.collect = count.during("rollout", trainer.maker.collect)
    trainer.training_step = count.during("update", trainer.training_step)
    count_micro_batches(trainer, count)
    run.train()
    if run.topology.is_main:
        base = [p for name, p in trainer.model.named_parameters() if "lora_" not in name and "scalar_heads" not in name]
        persistent = [p for p in trainer.model.parameters() if p.ds_persist]
        found = {
            "kept_elements": trainer.model_wrapped.zero_max_reuse_distance(),
            "iterations": iterations,
            "base_bytes": sum(p.ds_numel * p.element_size() for p in base),
            "persistent_bytes": sum(p.ds_numel * p.element_size() for p in persistent),
        }
        Path(job["result"]).write_text(json.dumps(found))


def watch(count: Count) -> None:
    """Count what DeepSpeed's all-gathers put together. All of ZeRO-3's go through these functions of deepspeed.comm."""
    import deepspeed.comm as comm
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, AllGatherHandle

    into_tensor, into_list = comm.all_gather_into_tensor, comm.all_gather

    def all_gather_into_tensor(output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        count.add(output_tensor.numel() * output_tensor.element_size())
        return into_tensor(output_tensor, *args, **kwargs)

    def all_gather(tensor_list: Any, *args: Any, **kwargs: Any) -> Any:
        count.add(sum(t.numel() * t.element_size() for t in tensor_list))
        return into_list(tensor_list, *args, **kwargs)

    for module in (comm, comm.comm):
        module.all_gather_into_tensor, module.all_gather = all_gather_into_tensor, all_gather
    for handle, key in ((AllGatherHandle, "param"), (AllGatherCoalescedHandle, "params")):
        handle.__init__ = names_kept(handle.__init__, key, count)  # type: ignore[method-assign]


def names_kept(made: Callable[..., None], key: str, count: Count) -> Callable[..., None]:
    """The ``__init__`` of a gather's handle, which also knows what is gathered."""

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        found = kwargs[key] if key in kwargs else args[1]  # after the handle of the collective
        for parameter in found if isinstance(found, (list, tuple)) else [found]:
            count.kinds[f"{count.phase}: {parameter.bench_kind}"] += parameter.ds_numel * parameter.element_size()
        made(self, *args, **kwargs)

    return init


def name_kinds(model: Any) -> None:
    """Give every parameter the name of its kind."""
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or name.startswith("scalar_heads.")
        small = "norms and biases" if parameter.ds_persist else "layers"
        parameter.bench_kind = "adapters" if trained else "embeddings" if "embed_tokens" in name else small


def count_micro_batches(trainer: Any, count: Count) -> None:
    """Each micro-batch of the update computes the loss once."""
    compute = trainer.micro_batch_loss

    def micro_batch_loss(*args: Any, **kwargs: Any) -> Any:
        count.micro_batches += 1
        return compute(*args, **kwargs)

    trainer.micro_batch_loss = micro_batch_loss


if __name__ == "__main__":
    main()
