"""Experiments: YAML files and command-line overrides."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from rlhf_toolkit.checkpoints import claim_run_folder
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict, load_experiment, parse_overrides
from tests.strangers import frame
from tests.strangers.ground import here

COUNT, LIMIT = 400, 10.0
GOOD = """\
model: {name: some/model, dtype: float32, lora_rank: 4, target_modules: [q_proj, v_proj]}
data: {train: prompts.jsonl, chat_template: false, system_prompt: null}
reward: {function: "reward.py:score", kwargs: {words: [a, b], limit: 3, nested: {a: 1.5}}}
rollout: {prompts_per_rollout: 8, max_new_tokens: 6, stop_strings: [stop]}
ppo: {num_rollouts: 3, kl_coef: 0.05}
update: {micro_batch_tokens: 2048, policy_lr: 1e-4}
run: {output_dir: RUN, wandb: "off", name: a name}
"""


@dataclass(frozen=True)
class Case:
    """The bytes of a file, or overrides. ``refuse`` says that it must not be taken."""

    name: str
    text: bytes
    overrides: tuple[str, ...] = ()
    refuse: bool = False


def bomb(width: int, depth: int, start: str = "x") -> str:
    """Lists of aliases of lists of aliases."""
    lines = [f"a0: &a0 [{', '.join([start] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines) + f"\nb: *a{depth - 1}\n"


def dict_bomb(width: int, depth: int) -> str:
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: x" for i in range(width)) + "}"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} {{" + ", ".join(f"k{i}: *a{level - 1}" for i in range(width)) + "}")
    return "\n".join(lines) + f"\nb: *a{depth - 1}\n"


def merge_bomb(depth: int) -> str:
    """``<<`` of a list of the level below, many times."""
    lines = ["m0: &m0 {k: 1}"]
    lines += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], k{i}: 1}}" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def indented(text: str, by: str = "    ") -> str:
    return "".join(by + line + "\n" for line in text.splitlines())


def bombed(text: str) -> str:
    """A bomb among the kwargs, which ``text`` names."""
    return placed("reward:\n  function: r.py:f\n  kwargs:\n" + indented(bomb(9, 8)) + text)


def placed(text: str) -> str:
    """A good file, in which ``text`` stands in place of the sections that it has."""
    mine = {line.partition(":")[0] for line in text.splitlines()}
    return "".join(line + "\n" for line in GOOD.splitlines() if line.partition(":")[0] not in mine) + text


BOMBS = {
    "bomb at the top": bomb(9, 9),
    "bomb of dicts": dict_bomb(9, 9),
    "bomb of merge keys": merge_bomb(9),
    "bomb under kwargs": GOOD.replace("kwargs: {words: [a, b], limit: 3, nested: {a: 1.5}}", "kwargs: null")
    + "extra:\n"
    + indented(bomb(9, 9)),
    "bomb as kwargs": "model: {name: m}\nreward:\n  function: r.py:f\n  kwargs:\n" + indented(bomb(9, 9)),
    "bomb as a key": bombed("? *a7\n: 1"),
    "bomb as a section": bombed("model: *a7"),
    "bomb as a number": bombed("run: {seed: *a7}"),
    "bomb as text": bombed("run: {name: *a7}"),
    "bomb as a choice": bombed("run: {wandb: *a7}"),
    "bomb as a list of text": bombed("model: {name: m, target_modules: *a7}"),
    "bomb as other kwargs": bombed("ppo: {advantage_kwargs: {x: *a7}}"),
    "bomb in curriculum": bombed("data: {train: x, curriculum: c:d, curriculum_kwargs: {x: *a7}}"),
    "bomb as an unknown setting": bombed("run: {sede: *a7}"),
    "small bomb": bombed("run: {sede: *a3}"),
    "long bomb": bomb(100, 60),
    "text bomb": bomb(9, 9, "'" + "lol" * 1000 + "'"),
    "a list that holds itself": "reward: {function: f.py:f, kwargs: &a {x: *a}}",
    "a list in itself": "reward: {functions: &a [*a, *a]}",
    "itself at the top": "&a [*a]",
    "a key that holds itself": "? &a [*a]\n: 1",
}
REFUSED = {
    "python object": "model: !!python/object/apply:os.system ['{COMMAND}']",
    "python name": "model: {name: !!python/name:os.system }",
    "python module": "model: {name: !!python/module:antigravity }",
    "object new": "!!python/object/new:subprocess.Popen [['sh', '-c', '{COMMAND}']]",
    "object under kwargs": "reward: {function: 'a:b', kwargs: {x: !!python/object/apply:os.system ['{COMMAND}']}}",
    "tuple tag": "model: {name: !!python/tuple [1, 2]}",
    "own tag": "model: !include {OUTSIDE}/victim",
    "env tag": "model: {name: !env HOME}",
    "date": "reward: {kwargs: {since: 2024-01-01}}",
    "no date": "reward: {kwargs: {since: 2024-13-45}}",
    "time": "run: {name: 2024-01-01 10:00:00}",
    "set": "reward: {kwargs: {s: !!set {a, b}}}",
    "binary": "reward: {kwargs: {b: !!binary aGVsbG8=}}",
    "omap": "reward: {kwargs: {b: !!omap [a: 1]}}",
    "pairs": "reward: {kwargs: {b: !!pairs [a: 1]}}",
    "nan": "reward: {kwargs: {x: .nan}}",
    "inf": "ppo: {kl_coef: .inf}",
    "minus inf": "update: {policy_lr: -.inf}",
    "beyond floats": "update: {policy_lr: 1e999}",
    "int key": "reward: {kwargs: {1: a}}",
    "bool key": "reward: {kwargs: {yes: a}}",
    "null key": "reward: {kwargs: {~: a}}",
    "list key": "reward: {kwargs: {? [a] : 1}}",
    "dict key": "? {a: b}\n: 1",
    "int section": "1: {a: b}",
    "null section": "~: {a: b}",
    "bool section": "on: {a: b}",
    "section of a list": "model: [a]",
    "section of text": "model: text",
    "section of a number": "ppo: 3",
    "unknown section": "nothing: {a: 1}",
    "unknown setting": "model: {nmae: x}",
    "int setting": "model: {1: x}",
    "dunder setting": "model: {__class__: x, __init__: y}",
    "list of a file": "[1, 2]",
    "text of a file": "hello",
    "number of a file": "3",
    "two documents": "model: {name: a}\n---\nmodel: {name: b}",
    "the same section twice": "model: {name: a}\nmodel: {name: b}\n",
    "the same setting twice": "ppo: {kl_coef: 1, kl_coef: 2}",
    "the same kwarg twice": "reward: {kwargs: {a: 1, a: 2}}",
    "open brackets": "[" * 100000,
    "open braces": "{a: " * 20000,
    "deep sequence": "[" * 5000 + "]" * 5000,
    "deep in kwargs": "reward: {kwargs: {x: " + "[" * 400 + "]" * 400 + "}}",
    "deep block": "".join("  " * i + "a:\n" for i in range(600)),
    "a very long key": "model: {" + "k" * 100000 + ": 1}",
    "a very long number": "run: {seed: " + "9" * 5000 + "}",
    "a hex number": "run: {seed: 0x" + "f" * 4000 + "}",
    "beyond 64 bits": "run: {seed: 99999999999999999999999}",
    "long text of digits": "ppo: {kl_coef: " + "9" * 5000 + "}",
    "hex in kwargs": "reward: {kwargs: {x: 0x" + "f" * 100000 + "}}",
    "sexagesimal": "run: {seed: 12:30:45}",
    "sexagesimal float": "ppo: {kl_coef: 1:30.5}",
    "huge prompts": "rollout: {prompts_per_rollout: 1000000000000007}\nppo: {mini_batches: 1000000}",
    "huge batches": "rollout: {prompts_per_rollout: 8}\nppo: {mini_batches: 1000000000000000}",
    "NUL in a path": 'run: {output_dir: "a\\0b"}',
    "NUL in the model": 'model: {name: "a\\0b"}',
    "newline in the model": 'model: {name: "a\\nb"}',
    "ESC in the model": 'model: {name: "a\\eb"}',
    "ESC in a section": '"a\\e[2Jb": {x: 1}',
    "ESC in a setting": 'model: {"a\\e]0;x\\ab": 1}',
    "newline in a setting": 'model: {"a\\nTraceback (most recent call last)": 1}',
    "bidi in a setting": 'model: {"a\\u202eb": 1}',
    "bidi in a choice": 'run: {wandb: "off\\u202e\\e[31m"}',
    "ESC in a number": 'run: {seed: "a\\e[2J"}',
    "surrogate": 'data: {system_prompt: "\\ud800"}',
    "surrogate in kwargs": 'reward: {kwargs: {x: "\\udfff"}}',
    "surrogate in a key": 'reward: {kwargs: {"\\udfff": 1}}',
    "surrogate in a path": 'run: {output_dir: "\\ud800"}',
    "tab": "model:\n\tname: x",
    "an anchor that is not there": "model: *nothing",
    "unclosed": 'model: {name: "x',
    "directive": "%YAML 9.9\n---\nmodel: {}",
    "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !object/apply:os.system ['{COMMAND}']",
    "value tag": "model: {name: {=: x}}",
    "spaces": " " * 300000 + "x: 1",
    "many keys": "\n".join(f"k{i}: 1" for i in range(60000)),
    "many anchors": "\n".join(f"k{i}: &a{i} x" for i in range(30000)),
    "comments": "# x\n" * 200000,
    "long text": "run: {name: " + "x" * 2000000 + "}",
    "many question marks": "? " * 50000,
    "many dashes": "- " * 50000,
    "many quotes": "'" * 100001,
    "utf-16 with a NUL": "model: {name: \0}",
}
BYTES = {
    "not UTF-8": b"model: {name: \xff\xfe}",
    "NUL bytes": b"\0" * 1000,
    "random bytes": bytes(random.Random(0).randrange(256) for _ in range(5000)),
    "cut in a letter": "model: {name: ä}".encode()[:-2],
    "DEL": b"model: {name: \x7f\x80}",
    "BEL": b"model: {name: \x07}",
}
OVERRIDES = {
    "no equals": ["ppo.kl_coef"],
    "no dot": ["x=1"],
    "empty name": ["=1"],
    "dot only": [".=1"],
    "object": ["model.name=!!python/object/apply:os.system ['{COMMAND}']"],
    "bomb": ["reward.kwargs=" + bomb(9, 9).replace("\n", ", ").join("{}").replace("b: *a8, ", "b: *a8")],
    "deep": ["reward.kwargs={x: " + "[" * 3000 + "]" * 3000 + "}"],
    "ESC": ["model.na\x1b[2Jme=1"],
    "newline": ["mo\ndel.name=1"],
    "surrogate": ["model.name=\udc80"],
    "unknown": ["model.nme=1"],
    "dunder": ["__class__.x=1"],
    "nan": ["ppo.kl_coef=.nan"],
    "huge": ["run.seed=" + "9" * 5000],
    "section": ["model.name.x=1"],
    "bracket": ["model.name=["],
    "long": ["model." + "x" * 100000 + "=1"],
}
SCALARS = (
    *("~", "true", "off", "-1", "0", "1e309", ".nan", "-.inf", "1e-400", "0x7fffffffffffffff", "9223372036854775808"),
    *('""', '"\\0"', '"\\e[31m"', '"\\n\\n"', '"\\ud83d"', '"a/../../b"', '"/etc/passwd"', "{OUTSIDE}/victim", "1:30"),
    *(
        "2024-01-01",
        "!!binary aGk=",
        "!!set {a}",
        "!!python/name:os.system ",
        "[]",
        "{}",
        "[[[[[]]]]]",
        "{a: {b: {c: 1}}}",
    ),
    *(
        "[1, .nan]",
        "{1: 2}",
        "&a [*a]",
        "*nowhere",
        "'${HOME}'",
        "'{URL}/x'",
        "99999999999999999999",
        "'%s%n'",
        "010",
        "0b11",
    ),
    *(
        "1_000",
        "+1",
        "1.",
        "'1e-4'",
        "yes",
        "none",
        "None",
        "'\u202e'",
        "\u0661",
        "!!int '3'",
        "!!float 'x'",
        "!!str 3",
    ),
    *(
        "!!int ''",
        "!!int 'x'",
        "!!bool x",
        "!!timestamp x",
        "!!null x",
        "!!float ''",
        "!!int '-'",
        "!!timestamp '2024-1-1T'",
    ),
)


def cases(seed: int, count: int) -> Iterator[Case]:
    chance = random.Random(f"yaml {seed}")
    fixed = list(fixed_cases())
    yield from fixed if count > len(fixed) else chance.sample(fixed, count * 2 // 3)
    for number in range(count - min(len(fixed), count * 2 // 3)):
        yield mutated(chance, number)


def fixed_cases() -> Iterator[Case]:
    for name, text in BOMBS.items():
        yield Case(name, text.encode(), refuse=True)
    for name, text in REFUSED.items():
        start = text.partition(":")[0] in GOOD or text[0] in '"1~o?'
        yield Case(name, (placed(text) if start else text).encode(), refuse=True)
    for name, content in BYTES.items():
        yield Case(name, content, refuse=True)
    for name, overrides in OVERRIDES.items():
        yield Case(f"override: {name}", GOOD.encode(), tuple(overrides), refuse=True)


def mutated(chance: random.Random, number: int) -> Case:
    """A good file with one value replaced, a part cut, doubled or moved, or bytes changed."""
    kind, text = chance.choice(["value", "value", "value", "override", "bytes", "lines", "cut"]), GOOD
    if kind in ("value", "override"):
        section = chance.choice(["model", "data", "reward", "rollout", "ppo", "update", "run"])
        key = chance.choice([setting.name for setting in fields(get_type_hints(Experiment)[section])])
        value = chance.choice(SCALARS)
        if kind == "override":
            return Case(f"{number}: {section}.{key}={value}", text.encode(), (f"{section}.{key}={value}",))
        lines = [line for line in text.splitlines() if not line.startswith(section)]
        return Case(
            f"{number}: {section}.{key}: {value}", "\n".join([*lines, f"{section}: {{{key}: {value}}}"]).encode()
        )
    if kind == "bytes":
        content = bytearray(text.encode())
        for _ in range(chance.randrange(1, 6)):
            content[chance.randrange(len(content))] = chance.choice(b"\0\n\t:{}[]&*!|>'\"%@`#,?- \x1b\xff\xc3aZ0")
        return Case(f"{number}: bytes", bytes(content))
    if kind == "lines":
        lines = text.splitlines()
        chance.shuffle(lines)
        return Case(f"{number}: lines", "\n".join(lines + chance.choices(lines, k=chance.randrange(2))).encode())
    return Case(f"{number}: cut", text.encode()[: chance.randrange(len(text))])


def run(case: Case) -> str:
    ground = here()
    path = Path("experiment.yaml")
    path.write_bytes(case.text if b"{" not in case.text else _filled(case.text))
    kind = Experiment
    experiment = load_experiment(path, parse_overrides([ground.filled(each) for each in case.overrides]), kind)
    settings = experiment.as_dict()
    if json.loads(json.dumps(settings)) != settings or experiment_from_dict(settings) != experiment:
        return frame.WRONGLY
    Path("run").mkdir()
    claim_run_folder(Path("run"), settings, overwrite=True)
    Path(experiment.model.name).exists(), Path(experiment.run.output_dir).exists()
    return frame.WRONGLY if case.refuse else frame.RIGHTLY


def _filled(text: bytes) -> bytes:
    try:
        return here().filled(text.decode()).encode()
    except UnicodeError:
        return text
