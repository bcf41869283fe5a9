"""``rlhf card``: README.md of a run folder, a model card made of what the run wrote down, and its way to the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import yaml
from huggingface_hub.errors import HFValidationError

from rlhf_toolkit.errors import CheckpointError, described
from rlhf_toolkit.export.folders import HEADS, FinishedRun, is_path
from rlhf_toolkit.reporting.run_log import Record, read_records

CARD, POLICY = "README.md", "policy"
MARK = "<!-- made by rlhf card from run.json, log.jsonl and summary.json -->"
PEFTS_OWN = "# Model Card for Model ID"  # the empty form that PEFT leaves in every folder it saves to
ROWS = 10
RECIPE = (
    *("model.name", "model.dtype", "data.train", "data.evaluation"),
    *("reward.function", "reward.functions", "reward.adapter", "reward.model"),
    *("rollout.prompts_per_rollout", "rollout.responses_per_prompt", "rollout.max_new_tokens", "rollout.temperature"),
    *("ppo.num_rollouts", "ppo.num_ppo_epochs", "ppo.mini_batches", "ppo.advantage", "ppo.policy_loss"),
    *("ppo.kl_in", "ppo.kl_coef", "update.policy_lr", "update.value_lr", "run.seed"),
)
"""Settings of the short table; all of them follow at the end of the card."""
TRAINED = {
    "rollout": ("rollout", "{}"),
    "mean score": ("critic/score/mean", "{:.3f}"),
    "KL to the reference (nats a response)": ("actor/ref_kl", "{:.3f}"),
    "tokens of a response": ("response_length/mean", "{:.1f}"),
}
EVALUATED = {
    "after rollout": ("rollout", "{}"),
    "mean score": ("eval/score/mean", "{:.3f}"),
    "KL to the reference": ("eval/ref_kl", "{:.3f}"),
    "tokens of a response": ("eval/response_length", "{:.1f}"),
    "cut off by the budget": ("eval/clip_ratio", "{:.1%}"),
}


class Uploader(Protocol):
    """What is needed of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository, or leave it as it is."""

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> Any:
        """Send the files that fit the patterns, in one commit."""


def write_card(run: FinishedRun, repo: str | None = None) -> Path:
    """Write README.md of a run folder; ``repo`` is the name under which the card says it can be loaded.

    Replaces the form that PEFT left and a card of ours; raises CheckpointError for any other README.md.
    """
    path = run.folder / CARD
    if path.exists():
        old = path.read_text(encoding="utf-8")
        if MARK not in old and PEFTS_OWN not in old:
            raise CheckpointError(f"{path} was written by somebody else; move it away, then say rlhf card again")
    path.write_text(card(run, repo), encoding="utf-8")
    return path


def card(run: FinishedRun, repo: str | None = None) -> str:
    """The card: how to load, recipe, adapters, curve, evaluations, machine, versions, all settings.

    Absolute paths are cut to their last part, and the values of ``*kwargs``, which may hold keys, are left out.
    Raises CheckpointError where the run has no adapter.
    """
    if not run.adapters:
        raise CheckpointError(f"{run.folder} has no adapter folder; restore policy/, or give another run")
    trained, evaluated = read_records(run.folder, "train"), read_records(run.folder, "eval")
    sections = [
        _metadata(run),
        MARK,
        f"# {(repo or run.folder.resolve().name).rpartition('/')[2]}",
        _opening(run),
        "## Loading",
        _loading(run, repo),
        "## Recipe",
        _table(("setting", "value"), _recipe(run.settings)),
        "## Adapters",
        _table(("folder", "rank", "alpha", "scale", "layers"), _adapters(run.adapters)),
        "## Training",
        _table(tuple(TRAINED), _numbers(trained, TRAINED)),
        "## Evaluation",
        _table(tuple(EVALUATED), _numbers(evaluated, EVALUATED)) if evaluated else "No held-out prompts were given.",
        "## Machine and versions",
        _table(("", ""), _machine(run.summary)),
        "## All settings",
        f"```yaml\n{yaml.safe_dump(_public(run.settings), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(sections) + "\n"


def push(run: FinishedRun, repo: str, uploader: Uploader) -> list[str]:
    """Send card, adapters and heads to ``repo``, which is made private where it does not exist; return what was sent.

    Nothing else of the run folder leaves this machine: no log, no samples, no checkpoint. Raises CheckpointError with
    the hub's reason.
    """
    patterns = [CARD, *(f"{name}/*" for name in run.adapters)]
    patterns += [f"{path.parent.name}/{path.name}" for head in HEADS for path in sorted(run.folder.glob(f"*/{head}"))]
    patterns = [pattern for pattern in dict.fromkeys(patterns) if not pattern.startswith("checkpoint-")]
    try:
        uploader.create_repo(repo, private=True, exist_ok=True)
        uploader.upload_folder(
            repo_id=repo,
            folder_path=str(run.folder),
            allow_patterns=patterns,
            commit_message="Adapters and card of a run",
        )
    except (OSError, HFValidationError, httpx.HTTPError) as error:
        raise CheckpointError(
            f"{run.folder} could not be sent to {repo} ({described(error)}); check the name, hf auth login and the "
            "network"
        ) from error
    return patterns


# ---- sections --------------------------------------------------------------------------------------------------------


def _metadata(run: FinishedRun) -> str:
    name = run.settings["model"]["name"]
    known = {} if _is_local(name) else {"base_model": name}
    fields = {
        **known,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "reinforcement-learning"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _opening(run: FinishedRun) -> str:
    scores = run.summary["mean_scores"]
    names = " and ".join(f"`{name}/`" for name in run.adapters)
    return (
        f"LoRA adapters ({names}) on `{_shown(run.settings['model']['name'])}`, trained with rlhf_toolkit in "
        f"{len(scores)} rollouts. A score is what the reward gave a response; it is comparable within this run only."
    )


def _loading(run: FinishedRun, repo: str | None) -> str:
    model = run.settings["model"]
    base, place = _shown(model["name"]), repo or _shown(str(run.folder))
    adapter = POLICY if POLICY in run.adapters else next(iter(run.adapters))
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.{model["dtype"]})',
        f'model = PeftModel.from_pretrained(base, "{place}", subfolder="{adapter}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
    ]
    note = "\n\nThe base was a folder on the machine that trained; put its path in place of the name." * _is_local(base)
    return "```python\n" + "\n".join(lines) + "\n```" + note


def _recipe(settings: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for name in RECIPE:
        section, _, key = name.partition(".")
        value = _public(settings.get(section, {})).get(key)
        if value not in (None, "", [], {}):
            yield f"`{name}`", f"`{value}`"


def _adapters(adapters: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for name, config in adapters.items():
        rank, alpha = config["r"], config["lora_alpha"]
        scale = f"{alpha} / sqrt({rank})" if config.get("use_rslora") else f"{alpha} / {rank}"
        layers = config["target_modules"]
        yield (
            f"`{name}/`",
            str(rank),
            str(alpha),
            scale,
            layers if isinstance(layers, str) else ", ".join(sorted(layers)),
        )


def _numbers(records: Sequence[Record], columns: Mapping[str, tuple[str, str]]) -> Iterable[tuple[str, ...]]:
    """At most ROWS records, evenly spaced, the first and the last among them."""
    last = len(records) - 1
    chosen = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)}) if last >= ROWS else range(last + 1)
    for number in chosen:
        values = [(records[number].get(name), form) for name, form in columns.values()]
        yield tuple("" if value is None else form.format(value) for value, form in values)


def _machine(summary: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    yield "processes", f"{summary['world_size']}, rank 0 on `{summary['device']}`"
    yield "minutes", f"{summary['seconds'] / 60:.1f}"
    yield "tokens per second", f"{summary['tokens_per_second']:.1f}"
    yield "peak memory of rank 0", f"{summary['peak_memory_gib']:.2f} GiB"
    yield from summary["versions"].items()


# ---- words -----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _public(value: Any) -> Any:
    """Settings without places on this machine and without arguments that may be secret."""
    if isinstance(value, Mapping):
        return {
            key: "(not shown)" if str(key).endswith("kwargs") and inner else _public(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    return _shown(value) if isinstance(value, str) else value


def _shown(text: str) -> str:
    """An absolute path without its folders; ``file.py:name`` keeps its name."""
    return Path(text).name if text.startswith(("/", "~")) and "\n" not in text else text


def _is_local(name: str) -> bool:
    return is_path(name) or Path(name).exists()
