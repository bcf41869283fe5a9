"""What an adapter's settings may ask for: names and numbers, and patterns that are matched in bounded time.

PEFT takes some settings for regular expressions and matches every layer's name against them; one with repetitions
inside repetitions takes longer than anybody waits. It also imports a module by name, and reads other adapters, where
settings say so. All of that is looked at here, before PEFT sees it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors import safe_open

from rlhf_toolkit.errors import ModelError, described, shortened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save")
"""Settings that may be a regular expression or a list of names."""
KEYED = ("rank_pattern", "alpha_pattern")
"""Settings whose keys PEFT takes for regular expressions."""
LARGEST = 1e6
"""Of a number among the weights; those of trained adapters are below 10."""
MOST_RANK, MOST_ALPHA = 2**14, 1e6
MOST_NAMES, LONGEST = 100_000, 20_000
"""Names in a list, and characters of a pattern."""
MOST_KEYS = 1024
WILDCARD, MOST_STEPS = 60, 2 * 60**4
"""What a repetition multiplies the steps of a match by, about the length of a layer's name, and the most steps that a
pattern may come to: four wildcards one after another, and as much in other alternatives."""
OWN_PATHS = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "peft_type", *PATTERNS)


def check_adapter_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError, by the setting's name, for what is no LoRA, a rank or an alpha that is no sound number, a
    pattern that might take long, a module to import, or a path; and for weights that are not safetensors."""
    path = folder / CONFIG
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}; load the adapter with PEFT and save it again")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path} has peft_type={shortened(config.get('peft_type'))}; only LORA can be used here")
    for key in ("r", "lora_alpha", "lora_dropout"):
        if key in config:
            _check_number(path, key, config[key])
    for key in KEYED:
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, Mapping) or len(values) > MOST_KEYS:
            raise ModelError(
                f"{path} has {key}={shortened(values)}, not at most {MOST_KEYS} numbers by name; restore it"
            )
        for name, value in values.items():
            _check_number(path, f"{key}.{name}", value)
        if sum(steps(path, key, name) for name in values) > 4 * MOST_STEPS:
            raise ModelError(f"{path} has {key} with patterns that take long to match; write the layers' names")
    for key in PATTERNS:
        _check_pattern(path, key, config.get(key))
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        raise ModelError(
            f"{path} has megatron_core={shortened(config.get('megatron_core'))}, a module to import; remove it"
        )
    for key, value in config.items():
        for text in _texts(value) if key not in (*OWN_PATHS, *KEYED) else ():
            if "/" in text or "\\" in text or len(text) > 500:
                raise ModelError(f"{path} has {key} with {shortened(text)}, which may name a file; remove it")
    check_adapter_weights(folder / WEIGHTS)


def check_adapter_weights(path: Path) -> None:
    """Raise ModelError where a safetensors file cannot be read, or holds anything but finite numbers with a point of a
    size that training leaves, under names that print."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                if not _is_name(name):
                    raise ModelError(
                        f"{path} holds a tensor of the name {shortened(name, 80)}, which is none; save it again"
                    )
                if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dim() == 0:
                    words = f"{str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}"
                    raise ModelError(f"{path} holds {name} as {words}, no matrix of floats; save the adapter again")
                largest = float(tensor.abs().max())  # NaN where one of them is
                if not math.isfinite(largest):
                    raise ModelError(f"{path} holds NaN or infinity in {name}; take an earlier checkpoint")
                if largest > LARGEST:
                    raise ModelError(
                        f"{path} holds {largest:.3g} in {name}, which no training leaves; take an earlier checkpoint"
                    )
    except ModelError:
        raise
    except Exception as error:  # a header may say anything
        raise ModelError(f"{path} has no readable weights ({described(error)}); save the adapter again") from error


def read_lora_config(folder: str | Path) -> LoraConfig:
    """PEFT's settings of a LoRA folder that ``check_adapter_config`` let pass. Raises ModelError."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT gives the file's values to whatever class they name
        raise ModelError(f"{folder}/{CONFIG} cannot be read ({described(error)}); restore it") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder} is a {config.peft_type} adapter; only LoRA can be used here")
    return config


