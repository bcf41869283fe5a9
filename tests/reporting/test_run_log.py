"""The record of a run: what is written, by whom, and what the summary makes of it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlhf_toolkit.reporting import records
from rlhf_toolkit.reporting.records import (
    PACKAGES,
    history,
    mend_logs,
    read_records,
    versions,
    write_fine_tuning_summary,
    write_summary,
)
from rlhf_toolkit.reporting.run_log import RunLog
from rlhf_toolkit.reporting.seal import SEAL, require_seal

ARGUMENTS = TrainingArguments(output_dir="unused", use_cpu=True)
SAMPLES = {
    "train": [{"prompt": "p", "response": "r", "score": 1.0}],
    "eval": [{"prompt": "q", "response": "s", "score": 2.0}, {"prompt": "q", "response": "t", "score": 3.0}],
}


def log_of(folder: Path, **options: Any) -> RunLog:
    settings = {"updates_per_rollout": 4, "samples": lambda kind: SAMPLES[kind]}
    return RunLog(folder, **{**settings, **options})


def say(log: RunLog, step: int, *, main: bool = True, **logs: float) -> None:
    """What Trainer does when it logs ``logs``, whose ``/`` is written ``__``, after optimizer step ``step``."""
    state = TrainerState(global_step=step, is_world_process_zero=main, is_local_process_zero=True)
    named = {name.replace("__", "/"): value for name, value in logs.items()}
    log.on_log(ARGUMENTS, state, TrainerControl(), logs=named)


def lines(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_record_has_its_rollout_and_our_names_only(tmp_path: Path) -> None:
    say(log_of(tmp_path), 8, train__loss=0.5, critic__score__mean=0.25, epoch=1.0, grad_norm=3.0)
    assert lines(tmp_path) == [{"kind": "train", "rollout": 2, "train/loss": 0.5, "critic/score/mean": 0.25}]


def test_what_a_resumed_run_has_logged_before(tmp_path: Path) -> None:
    """Up to its checkpoint; of a rollout that was logged twice the later record; with the samples of each."""
    log = log_of(tmp_path)
    for step, loss in ((4, 0.1), (8, 0.2), (8, 0.3), (12, 0.4)):
        say(log, step, train__loss=loss)
    say(log, 8, eval__score__mean=0.7)
    found = history(tmp_path, axis="rollout", until=2)
    assert [(r["kind"], r["rollout"], r.get("train/loss")) for r, _ in found] == [
        ("train", 1, 0.1),
        ("train", 2, 0.3),
        ("eval", 2, None),
    ]
    assert [sample["response"] for sample in found[2][1]] == ["s", "t"]
    assert history(tmp_path / "nothing", axis="rollout", until=2) == []


def test_a_line_that_a_run_was_killed_in_is_cut_off(tmp_path: Path) -> None:
    a, b = (json.dumps({"kind": "eval", "rollout": number}) for number in (0, 1))
    for text, expected in ((f"{a}\n{b}\n", f"{a}\n{b}\n"), (f'{a}\n{{"ki', f"{a}\n"), ("{", ""), ("", "")):
        (tmp_path / "log.jsonl").write_text(text)
        mend_logs(tmp_path)
        assert (tmp_path / "log.jsonl").read_text() == expected


def test_records_that_a_log_has_lost_are_named_where_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(tmp_path)
    for step in (4, 8, 12, 16):
        say(log, step, train__loss=0.1)
    whole = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    for kept, until, words in (
        (whole, 4, ""),
        (whole, 3, ""),
        (whole[:3], 3, ""),
        (whole[1:], 4, "lost 1 of 4 records, the first of rollout 1, the last of rollout 1:"),
        (whole[:1] + whole[3:], 4, "lost 2 of 4 records, the first of rollout 2, the last of rollout 3:"),
        ([], 2, "lost 2 of 2 records, the first of rollout 1, the last of rollout 2:"),
    ):
        (tmp_path / "log.jsonl").write_text("".join(kept))
        mend_logs(tmp_path, until=until)
        told = capsys.readouterr().out
        assert told.count("\n") == bool(words) and words in told, (until, told)
    (tmp_path / "log.jsonl").unlink()
    mend_logs(tmp_path, until=1)
    assert "lost 1 of 1" in capsys.readouterr().out


def test_the_axis_of_a_supervised_run_is_its_steps(tmp_path: Path) -> None:
    log = log_of(tmp_path, axis="step", updates_per_rollout=1)
    say(log, 3, train__loss=0.5)
    assert lines(tmp_path) == [{"kind": "train", "step": 3, "train/loss": 0.5}]
    assert lines(tmp_path, "samples.jsonl") == [{"kind": "train", "step": 3, **SAMPLES["train"][0]}]


def test_training_and_evaluation_are_told_apart_and_the_rest_is_not_ours(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    say(log, 0, eval__score__mean=0.1)
    say(log, 4, train__loss=0.5, eval__score__mean=0.2)
    say(log, 4, train_runtime=12.0, train_loss=0.4, epoch=1.0)
    log.on_log(ARGUMENTS, TrainerState(is_world_process_zero=True), TrainerControl(), logs=None)
    assert [(record["kind"], record["rollout"]) for record in lines(tmp_path)] == [("eval", 0), ("train", 1)]


def test_samples_are_those_of_the_kind_with_their_rollout(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    say(log, 0, eval__score__mean=0.1)
    say(log, 4, train__loss=0.5)
    expected = [{"kind": "eval", "rollout": 0, **sample} for sample in SAMPLES["eval"]]
    assert lines(tmp_path, "samples.jsonl") == [*expected, {"kind": "train", "rollout": 1, **SAMPLES["train"][0]}]


def test_only_the_true_rank_0_writes(tmp_path: Path) -> None:
    """Each machine has a local rank 0; samples are not even asked for elsewhere."""
    told: list[Any] = []
    log = log_of(tmp_path, samples=lambda kind: pytest.fail("asked"), sinks=(lambda *record: told.append(record),))
    say(log, 4, main=False, train__loss=0.5)
    assert list(tmp_path.iterdir()) == [] and told == []


def test_every_sink_has_the_record_and_its_samples(tmp_path: Path) -> None:
    told: list[tuple[int, Any, Any]] = []
    sinks = tuple(lambda record, samples, number=number: told.append((number, record, samples)) for number in (1, 2))
    say(log_of(tmp_path, sinks=sinks), 4, train__loss=0.5)
    (record,), samples = lines(tmp_path), lines(tmp_path, "samples.jsonl")
    assert told == [(1, record, samples), (2, record, samples)]


def test_a_run_that_goes_on_adds_to_its_log_and_the_later_record_counts(tmp_path: Path) -> None:
    for loss in (0.5, 0.4):
        log = log_of(tmp_path)
        say(log, 4, train__loss=0.1)
        say(log, 8, train__loss=loss)
        say(log, 8, eval__score__mean=loss)
    assert len(lines(tmp_path)) == 6
    assert [(r["rollout"], r["train/loss"]) for r in read_records(tmp_path, "train")] == [(1, 0.1), (2, 0.4)]
    assert [r["eval/score/mean"] for r in read_records(tmp_path, "eval")] == [0.4]
    assert read_records(tmp_path / "none", "train") == []


# ---- summaries -------------------------------------------------------------------------------------------------------

RECORDS = [
    {"train/loss": 0.1, "critic/score/mean": 1.0, "critic/raw_score/mean": 3.0, "actor/ref_kl": 0.5},
    {"train/loss": 0.1, "critic/score/mean": 2.0, "critic/raw_score/mean": 4.0},
]
TIMES = [(2.0, 100, 1.5), (3.0, 500, 1.25)]
"""Seconds, tokens and peak memory of each rollout."""


def logged(folder: Path) -> None:
    log = log_of(folder)
    for number, (record, (seconds, tokens, memory)) in enumerate(zip(RECORDS, TIMES, strict=True)):
        times = {
            "timing_s/step": seconds,
            "perf/total_num_tokens": tokens,
            "perf/max_memory_allocated_gb": memory,
            "perf/throughput": tokens / seconds,
        }
        state = TrainerState(global_step=4 * (number + 1), is_world_process_zero=True)
        log.on_log(ARGUMENTS, state, TrainerControl(), logs={**record, **times})
    say(log, 8, eval__score__mean=0.7)


def test_a_summary_by_hand(tmp_path: Path) -> None:
    logged(tmp_path)
    summary = write_summary(tmp_path, seconds=9.0, world_size=2, device="cpu")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    require_seal(tmp_path, summary)
    assert {name: value for name, value in summary.items() if name != SEAL} == {
        "mean_scores": [1.0, 2.0],
        "mean_raw_scores": [3.0, 4.0],
        "ref_kl": [0.5, None],
        "seconds_per_rollout": [2.0, 3.0],
        "seconds": 9.0,
        "tokens_per_second": 600 / 5,  # not the mean of both rates, 108.3
        "peak_memory_gib": 1.5,
        "evaluations": [{"kind": "eval", "rollout": 2, "eval/score/mean": 0.7}],
        "world_size": 2,
        "device": "cpu",
        "versions": versions(),
    }


def test_a_summary_of_a_run_without_a_rollout(tmp_path: Path) -> None:
    summary = write_summary(tmp_path, seconds=1.0, world_size=1, device="cpu")
    assert summary["mean_scores"] == [] and summary["tokens_per_second"] == summary["peak_memory_gib"] == 0.0


def test_a_rollout_none_of_whose_responses_has_a_score_has_none_in_the_summary(tmp_path: Path) -> None:
    line = {"timing_s/step": 1.0, "perf/total_num_tokens": 1, "perf/max_memory_allocated_gb": 1.0}
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "train", "rollout": 1, **line}) + "\n")
    summary = write_summary(tmp_path, seconds=1.0, world_size=1, device="cpu")
    assert summary["mean_scores"] == summary["mean_raw_scores"] == [None]


def test_a_fine_tuning_summary_by_hand(tmp_path: Path) -> None:
    log = log_of(tmp_path, axis="step", updates_per_rollout=1, samples=lambda kind: [])
    for step, (loss, memory) in enumerate([(0.9, 2.0), (0.6, 1.0)], start=1):
        accuracy: dict[str, Any] = {"dpo__accuracy": 0.5} if step == 2 else {}
        say(log, step, train__loss=loss, dpo__loss=loss, perf__max_memory_allocated_gb=memory, **accuracy)
    say(log, 2, eval__loss=0.7)
    settings: dict[str, Any] = {"seconds": 3.0, "world_size": 1, "device": "cpu", "prefix": "dpo"}
    summary = write_fine_tuning_summary(tmp_path, **settings, extra={"rows": 7})
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["losses"] == [0.9, 0.6] and summary["accuracies"] == [0.5] and summary["peak_memory_gib"] == 2.0
    assert summary["evaluations"] == [{"kind": "eval", "step": 2, "eval/loss": 0.7}]
    assert (summary["seconds"], summary["world_size"], summary["device"], summary["rows"]) == (3.0, 1, "cpu", 7)


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in versions().items():
        assert importlib.metadata.version(name) == version
    monkeypatch.setattr(records, "PACKAGES", ("torch", "no-such-package"))
    assert versions().keys() == {"rlhf_toolkit", "torch"} and "torch" in PACKAGES
