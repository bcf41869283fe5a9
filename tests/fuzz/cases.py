"""Cases: settings files with their rows, each made from a seed and a number alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.rows import odd_rows, sound
from tests.fuzz.values import LEFT_ALONE, LEGAL, border, knobs, legal, mistake

SHARES = (("legal", 40), ("border", 25), ("mistake", 15), ("rows", 20))
KIND_SHARES = (("ppo", 64), ("sft", 12), ("reward_model", 12), ("dpo", 12))
BAD_FUNCTIONS = ("raising", "too_few", "texts", "NOT_A_FUNCTION", "nowhere")


@dataclass
class Case:
    """One settings file with its rows. ``wrong``: what must be refused, or nothing."""

    number: int
    kind: str
    shape: str
    changes: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: str = ""

    def without(self, name: str) -> Case:
        """The case with the default of one setting."""
        changes = {key: value for key, value in self.changes.items() if key != name}
        return Case(self.number, self.kind, self.shape, changes, self.rows, self.wrong)


def base(kind: str) -> dict[str, Any]:
    """Settings of a tiny run of a kind, dotted."""
    settings = {
        "model.name": "HERE/model",
        "model.dtype": "float32",
        "model.lora_rank": 2,
        "data.train": "TRAIN",
        "data.chat_template": False,
        "run.output_dir": "OUT",
        "run.wandb": "off",
    }
    if kind != "ppo":
        return {
            **settings,
            "data.max_tokens": 16,
            "update.micro_batch_tokens": 64,
            "update.lr": 1e-2,
            f"{kind}.batch_size": 4,
        }
    return {
        **settings,
        "model.value_head_std": 0.1,
        "data.max_prompt_tokens": 8,
        "reward.function": "HERE/plugins.py:low_words",
        "rollout.prompts_per_rollout": 4,
        "rollout.max_new_tokens": 3,
        "ppo.num_rollouts": 2,
        "update.micro_batch_tokens": 64,
        "update.policy_lr": 1e-2,
        "update.value_lr": 1e-2,
    }


def make(seed: int, number: int) -> Case:
    """Case ``number`` of ``seed``."""
    chance = random.Random(f"{seed} {number}")
    kind, shape = _drawn(KIND_SHARES, chance), _drawn(SHARES, chance)
    case = Case(number, kind, shape, base(kind), [sound(kind, row) for row in range(8)])
    known = knobs(kind)
    free = [name for name in known if name not in LEFT_ALONE]
    most = 8 if shape == "legal" else 3
    for name in chance.sample(sorted(set(free) & set(LEGAL)), chance.randrange(most + 1)):
        case.changes[name] = legal(name, chance)
    MORE[shape](case, free, chance)
    return case


def _bordering(case: Case, free: list[str], chance: random.Random) -> None:
    known = knobs(case.kind)
    for name in chance.sample(free, chance.choice((1, 1, 2))):
        case.changes[name] = border(name, known[name][1], chance)


def _mistaken(case: Case, free: list[str], chance: random.Random) -> None:
    known = knobs(case.kind)
    way = chance.random()
    if way < 0.7:
        name = chance.choice(free)
        case.changes[name] = mistake(*known[name], chance)
        case.wrong = name
    elif way < 0.9:
        name = chance.choice(free)
        case.wrong = chance.choice((f"{name}s", f"{name}_x", name.upper(), f"other.{name}", name.partition(".")[0]))
        case.changes[case.wrong] = 1
    elif case.kind == "ppo":
        case.wrong = "reward.function"
        case.changes[case.wrong] = f"HERE/plugins.py:{chance.choice(BAD_FUNCTIONS)}"
        case.changes.pop("reward.functions", None)
    else:
        case.wrong = "model.name"
        case.changes[case.wrong] = chance.choice(("HERE", "HERE/adapter", "HERE/plugins.py", "", "nowhere/at_all"))


def _with_odd_rows(case: Case, free: list[str], chance: random.Random) -> None:
    case.rows = odd_rows(case.kind, chance)
    if chance.random() < 0.5:
        case.changes["data.chat_template"] = True


MORE: dict[str, Callable[[Case, list[str], random.Random], None]] = {
    "legal": lambda case, free, chance: None,
    "border": _bordering,
    "mistake": _mistaken,
    "rows": _with_odd_rows,
}


def _drawn(shares: tuple[tuple[str, int], ...], chance: random.Random) -> str:
    return chance.choices([name for name, _ in shares], [share for _, share in shares])[0]
