"""lm-eval loads a run's adapter and what ``rlhf merge`` makes of it; log-probs are those of transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_toolkit.cli import main
from tests.support.exports import peft_model

ROWS = [
    {
        "question": f"w{i} w{3 * i % 28}",
        "choices": [f"w{(5 * i + j) % 28} w{(i + 2 * j) % 28}" for j in range(3)],
        "right": i % 3,
    }
    for i in range(6)
]


@pytest.fixture
def tasks(tmp_path: Path) -> TaskManager:
    """One task of multiple choice in local files."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def measured(tasks: TaskManager, **model: Any) -> tuple[list[float], float]:
    """The log-prob of each choice of each row, and the accuracy, in lm-eval's hands."""
    loaded = HFLM(dtype="float32", device="cpu", batch_size=2, **model)
    found = simple_evaluate(model=loaded, tasks=["tiny"], task_manager=tasks, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    logprobs = [float(choice[0]) for sample in samples for choice in sample["filtered_resps"]]
    return logprobs, found["results"]["tiny"]["acc,none"]


def expected(model: nn.Module, base: Path) -> list[float]:
    """The same by one forward pass for each choice."""
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for row in ROWS:
        for choice in row["choices"]:  # type: ignore[attr-defined]
            given, said = (tokenizer(text, add_special_tokens=False).input_ids for text in (row["question"], choice))
            with torch.no_grad():
                logprobs = model.eval()(torch.tensor([given + said])).logits[0].float().log_softmax(-1)
            found.append(sum(logprobs[len(given) - 1 + t, token].item() for t, token in enumerate(said)))
    return found


def test_a_merged_folder_and_an_adapter_on_its_base(finished_run: Path, tmp_path: Path, tasks: TaskManager) -> None:
    base, policy = finished_run / "model", finished_run / "run/policy"
    main(["merge", str(base), str(policy), str(tmp_path / "merged")])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for model, reference in (
        ({"pretrained": str(tmp_path / "merged")}, expected(plain, base)),
        ({"pretrained": str(base), "peft": str(policy)}, expected(peft_model(base, policy), base)),
    ):
        logprobs, accuracy = measured(tasks, **model)
        assert logprobs == pytest.approx(reference, abs=1e-5)
        threes = [reference[i : i + 3] for i in range(0, len(reference), 3)]
        right = [three.index(max(three)) == row["right"] for three, row in zip(threes, ROWS, strict=True)]
        assert accuracy == pytest.approx(sum(right) / len(right))
    untrained, _ = measured(tasks, pretrained=str(base))
    assert max(abs(one - other) for one, other in zip(untrained, logprobs, strict=True)) > 1e-2
