"""What a finished run shows: numbers of both ends, the same prompts before and after, and where everything lies."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.reporting.report import (
    SHOWN_SAMPLES,
    before_and_after,
    evaluation_lines,
    places,
    print_report,
    supervised_table,
    table,
)

SUMMARY: dict[str, Any] = {
    "mean_scores": [0.0, 1.0, 9.0, 2.0, 3.0, 4.0, 5.0],
    "ref_kl": [0.1, 0.75],
    "evaluations": [
        {"eval/score/mean": 0.25, "eval/sampled_score/mean": 0.125},
        {"eval/score/mean": 0.5},
        {"eval/score/mean": 1.5, "eval/sampled_score/mean": 1.25},
    ],
    "seconds": 90.0,
    "tokens_per_second": 120.0,
    "peak_memory_gib": 2.5,
}


def numbers(lines: list[str]) -> dict[str, float]:
    return {name: float(value) for name, value in (re.split(r"\s{2,}", line.strip()) for line in lines)}


def test_the_table_by_hand() -> None:
    assert numbers(table(SUMMARY)) == {
        "mean score, first two rollouts": 0.5,
        "mean score, last four rollouts": 3.5,
        "held-out score, before": 0.25,
        "held-out score, after": 1.5,
        "the same, sampled, before": 0.12,
        "the same, sampled, after": 1.25,
        "KL to the reference, last rollout (nats a response)": 0.75,
        "minutes": 1.5,
        "tokens per second": 120.0,
        "peak memory of rank 0 (GiB)": 2.5,
    }


def test_what_a_run_did_not_measure_is_left_out() -> None:
    lines = table({**SUMMARY, "evaluations": [], "ref_kl": [None]})
    assert not [line for line in lines if "held-out" in line or "KL" in line] and len(lines) == 5
    assert len({len(line) for line in lines}) == 1, "columns stand under one another"
    lost = table({**SUMMARY, "evaluations": [], "ref_kl": []})
    assert [line.split("  ")[1] for line in lost] == [line.split("  ")[1] for line in lines], "a log without records"


def test_what_has_no_score_is_no_number_and_counts_nowhere() -> None:
    evaluations = [SUMMARY["evaluations"][0], {}]
    found = numbers(table({**SUMMARY, "mean_scores": [None, 2.0, 1.0, None, 3.0, 5.0], "evaluations": evaluations}))
    assert found["mean score, first two rollouts"] == 2.0 and found["mean score, last four rollouts"] == 3.0
    assert found["held-out score, before"] == 0.25 and math.isnan(found["held-out score, after"])


def test_the_table_of_a_supervised_run_by_hand() -> None:
    evaluations = [{"step": 0, "kind": "eval", "eval/loss": 4.0}, {"step": 20, "kind": "eval", "eval/loss": 1.0}]
    summary = {"losses": [4.0, 2.0, *[9.0] * 16, 1.0, 0.0], "evaluations": evaluations, "seconds": 30.0}
    assert numbers(supervised_table({**summary, "peak_memory_gib": 1.0})) == {
        "loss, first tenth": 3.0,
        "loss, last tenth": 0.5,
        "held out, before: loss": 4.0,
        "held out, after: loss": 1.0,
        "minutes": 0.5,
        "peak memory of rank 0 (GiB)": 1.0,
    }


def samples(folder: Path, prompts: int) -> None:
    """Prompts evaluated three times, with training samples in between."""
    rows = []
    for rollout in range(3):
        for prompt in range(prompts):
            said = {"prompt": f"prompt {prompt}", "response": f"said {rollout}", "score": prompt + rollout / 10}
            rows += [{"kind": "eval", "rollout": rollout, **said}, {"kind": "train", **said, "response": "in training"}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("prompts", [1, SHOWN_SAMPLES + 2])
def test_a_prompt_is_shown_with_its_first_and_its_last_answer(prompts: int, tmp_path: Path) -> None:
    samples(tmp_path, prompts)
    shown = before_and_after(tmp_path)
    text = "\n".join(shown)
    assert "in training" not in text and "said 1" not in text
    for number in range(min(prompts, SHOWN_SAMPLES)):
        prompt, before, after = shown[4 * number : 4 * number + 3]
        assert f"prompt {number}" in prompt
        assert f"before +{number}.00" in before and "said 0" in before
        assert f"after  +{number}.20" in after and "said 2" in after
    assert len(shown) == 4 * min(prompts, SHOWN_SAMPLES) - 1


def test_an_answer_without_a_score_says_so(tmp_path: Path) -> None:
    said = {"kind": "eval", "rollout": 0, "prompt": "p", "response": "r", "score": None}
    (tmp_path / "samples.jsonl").write_text(json.dumps(said) + "\n")
    _, before, after = (line.split() for line in before_and_after(tmp_path))
    assert before == ["before", "none", "r"] and after == ["after", "none", "r"]


def test_without_evaluations_nothing_is_shown(tmp_path: Path) -> None:
    assert before_and_after(tmp_path) == []


def test_it_says_where_everything_lies(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    text = "\n".join(places(tmp_path, tmp_path))
    assert str(tmp_path / "log.jsonl") in text and f"adapters    {tmp_path / 'policy'}" in text
    assert str(tmp_path / "value") not in text, "what was not trained is not there"
    (tmp_path / "policy/config.json").touch()
    assert f"model       {tmp_path / 'policy'}" in "\n".join(places(tmp_path, tmp_path))


def test_ranks_without_a_summary_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(tmp_path, {})
    assert capsys.readouterr().out == ""
    print_report(tmp_path, SUMMARY)
    assert "held-out score, after" in capsys.readouterr().out


def test_an_evaluation_has_a_column_for_each_contestant() -> None:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.5, "high": mean + 0.5}

    found = {
        "prompts": 7,
        "samples": 4,
        "estimates": {
            "base": {"greedy": {"score": interval(1.0)}},
            "policy": {"greedy": {"score": interval(2.0), "KL": interval(0.5)}},
        },
        "win_rates": [{"of": "policy", "over": "base", "by": "score", "decoding": "greedy", "rate": interval(0.75)}],
    }
    lines = [re.split(r"\s{2,}", line.strip()) for line in evaluation_lines(found)]
    assert ["greedy", "base", "policy"] in lines
    assert ["score", "1.000 [0.500, 1.500]", "2.000 [1.500, 2.500]"] in lines
    assert ["KL", "0.500 [0.000, 1.000]"] in lines
    assert lines[-1] == ["policy over base, by score (greedy): 75.0% [25.0%, 125.0%]"]
