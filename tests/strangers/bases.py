"""Base models: merged into, loaded for training, for a chat, for their tokenizer."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf_toolkit.data.tokenizers import stop_token_ids
from rlhf_toolkit.distributed.topology import start
from rlhf_toolkit.export.chat import load_chat
from rlhf_toolkit.export.merge import merge
from rlhf_toolkit.models.loading import generation_eos_of, load_base, load_model_config, load_tokenizer
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
    pipe,
    setting,
    sound,
    tensors,
    text,
)
from tests.strangers.ground import VICTIM

HEAVY = ("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2")
COUNT, LIMIT = 300, 20.0
WAYS = ("merge", "chat", "base", "tokenizer")
CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "tokenizer_config.json"
SHARD = "model-00001-of-00004.safetensors"
CODE = "import os\nos.system('{COMMAND}')\nclass Config: pass\nclass Model: pass\n"


def mapped(file: str | Raw) -> Change:
    """The index sends every tensor of the first file there."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        places = {k: (str(file) if v == SHARD else v) for k, v in index["weight_map"].items()}
        text(INDEX, json.dumps({**index, "weight_map": places}))(folder)

    return change


def remote(auto_map: object, **more: object) -> Change:
    """A config that wants code run, which lies there."""

    def change(folder: Path) -> None:
        text("evil.py", CODE)(folder)
        setting(CONFIG, auto_map=auto_map, **more)(folder)

    return change


def remote_tokenizer(folder: Path) -> None:
    text("evil.py", CODE)(folder)
    setting(TOKENIZER, auto_map={"AutoTokenizer": ["evil.Model", None]}, tokenizer_class="EvilTokenizer")(folder)


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def pickles_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    hostile_pickle("pytorch_model.bin")(folder)


def special(file: str) -> Change:
    return link(file, "/dev/zero")


AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
CHANGES: dict[str, Change] = {
    "index ..": mapped("../outside/victim.safetensors"),
    "index absolute": mapped("{OUTSIDE}/victim.safetensors"),
    "index folder": mapped("sub/model.safetensors"),
    "index dot": mapped("."),
    "index dots": mapped(".."),
    "index empty": mapped(""),
    "index backslash": mapped("..\\victim.safetensors"),
    "index drive": mapped("C:x.safetensors"),
    "index NUL": mapped("model\0.safetensors"),
    "index ESC": mapped("\x1b[2J"),
    "index newline": mapped("a\nb.safetensors"),
    "index long": mapped("a" * 5000),
    "index surrogate": mapped("\ud800"),
    "index the config": mapped("config.json"),
    "index itself": mapped(INDEX),
    "index missing": mapped("model-00009-of-00009.safetensors"),
    "index url": mapped("{URL}/x.safetensors"),
    "index list": setting(INDEX, weight_map=[1]),
    "index of numbers": setting(INDEX, weight_map={"a": 1}),
    "index of lists": setting(INDEX, weight_map={"a": ["x"]}),
    "index null": setting(INDEX, weight_map=None),
    "index metadata": setting(INDEX, metadata=[1]),
    "remote code": remote(AUTO, model_type="evil"),
    "remote code by its type": remote(AUTO),
    "remote code elsewhere": remote(
        {"AutoConfig": "other/repo--evil.Config", "AutoModelForCausalLM": "other/repo--evil.Model"}
    ),
    "remote code by a path": remote({"AutoConfig": "../../evil.Config"}),
    "remote code list": remote([1]),
    "remote tokenizer": remote_tokenizer,
    "unknown type": setting(CONFIG, model_type="nothing_known"),
    "no type": setting(CONFIG, model_type=None),
    "type ESC": setting(CONFIG, model_type="\x1b[2J"),
    "type number": setting(CONFIG, model_type=3),
    "type list": setting(CONFIG, model_type=["llama"]),
    "an encoder-decoder": setting(CONFIG, model_type="t5"),
    "no language model": setting(CONFIG, model_type="vit"),
    "layers 10^9": setting(CONFIG, num_hidden_layers=10**9),
    "layers negative": setting(CONFIG, num_hidden_layers=-1),
    "layers more": setting(CONFIG, num_hidden_layers=3),
    "layers text": setting(CONFIG, num_hidden_layers="2"),
    "width 10^12": setting(CONFIG, hidden_size=10**12),
    "width 0": setting(CONFIG, hidden_size=0),
    "width other": setting(CONFIG, hidden_size=64),
    "vocabulary 10^13": setting(CONFIG, vocab_size=10**13),
    "vocabulary other": setting(CONFIG, vocab_size=33),
    "heads 0": setting(CONFIG, num_attention_heads=0),
    "heads other": setting(CONFIG, num_attention_heads=3),
    "act odd": setting(CONFIG, hidden_act="__import__"),
    "dtype odd": setting(CONFIG, dtype="evil"),
    "torch dtype odd": setting(CONFIG, torch_dtype="__class__", dtype=None),
    "eps NaN": setting(CONFIG, rms_norm_eps=Raw("NaN")),
    "rope odd": setting(CONFIG, rope_parameters={"rope_type": "evil", "factor": Raw("NaN")}),
    "quantised": setting(CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "quantised oddly": setting(CONFIG, quantization_config={"quant_method": "\x1b[2J"}),
    "quantised by text": setting(CONFIG, quantization_config="x"),
    "eos text": setting(CONFIG, eos_token_id="x"),
    "transformers weights": setting(CONFIG, transformers_weights="../outside/victim.safetensors"),
    "tokenizer files": setting(TOKENIZER, fast_tokenizer_files=["../outside/victim.json"]),
    "config list": text(CONFIG, "[]"),
    "config null": text(CONFIG, "null"),
    "config deep": text(CONFIG, '{"a":' * 100000),
    "config bytes": text(CONFIG, b"\xff\xfe"),
    "config empty": text(CONFIG, ""),
    "config gone": gone(CONFIG),
    "config pipe": pipe(CONFIG),
    "shard pipe": pipe(SHARD),
    "tokenizer pipe": pipe("tokenizer.json"),
    "any pipe": pipe("notes.txt"),
    "config is zeros": special(CONFIG),
    "tokenizer is zeros": special("tokenizer.json"),
    "link to a secret": link("notes.txt", "{OUTSIDE}/victim"),
    "link in a folder": link("more/notes.txt", "{OUTSIDE}/victim"),
    "link to a folder": link("more", "{OUTSIDE}"),
    "link to itself": link("loop", "loop"),
    "shard is a link": link(SHARD, "{OUTSIDE}/victim.safetensors"),
    "broken link": link("notes.txt", "{OUTSIDE}/nothing"),
    "shard cut": cut(SHARD, 0.7),
    "shard of 4 bytes": text(SHARD, b"1234"),
    "shard empty": text(SHARD, b""),
    "shard gone": gone(SHARD),
    "shard a pickle": hostile_pickle(SHARD),
    "pickles only": pickles_only,
    "header of negatives": header(SHARD, every({"data_offsets": [-8, 8]})),
    "header of other shapes": header(SHARD, every({"shape": [2**40, 2**40]})),
    "header of other dtypes": header(SHARD, every({"dtype": "I64"})),
    "header null": header(SHARD, lambda found: None),
    "header 2^63": text(SHARD, b"\xff" * 8 + b"{}"),
    "tensor of ESC": tensors(SHARD, lambda found: {k.replace("layers", "\x1b[2J"): v for k, v in found.items()}),
    "tensor missing": tensors(SHARD, lambda found: dict(list(found.items())[1:])),
    "tensors of NaN": tensors(SHARD, lambda found: {k: v * float("nan") for k, v in found.items()}),
    "tokenizer list": text("tokenizer.json", "[]"),
    "tokenizer deep": text("tokenizer.json", "[" * 100000),
    "tokenizer empty": text("tokenizer.json", "{}"),
    "tokenizer gone": both(gone("tokenizer.json"), gone(TOKENIZER)),
    "tokenizer class odd": setting(TOKENIZER, tokenizer_class="os.system"),
    "tokenizer config list": text(TOKENIZER, "[1]"),
    "generation config odd": text("generation_config.json", '{"eos_token_id": {"a": 1}, "temperature": "x"}'),
    "generation config list": text("generation_config.json", "[3]"),
}
TOLERATED = {  # what a way need not look at, or what is a model after all
    *(
        "link to itself",
        "generation config odd",
        "generation config list",
        "tokenizer list",
        "tokenizer deep",
        "tokenizer empty",
    ),
    *("tokenizer gone", "tokenizer class odd", "tokenizer config list", "remote tokenizer", "remote code by its type"),
    *(
        "eos text",
        "act odd",
        "eps NaN",
        "rope odd",
        "dtype odd",
        "torch dtype odd",
        "index metadata",
        "no type",
        "remote code elsewhere",
    ),
    *("heads 0", "heads other", "layers more", "width 0", "quantised", "quantised oddly", "quantised by text"),
    *("layers text", "layers negative", "tokenizer files", "tensors of NaN", "vocabulary other", "vocabulary 10^13"),
}
WEIGHTS_ONLY = (
    "shard",
    "header",
    "tensor",
    "pickles",
    "index",
    "layers",
    "width",
    "vocab",
    "heads",
    "an encoder",
    "no language",
)


def cases(seed: int, count: int) -> Iterator[Case]:
    sound()
    chance = random.Random(f"bases {seed}")
    found = [
        Case(f"{way}: {name}", way, change, refuse=_must(name, way))
        for name, change in CHANGES.items()
        for way in WAYS[:3]
    ]
    found += [Case(f"tokenizer: {name}", WAYS[3], CHANGES[name], False) for name in CHANGES if "tokenizer" in name]
    yield from (Case(f"{way}: nothing", way, lambda folder: None, refuse=False) for way in WAYS)
    chosen = found if count >= 280 else chance.sample(found, min(count // 2, len(found)))
    yield from chosen
    rest = max(0, count - len(chosen))
    keys = list(json.loads((sound() / "base" / CONFIG).read_text()))
    more = list(json.loads((sound() / "base" / TOKENIZER).read_text()))
    for number in range(rest // 2):
        file, names = chance.choice([(CONFIG, keys), (CONFIG, keys), (TOKENIZER, more)])
        key, value, way = chance.choice(names), chance.choice(VALUES), chance.choice(WAYS)
        yield Case(f"{number}: {way}: {key}={ascii(value)[:40]}", way, setting(file, **{key: value}), refuse=False)
    files = [CONFIG, TOKENIZER, "tokenizer.json", "generation_config.json", INDEX, SHARD, SHARD]
    yield from file_cases(files, WAYS, chance, rest - rest // 2)


def _must(name: str, way: str) -> bool:
    if name in TOLERATED:
        return False
    return not (way == "tokenizer" and name.startswith(WEIGHTS_ONLY))


def run(case: Case) -> str:
    copied("base", "adapter")
    folder = Path("base")
    case.change(folder)
    {"merge": merged, "chat": chatted, "base": based, "tokenizer": tokenised}[case.way]()
    leaked = [path for path in Path("out").rglob("*") if path.is_file() and VICTIM.encode() in path.read_bytes()]
    return frame.WRONGLY if case.refuse or leaked else frame.RIGHTLY


def merged() -> None:
    merge("base", "adapter", Path("out"))
    for path in Path("out").glob("*.safetensors"):
        load_file(path)


def chatted() -> None:
    out = io.StringIO()
    load_chat("base", [], out, dtype=None, trust_remote_code=False, max_new_tokens=3).run(["w1"])


def based() -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
    topology = start(max_grad_norm=1.0, timeout_minutes=1)
    config = load_model_config("base")
    load_base("base", config, topology, dtype=torch.float32, attention="sdpa")
    stop_token_ids(load_tokenizer("base"), generation_eos_of("base", config))


def tokenised() -> None:
    stop_token_ids(load_tokenizer("base"), generation_eos_of("base", load_model_config("base")))
