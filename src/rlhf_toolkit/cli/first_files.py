"""The files of a first experiment: its YAML, whose comments are the help of its knobs, rows of data, and a reward."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import yaml

from rlhf_toolkit.settings.kinds import KINDS
from rlhf_toolkit.settings.listing import sections_of

FILE, DATA, FUNCTION, SCHEMA = "experiment.yaml", "train.jsonl", "reward.py", "experiment.schema.json"
SMALL, SMALL_FOR_GPU = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
ROWS = 3
Settings = dict[str, dict[str, Any]]

REWARD_TEXT = '''"""What is rewarded: one number for each response."""

import re


def score(prompts, responses, answer, **columns):
    """1 where the response's last number is the row's answer, and a little more for a short response."""
    scores = []
    for response, right in zip(responses, answer):
        numbers = re.findall(r"-?\\d+", response.replace(",", ""))
        brevity = 1 / (1 + len(response.split()))
        scores.append(float(numbers[-1:] == [right]) + 0.5 * brevity)
    return scores
'''


def written(kind: str, *, model: str | None, gpus: int) -> dict[str, str]:
    """The texts of the files by their names. On several ``gpus`` there is a row for each."""
    rows = max(ROWS, gpus)
    files = {FILE: experiment_text(kind, model or (SMALL_FOR_GPU if gpus else SMALL), rows=rows, gpus=gpus)}
    files[DATA] = "".join(json.dumps(row_of(kind, number)) + "\n" for number in range(rows))
    return files | ({FUNCTION: REWARD_TEXT} if kind == "ppo" else {})


def row_of(kind: str, number: int) -> dict[str, str]:
    """A row of the data of that kind."""
    one, other = 2 + number, 3 + 2 * number
    prompt, right = f"What is {one} + {other}? Answer with the number alone.", str(one + other)
    if kind == "ppo":
        return {"prompt": prompt, "answer": right}
    if kind == "sft":
        return {"prompt": prompt, "completion": right}
    return {"prompt": prompt, "chosen": right, "rejected": f"Let me think about {one} and {other} for a while."}


def experiment_text(kind: str, model: str, *, rows: int, gpus: int) -> str:
    """The YAML file: each setting with its help behind it."""
    processes = max(1, gpus)
    whole = rows // processes * processes
    settings = {"model": {"name": model}} | (ppo_settings(whole) if kind == "ppo" else job_settings(kind, whole))
    about = KINDS[kind].about
    lines = [
        f"# A first experiment: {about}. Begin with `rlhf check`, then `rlhf train`.",
        f"# Every setting and its default: `rlhf config {kind}`.",
        f"kind: {kind}",
    ]
    sections = sections_of(kind)
    for section, values in settings.items():
        knobs = {knob.name: knob for knob in fields(sections[section])}
        lines += ["", f"{section}:  # {(sections[section].__doc__ or '').partition(chr(10))[0]}"]
        for name, value in values.items():
            shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
            lines.append(f"  {name}: {shown}  # {knobs[name].metadata['help']}")
    return "\n".join(lines) + "\n"


def ppo_settings(rows: int) -> Settings:
    """Of a run of PPO that takes some minutes on a CPU."""
    return {
        "data": {"train": DATA, "max_prompt_tokens": 96},
        "reward": {"function": f"{FUNCTION}:score", "missing_eos_penalty": 0.5},
        "rollout": {"prompts_per_rollout": rows, "responses_per_prompt": 4, "max_new_tokens": 32},
        "ppo": {"num_rollouts": 5, "mini_batches": 1, "kl_coef": 0.02},
        "update": {"micro_batch_tokens": 1024, "policy_lr": 1e-4},
        "run": {"output_dir": "runs/first", "save_every": 1, "wandb": "offline"},
    }


def job_settings(kind: str, rows: int) -> Settings:
    """Of a supervised run of a few steps."""
    section = {"sft": "sft", "reward": "reward_model", "dpo": "dpo"}[kind]
    return {
        "data": {"train": DATA, "max_tokens": 256},
        section: {"epochs": 5.0, "batch_size": rows},
        "update": {"micro_batch_tokens": 1024, "lr": 1e-4},
        "run": {"output_dir": "runs/first", "save_every": 1, "wandb": "offline"},
    }