def _check_number(path: Path, key: str, value: Any) -> None:
    kind = key.partition(".")[0]
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in ("r", "rank_pattern"):
        good = good and isinstance(value, int) and 0 < value <= MOST_RANK
        rule = f"a whole number from 1 to {MOST_RANK}"
    elif kind == "lora_dropout":
        good, rule = good and 0 <= value < 1, "a number from 0 up and below 1"
    else:
        good, rule = (
            good and 0 < value <= MOST_ALPHA and math.isfinite(value),
            f"a number above 0 and up to {MOST_ALPHA:g}",
        )
    if not good:
        raise ModelError(f"{path} has {key}={shortened(value)}, which is not {rule}; restore it")


def _check_pattern(path: Path, key: str, value: Any) -> None:
    if isinstance(value, str):
        steps(path, key, value)
    elif isinstance(value, list):
        bad = next((name for name in value if not _is_name(name)), None)
        if bad is not None or len(value) > MOST_NAMES:
            raise ModelError(f"{path} has {key} with {shortened(bad)}, which is no layer's name; restore it")
        if key == "layers_pattern":
            for name in value:
                steps(path, key, name)
    elif value is not None and value is not False:
        raise ModelError(f"{path} has {key}={shortened(value)}, which is no name nor a list of them; restore it")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


# ---- patterns --------------------------------------------------------------------------------------------------------

ATOM = re.compile(r"[\w\-:/ ]|\\[.\-_dDwWsSbB$^()\[\]{}]|\.|\^|\$|\[\^?[\w\\.\-]{1,80}\]")
REPEAT = re.compile(r"[*+?]\??|\{\d{1,3}(,\d{0,3})?\}\??")
PLAIN = re.compile(r"[\w\-]+")


class _TooMuch(Exception):
    """Not in the part of the language of patterns that is understood here."""


def steps(place: str | Path, key: str, pattern: str) -> int:
    """A bound on the steps of matching ``pattern`` against a layer's name. Raises ModelError, which names ``key``,
    above ``MOST_STEPS``, and for what is not letters, classes of them, alternatives, and repetitions of single letters
    or classes: no repetition of a group, no reference back, no look around."""
    try:
        if len(pattern) > LONGEST:
            raise _TooMuch
        found, end = _alternatives(pattern, 0, 0)
        if end != len(pattern) or found > MOST_STEPS:
            raise _TooMuch
        re.compile(pattern)
    except (_TooMuch, re.error, OverflowError, RecursionError) as error:
        raise ModelError(
            f"{place} has {key} with the pattern {shortened(pattern, 100)}, which may take long to match; write the "
            "layers' names, or a pattern with fewer repetitions"
        ) from error
    return found


def _alternatives(text: str, place: int, depth: int) -> tuple[int, int]:
    """Steps of ``a|b|c`` from ``place`` on, and where it ends: at ``)`` or at the end of the text. Of plain names none
    of which begins another, at most one fits."""
    if depth > 8:
        raise _TooMuch
    found, names = [], []
    while True:
        begin = place
        count, place = _sequence(text, place, depth)
        found.append(count)
        names.append(text[begin:place])
        if place == len(text) or text[place] == ")":
            break
        place += 1
    one_begins_another = any(later.startswith(earlier) for earlier, later in pairwise(sorted(names)))
    if all(PLAIN.fullmatch(name) for name in names) and not one_begins_another:
        return 1, place
    return sum(found), place


def _sequence(text: str, place: int, depth: int) -> tuple[int, int]:
    count = 1
    while place < len(text) and text[place] not in "|)":
        if text[place] == "(":
            start = place + (3 if text.startswith("(?:", place) else 1)
            if text.startswith("?", start):
                raise _TooMuch
            inside, place = _alternatives(text, start, depth + 1)
            if place == len(text):
                raise _TooMuch
            place += 1
            optional = text.startswith("?", place)
            if not optional and REPEAT.match(text, place):
                raise _TooMuch
            count *= inside + optional
            place += optional
        else:
            atom = ATOM.match(text, place)
            if atom is None:
                raise _TooMuch
            place = atom.end()
            repeat = REPEAT.match(text, place)
            if repeat is not None:
                count *= _choices(repeat[0])
                place = repeat.end()
        if count > MOST_STEPS:
            raise _TooMuch
    return count, place


def _choices(repeat: str) -> int:
    """Lengths that a repetition may have."""
    if repeat[0] == "?":
        return 2
    if repeat[0] in "*+":
        return WILDCARD
    first, comma, last = repeat.strip("{}?").partition(",")
    return 1 if not comma else min(WILDCARD, abs(int(last) - int(first)) + 1) if last else WILDCARD
