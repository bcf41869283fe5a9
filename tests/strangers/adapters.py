"""Adapters: merged into their base, put on it for a chat, loaded as a role."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf_toolkit.export.chat import load_chat
from rlhf_toolkit.export.merge import merge
from rlhf_toolkit.models.loading import adapter_config, build_ppo_roles
from tests.strangers import frame
from tests.strangers.folders import (
    VALUES,
    Case,
    Change,
    Raw,
    copied,
    cut,
    every,
    file_cases,
    gone,
    header,
    hostile_pickle,
    link,
    setting,
    sound,
    tensors,
    text,
)
from tests.support.roles import lora
from tests.support.tiny import tiny_llama

HEAVY = ("transformers.models.llama.modeling_llama",)
COUNT, LIMIT = 300, 20.0
WAYS = ("merge", "chat", "role")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EVIL = "(([a-z_0-9.]+)+)+X"
SLOW = (
    *(EVIL, "(a|a)*X", "(.*)*X", "(.*.*)*X", "([a-z]+)*$X", "(.+)+X", ".*.*.*.*.*.*.*.*X", "(?:(?:.?){50}){50}X"),
    *(
        "(x+x+)+y",
        "(.|.)*X",
        "((.)(.)?)*X",
        "(?=(.*)*X)",
        "(?P<a>.*)(?P=a)*X",
        ".?" * 40 + "." * 40,
        "(.{1,30}){1,30}X",
    ),
    *(
        "(?:a|b|[a-z_.0-9])*X",
        "(" * 200 + "a" + ")*" * 200,
        "(?:.|.)" * 30 + "X",
        "(?:.*|.*)(?:.*|.*)(?:.*|.*)X",
        "((.*)",
    ),
    *(
        "(?#" + "x" * 30000 + ")",
        "[a-z_.0-9]{0,60}" * 6 + "X",
        "(?i:(.+)+X)",
        "(?<=a)(.+)+X",
        r"(\w+\.)+X",
        r"(\S+?)+?X",
    ),
)


def scaled(factor: float, part: str = "") -> Any:
    return lambda found: {k: v * factor if part in k else v for k, v in found.items()}


def filled(value: float) -> Any:
    return lambda found: {k: torch.full_like(v, value) for k, v in found.items()}


def renamed(old: str, new: str) -> Any:
    return lambda found: {k.replace(old, new): v for k, v in found.items()}


CHANGES: dict[str, Change] = {
    "alpha NaN": setting(CONFIG, lora_alpha=Raw("NaN")),
    "alpha infinite": setting(CONFIG, lora_alpha=Raw("Infinity")),
    "alpha 1e999": setting(CONFIG, lora_alpha=Raw("1e999")),
    "alpha 1e300": setting(CONFIG, lora_alpha=1e300),
    "alpha negative": setting(CONFIG, lora_alpha=-1),
    "alpha 0": setting(CONFIG, lora_alpha=0),
    "alpha text": setting(CONFIG, lora_alpha="16"),
    "alpha list": setting(CONFIG, lora_alpha=[1]),
    "alpha null": setting(CONFIG, lora_alpha=None),
    "alpha true": setting(CONFIG, lora_alpha=True),
    "alpha of 400 digits": setting(CONFIG, lora_alpha=10**400),
    "rank 0": setting(CONFIG, r=0),
    "rank negative": setting(CONFIG, r=-3),
    "rank huge": setting(CONFIG, r=10**9),
    "rank 1e99": setting(CONFIG, r=1e99),
    "rank another": setting(CONFIG, r=5),
    "rank text": setting(CONFIG, r="3"),
    "rank true": setting(CONFIG, r=True),
    "alpha pattern NaN": setting(CONFIG, alpha_pattern={"q_proj": Raw("1")} | {"k_proj": float("nan")}),
    "rank pattern text": setting(CONFIG, rank_pattern={"q_proj": "3"}),
    "rank pattern list": setting(CONFIG, rank_pattern=["q_proj"]),
    "rank pattern of another rank": setting(CONFIG, rank_pattern={"q_proj": 7}),
    "rank pattern broken": setting(CONFIG, rank_pattern={"(": 3}),
    "many keys": setting(CONFIG, rank_pattern={f"{EVIL}{i}": 3 for i in range(50)}),
    "many plain keys": setting(CONFIG, rank_pattern={f"layer{i}": 3 for i in range(100000)}),
    "a megatron module": setting(CONFIG, megatron_config={"a": 1}, megatron_core="antigravity"),
    "a module alone": setting(CONFIG, megatron_core="os"),
    "dora": setting(CONFIG, use_dora=Raw("3")),
    "xlora": setting(CONFIG, peft_type="XLORA", adapters={"a": "{OUTSIDE}", "b": "{URL}/x"}),
    "type none": setting(CONFIG, peft_type=None),
    "type odd": setting(CONFIG, peft_type="\x1b[2J"),
    "type list": setting(CONFIG, peft_type=["LORA"]),
    "type class": setting(CONFIG, peft_type="__class__"),
    "another type": setting(CONFIG, peft_type="IA3"),
    "prompt tuning": setting(
        CONFIG, peft_type="PROMPT_TUNING", prompt_tuning_init_text="x", tokenizer_name_or_path="{URL}/x"
    ),
    "a path in eva": setting(CONFIG, eva_config={"x": "{OUTSIDE}/victim"}),
    "a path in corda": setting(CONFIG, corda_config={"cache_file": "{OUTSIDE}/victim"}),
    "modules 3": setting(CONFIG, target_modules=3),
    "modules of numbers": setting(CONFIG, target_modules=[1, 2]),
    "modules of lists": setting(CONFIG, target_modules=[["q_proj"]]),
    "modules ESC": setting(CONFIG, target_modules=["\x1b[2J"]),
    "modules broken": setting(CONFIG, target_modules="(("),
    "modules to save": setting(CONFIG, modules_to_save=["embed_tokens"]),
    "weights 1e38": tensors(WEIGHTS, filled(1e38)),
    "B of 1e38": tensors(WEIGHTS, scaled(1e38, "lora_B")),
    "A of 1e30": tensors(WEIGHTS, scaled(1e30, "lora_A")),
    "weights NaN": tensors(WEIGHTS, filled(math.nan)),
    "weights infinite": tensors(WEIGHTS, filled(-math.inf)),
    "weights half": tensors(WEIGHTS, lambda found: {k: v[..., : v.shape[-1] // 2] for k, v in found.items()}),
    "weights empty": tensors(WEIGHTS, lambda found: {k: v[:0] for k, v in found.items()}),
    "weights scalar": tensors(WEIGHTS, lambda found: {k: torch.tensor(1.0) for k in found}),
    "weights 3-d": tensors(WEIGHTS, lambda found: {k: v[None] for k, v in found.items()}),
    "weights whole numbers": tensors(WEIGHTS, lambda found: {k: v.to(torch.int64) for k, v in found.items()}),
    "no weights": tensors(WEIGHTS, lambda found: {}),
    "half of the pairs": tensors(WEIGHTS, lambda found: {k: v for k, v in found.items() if "lora_A" in k}),
    "another layer": tensors(WEIGHTS, renamed("q_proj", "nothing")),
    "layer of ESC": tensors(WEIGHTS, renamed("q_proj", "\x1b[2J\x1b]0;pwned\x07")),
    "layer of lines": tensors(WEIGHTS, renamed("q_proj", "q\nTraceback (most recent call last):\n")),
    "layer of bidi": tensors(WEIGHTS, renamed("q_proj", "\u202eq")),
    "layer of a path": tensors(WEIGHTS, renamed("q_proj", "../../x")),
    "long layer": tensors(WEIGHTS, renamed("q_proj", "q" * 100000)),
    "layer 99": tensors(WEIGHTS, renamed("layers.0", "layers.99")),
    "offsets negative": header(WEIGHTS, every({"data_offsets": [-8, 8]})),
    "offsets huge": header(WEIGHTS, every({"data_offsets": [0, 2**62]})),
    "offsets alike": header(WEIGHTS, every({"data_offsets": [0, 384]})),
    "shape huge": header(WEIGHTS, every({"shape": [2**40, 2**40]})),
    "shape text": header(WEIGHTS, every({"shape": "x"})),
    "dtype odd": header(WEIGHTS, every({"dtype": "\x1b[2J"})),
    "header a list": header(WEIGHTS, lambda found: [1, 2]),
    "header null": header(WEIGHTS, lambda found: None),
    "header 2^63": text(WEIGHTS, b"\xff" * 8 + b"{}"),
    "header of 90 MB": text(WEIGHTS, (90_000_000).to_bytes(8, "little") + b"{"),
    "a pickle as safetensors": hostile_pickle(WEIGHTS),
    "weights cut": cut(WEIGHTS, 0.5),
    "no config": gone(CONFIG),
    "no weights file": gone(WEIGHTS),
    "config a list": text(CONFIG, "[]"),
    "config null": text(CONFIG, "null"),
    "config empty": text(CONFIG, "{}"),
    "config deep": text(CONFIG, '{"a":' * 100000),
    "config of bytes": text(CONFIG, b"\xff\xfe\x00"),
    "link to a secret": link("README.md", "{OUTSIDE}/victim"),
    "config is a link": link(CONFIG, "{OUTSIDE}/victim.json"),
    "weights are a link": link(WEIGHTS, "{OUTSIDE}/victim.safetensors"),
    "link to a folder": link("more", "{OUTSIDE}"),
}


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    hostile_pickle("adapter_model.bin")(folder)


def cases(seed: int, count: int) -> Iterator[Case]:
    sound()
    chance = random.Random(f"adapters {seed}")
    found: list[Case] = []
    for pattern in SLOW:
        key = chance.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"])
        value: Any = {pattern: 3} if key.endswith("_pattern") and key != "layers_pattern" else pattern
        more = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
        found.append(
            Case(f"{key}: {pattern[:60]}", chance.choice(WAYS), setting(CONFIG, **{key: value, **more}), False)
        )
    found.append(Case("pickled weights", "merge", pickled))
    found.append(Case("pickled weights", "chat", pickled))
    found += [Case(f"{way}: {name}", way, change) for name, change in CHANGES.items() for way in ("merge",)]
    found += [Case(f"{way}: {name}", way, change) for name, change in CHANGES.items() for way in ("chat", "role")]
    fixed = len(found) if count >= 250 else count // 2
    yield from (Case(f"{way}: nothing", way, lambda folder: None, refuse=False) for way in WAYS)
    chosen = found if fixed == len(found) else chance.sample(found, min(fixed, len(found)))
    yield from chosen
    keys = list(json.loads((sound() / "adapter" / CONFIG).read_text()))
    rest = max(0, count - len(chosen))
    for number in range(rest // 2):
        key, value, way = chance.choice(keys), chance.choice(VALUES), chance.choice(WAYS)
        shown = ascii(value)[:40]
        yield Case(f"{number}: {way}: {key}={shown}", way, setting(CONFIG, **{key: value}), refuse=False)
    yield from file_cases([CONFIG, WEIGHTS], WAYS, chance, rest - rest // 2)


def run(case: Case) -> str:
    copied("base", "adapter")
    folder = Path("adapter")
    case.change(folder)
    ending = {"merge": merged, "chat": chatted, "role": as_role}[case.way](folder)
    return frame.WRONGLY if case.refuse else ending


def merged(adapter: Path) -> str:
    merge("base", str(adapter), Path("out"))
    for path in Path("out").glob("*.safetensors"):
        if not all(tensor.isfinite().all() and tensor.abs().max() < 1e4 for tensor in load_file(path).values()):
            return frame.WRONGLY
    return frame.RIGHTLY


def chatted(adapter: Path) -> str:
    out = io.StringIO()
    chat = load_chat("base", [str(adapter)], out, dtype=None, trust_remote_code=False, max_new_tokens=4)
    chat.run(["w1 w2"])
    return frame.RIGHTLY


def as_role(adapter: Path) -> str:
    adapter_config(str(adapter), "model.policy_adapter")
    shared = build_ppo_roles(tiny_llama(), lora(), policy_adapter=str(adapter), reference_adapter=str(adapter))
    found = [p for name, p in shared.named_parameters() if ".policy." in name]
    return frame.RIGHTLY if found and all(p.isfinite().all() for p in found) else frame.WRONGLY
