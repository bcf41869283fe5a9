"""What the exam's sections work on: sizes for a GPU and for the rehearsal, models of random weights with a made-up
tokenizer, and the report they fill while they run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import GPU_SHAPES, ROOT, experiment, known

from rlhf_toolkit.models.attention import ROLE_ATTENTION
from rlhf_toolkit.models.quantised import Quantisation
from rlhf_toolkit.models.quantised_loading import quantise_layers

sys.path.insert(0, str(ROOT))
from tests.support.builders import tiny_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNSTOPPED = {"ppo__first_ratio_tolerance": 100.0}  # where a section measures what would stop a run
SHARPNESS = 4.0  # of random logits: their spread is then about that of a trained model's, 2 to 3
REWARD = '''
"""The exam's reward."""


def even_words(prompts, responses, **columns):
    """The share of words with an even number."""
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in responses]
    return [sum(number % 2 == 0 for number in row) / max(len(row), 1) for row in words]
'''


@dataclass(frozen=True)
class Sizes:
    """How much each section does. ``shapes`` are names of ``common.GPU_SHAPES``; ``small`` is that of whole runs."""

    small: str
    shapes: tuple[str, ...]
    vocabulary: int
    prompts: int
    prompt_words: int
    new_tokens: int
    rollouts: int
    update_tokens: dict[str, int]  # of a role, in the section that rates updates
    matrix: int  # rows and columns of the product that says what the card can do
    turns: int


WHOLE = Sizes(
    small="0.5b",
    shapes=("0.5b", "1.5b", "7b"),
    vocabulary=151936,
    prompts=64,
    prompt_words=48,
    new_tokens=128,
    rollouts=4,
    update_tokens={"0.5b": 8192, "1.5b": 4096, "7b": 2048},
    matrix=8192,
    turns=3,
)
TINY = Sizes(
    small="tiny",
    shapes=("tiny",),
    vocabulary=512,
    prompts=8,
    prompt_words=12,
    new_tokens=8,
    rollouts=2,
    update_tokens={"tiny": 64},
    matrix=128,
    turns=1,
)


@dataclass
class Report:
    """What a section has found so far, in a file that is written anew with each thing: one that is stopped keeps what
    it had."""

    file: Path
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, **found: Any) -> None:
        """Keep figures; a name that is there already is replaced."""
        self.figures |= found
        self._write()

    def check(self, what: str, found: float | bool, most: float | None = None) -> None:
        """Keep whether ``found`` is true, or at most ``most``; a number that is not finite is neither."""
        passed = bool(found) if most is None else bool(found <= most)
        self.checks.append({"what": what, "found": found, "most": most, "passed": passed})
        self._write()

    def _write(self) -> None:
        self.file.write_text(json.dumps({"figures": self.figures, "checks": self.checks}, indent=1))


@dataclass(frozen=True)
class Exam:
    """What a section is given. ``work`` is a folder that all sections share."""

    sizes: Sizes
    work: Path
    report: Report


# ---- models ----------------------------------------------------------------------------------------------------------


def config_of(shape: str, vocabulary: int) -> Any:
    """A Llama in a shape of ``GPU_SHAPES``, with biases as Qwen2.5 has them: for Qwen2 transformers insists on a
    tokenizer of its own. The first tokens are unknown, end and padding."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **GPU_SHAPES[shape].settings(),
        vocab_size=vocabulary,
        attention_bias=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    )


def random_base(config: Any, *, dtype: torch.dtype, device: str = DEVICE, attention: str = ROLE_ATTENTION) -> Any:
    """Random weights, the same every time, made where they stay: no copy passes through the host's memory."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        base.get_decoder().norm.weight.fill_(SHARPNESS)
    return base


def folder_of(exam: Exam, shape: str, *, weights: bool = False) -> Path:
    """A model's folder: config and tokenizer, and where they are asked for the weights. Made once."""
    folder = exam.work / f"model_{shape}"
    config = config_of(shape, exam.sizes.vocabulary)
    if not (folder / "config.json").is_file():
        config.save_pretrained(folder)
        words = ["<user>", "<assistant>", "<system>", *(f"w{i}" for i in range(exam.sizes.vocabulary - 6))]
        tiny_tokenizer(words=words, pad="<pad>").save_pretrained(folder)
    if weights and not list(folder.glob("*.safetensors")):
        random_base(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@contextmanager
def made_on(device: str = DEVICE) -> Iterator[None]:
    """Inside, ``prepare`` makes the base from the folder's config instead of loading it. Random numbers of a GPU are
    others than a CPU's: for the same weights on both, make them on the CPU; Trainer moves them."""

    def load_base(name: str, config: Any, topology: Any, *, dtype: torch.dtype, quantization: str, **_: Any) -> Any:
        base = random_base(config, dtype=dtype, device=device)
        return base if quantization == Quantisation.NONE else quantise(base, Quantisation(quantization))

    with patch("rlhf_toolkit.runs.weights.load_base", load_base):
        yield


def quantise(base: Any, kind: Quantisation) -> Any:
    """``base`` with its linear layers quantised where they lie, one after another."""
    weights = {name: module.weight.detach() for name, module in base.named_modules() if hasattr(module, "weight")}
    for name in quantise_layers(base, kind):
        layer = base.get_submodule(name)
        layer.weight.data = layer.stored(weights.pop(name))
    return base


# ---- experiments -----------------------------------------------------------------------------------------------------


def sections_of(exam: Exam, shape: str, name: str, **changes: Any) -> dict[str, Any]:
    """An experiment on the exam's own prompts and reward; run folder ``name``. ``changes`` have two underscores for the
    dot of ``section.key``; those that this version does not know are left out."""
    sizes, task = exam.sizes, exam.work / "task"
    if not task.is_dir():
        task.mkdir()
        (task / "reward.py").write_text(REWARD)
        (task / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts_of(sizes)))
    settings = {
        "data.train": str(task / "prompts.jsonl"),
        "data.max_prompt_tokens": 2 * sizes.prompt_words,
        "reward.function": f"{task}/reward.py:even_words",
        "rollout.prompts_per_rollout": sizes.prompts,
        "rollout.max_new_tokens": sizes.new_tokens,
        "ppo.num_rollouts": sizes.rollouts,
        **{setting.replace("__", "."): value for setting, value in changes.items()},
    }
    settings = {setting: value for setting, value in settings.items() if known(setting)}
    return experiment(str(folder_of(exam, shape)), exam.work / name, settings)


def prompts_of(sizes: Sizes) -> list[str]:
    """Prompts of uneven lengths; each four begin alike."""
    words = sizes.vocabulary - 6
    longest = sizes.prompt_words
    return [
        " ".join(f"w{(i // 4 * 31 + j * 7 if j < longest // 3 else i * 13 + j * 11) % words}" for j in range(count))
        for i in range(2 * sizes.prompts)
        for count in (longest // 2 + i * 5 % (longest // 2),)
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    """What a run logged for each rollout."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


# ---- measuring -------------------------------------------------------------------------------------------------------


def wait() -> None:
    """Until the device has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def measured(into: dict[str, Any], name: str) -> Iterator[None]:
    """Put into ``into`` the seconds of the block, and on a GPU the GiB that it held at its peak beyond what was there
    before."""
    wait()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    yield
    wait()
    into[f"{name}_s"] = time.perf_counter() - began
    if DEVICE == "cuda":
        into[f"{name}_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """|found - right| / |right|, in float64."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    return float((found - right).norm() / right.norm().clamp(min=1e-30))
