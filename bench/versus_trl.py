"""A whole PPO step: this toolkit against TRL 1.12's PPOTrainer, which has an environment of its own.

    python bench/versus_trl.py        # result in bench/results/versus_trl.json; about 6 minutes, the first time longer

16 prompts x exactly 48 new tokens, bfloat16 base, LoRA r16 on all linear layers of the policy and of a value adapter,
one epoch, one mini-batch. Each contestant is a process of its own that does a step when it is asked to; they take
turns, and the first turn warms up. Prompts, chat template and its system prompt are the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import ROOT, SMOKE, arguments, keep, known, model_folder, models, rounded
from contestants.protocol import Contestant

TURNS, PROMPTS, TOKENS, RANK, RATE, KL_COEF = 1 if SMOKE else 5, 16, 48, 16, 2e-4, 0.05
ENVIRONMENT = ROOT / ".venv-trl"
SAME_VERSIONS = ("torch", "transformers", "accelerate", "peft", "datasets")
OURS: dict[str, dict[str, Any]] = {  # contestant -> changes to the experiment
    "ours": {},
    "ours, value head on the policy trunk": {"model.value_on": "policy_trunk"},
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=TURNS, help="default: %(default)s")
    parser.add_argument(
        "--trl-python", default=os.environ.get("TRL_PYTHON"), help="the Python of an environment with TRL 1.12"
    )
    parser.add_argument("--only-ours", action="store_true", default=SMOKE, help="leave TRL out, for trying")
    options = parser.parse_args()
    figures = [compare(model, options) for model in models(options.set)]
    keep("versus_trl", rounded(figures), setting=f"{PROMPTS} prompts x {TOKENS} new tokens, LoRA r{RANK}, one epoch")


def compare(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds and peak memory of each contestant, and the ratios of ours to TRL's."""
    with tempfile.TemporaryDirectory() as folder:
        contestants = start(model, Path(folder), options)
        turns: dict[str, list[Mapping[str, Any]]] = {name: [] for name in contestants}
        for turn in range(options.turns + 1):
            for name, contestant in contestants.items():
                turns[name].append(contestant.step())
                print(f"turn {turn}  {name}: {json.dumps(turns[name][-1])}", file=sys.stderr, flush=True)
        found = {name: summary(taken) for name, taken in turns.items()}
        found = {name: {**one, "versions": contestants[name].ready["versions"]} for name, one in found.items()}
        for contestant in contestants.values():
            contestant.close()
    return {"model": model, "contestants": found, "ratios": ratios(found)}


def start(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Contestant]:
    """Every contestant, loaded and waiting. Ours that need a setting this version lacks are left out, with a line."""
    texts = [json.loads(line)["prompt"] for line in (ROOT / "recipes/sentiment/heldout.jsonl").read_text().splitlines()]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts[:PROMPTS]))
    contestants = {}
    if not options.only_ours:
        job = {"model": model_folder(model), "prompts": texts[:PROMPTS], "tokens": TOKENS, "rank": RANK}
        job |= {"learning_rate": RATE, "kl_coef": KL_COEF, "package": str(ROOT / "bench")}
        contestants["trl"] = launch("trl", options.trl_python or trl_python(), "trl_ppo.py", job, folder)
    shared = {
        "data.train": str(prompts),
        "rollout.prompts_per_rollout": PROMPTS,
        "rollout.max_new_tokens": TOKENS,
        "model.lora_rank": RANK,
        "model.lora_alpha": 2 * RANK,
        "ppo.kl_coef": KL_COEF,
    } | {f"update.{name}": RATE for name in ("policy_lr", "value_lr", "value_head_lr")}
    for number, (name, changes) in enumerate(OURS.items()):
        if all(known(setting) for setting in changes):
            job = {"model": model, "changes": {**shared, **changes}}
            contestants[name] = launch(f"ours{number}", sys.executable, "ours.py", job, folder)
        else:
            print(f"left out, since this version lacks a setting: {name} {changes}", file=sys.stderr)
    return contestants


def launch(name: str, python: str, script: str, job: dict[str, Any], folder: Path) -> Contestant:
    """A contestant's process; its output goes to a file of its own."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**job, "folder": str(folder / name)}))
    command = [python, str(ROOT / "bench/contestants" / script), str(file)]
    return Contestant(command, folder / f"{name}.log", TOKENIZERS_PARALLELISM="false")


def summary(turns: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the turns but the first, which warms up; the peak is the process's."""
    counted = turns[1:]
    phases = {name: statistics.median(turn["phases"][name] for turn in counted) for name in counted[0]["phases"]}
    return {
        "seconds": statistics.median(turn["seconds"] for turn in counted),
        "all_seconds": [turn["seconds"] for turn in counted],
        "warmup_seconds": turns[0]["seconds"],
        "phases": phases,
        "peak_gib": turns[-1]["peak_gib"],
        "response_length": counted[-1]["response_length"],
    }


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours over TRL's: the median of the turns' ratios, and the peaks'."""
    if "trl" not in found:
        return {}
    trl = found["trl"]
    return {
        name: {
            "time": statistics.median(a / b for a, b in zip(one["all_seconds"], trl["all_seconds"], strict=True)),
            "memory": one["peak_gib"] / trl["peak_gib"],
        }
        for name, one in found.items()
        if name != "trl"
    }


def trl_python() -> str:
    """The Python of ``.venv-trl``, which is made when it is missing: TRL 1.12 beside our versions of the rest."""
    python = ENVIRONMENT / "bin/python"
    if not (ENVIRONMENT / ".installed").is_file():
        print(f"making {ENVIRONMENT}", file=sys.stderr, flush=True)
        constraints = [] if torch.cuda.is_available() else ["-c", str(ROOT / "constraints-cpu.txt")]
        same = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in SAME_VERSIONS]
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", *constraints, "trl==1.12.0", "vaderSentiment", *same]
        subprocess.run(pip, check=True)
        (ENVIRONMENT / ".installed").touch()
    return str(python)


if __name__ == "__main__":
    main()
