"""``rlhf evaluate`` against plain transformers and PEFT: what is said, what it scores, how far it is from the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from rlhf_toolkit.cli import main
from rlhf_toolkit.errors import ConfigError, ModelError, RLHFError
from rlhf_toolkit.models.loading import load_tokenizer
from rlhf_toolkit.runs.evaluation import GREEDY, SAMPLED, Evaluation, compare_contestants
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.rollout.test_model_rewards import by_plain_peft, write_reward_adapter
from tests.support.roles import lora
from tests.support.tiny import merged, tiny_llama, write_experiment, write_task

ANSWERS = """
def first_words(responses):
    return [response.split()[0] if response.split() else None for response in responses]
"""


def write_policy(folder: Path, seed: int = 1) -> str:
    base = tiny_llama()
    torch.manual_seed(seed)
    get_peft_model(base, lora()).save_pretrained(str(folder))
    return str(folder)


def sections(folder: Path, **changes: Any) -> dict[str, Any]:
    task = write_task(folder)
    (folder / "answers.py").write_text(ANSWERS)
    return merged(
        task,
        {
            "data.evaluation": str(folder / "heldout.jsonl"),
            "run.evaluation_samples": 4,
            "reward.passes_at": 0.5,
            "reward.answer": f"{folder}/answers.py:first_words",
            "rollout.max_new_tokens": 8,
            **changes,
        },
    )


def evaluated(settings: dict[str, Any], *contestants: str, **options: Any) -> Evaluation:
    return compare_contestants(experiment_from_dict(settings), contestants, **options)


def low_words(response: str) -> float:
    """The reward of ``tests.support.tiny``, written again."""
    numbers = [int(word[1:]) for word in response.split() if word[0] == "w"]
    return sum(n < 14 for n in numbers) / max(len(numbers), 1)


def logprobs_of(model: torch.nn.Module, tokens: list[int], prompt: int) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return torch.stack([logits[i - 1, tokens[i]] for i in range(prompt, len(tokens))])


def test_a_contestant_says_and_scores_what_plain_peft_does(tmp_path: Path) -> None:
    settings, adapter = sections(tmp_path), write_policy(tmp_path / "policy")
    found = evaluated(settings, "base", adapter)
    base, tuned = tiny_llama().eval(), PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    tokenizer = load_tokenizer(settings["model"]["name"])
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    said = {"base": [], adapter: []}  # type: dict[str, list[tuple[str, float, int]]]
    for label, model in (("base", base), (adapter, tuned)):
        for prompt in prompts:
            ids = tokenizer(prompt).input_ids
            out = model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=1
            )[0].tolist()
            kl = (logprobs_of(model, out, len(ids)) - logprobs_of(base, out, len(ids))).sum().item()
            text = str(tokenizer.decode(out[len(ids) :], skip_special_tokens=True))
            said[label].append((text, kl, len(out) - len(ids)))
    for label, rows in said.items():
        mine = found.responses[label][GREEDY]
        assert mine.sampled.responses == [text for text, _, _ in rows]
        assert mine.kl is not None
        torch.testing.assert_close(mine.kl, torch.tensor([kl for _, kl, _ in rows]), atol=1e-4, rtol=1e-4)
        estimates = found.estimates[label][GREEDY]
        scores = [low_words(text) for text, _, _ in rows]
        assert estimates["score"].mean == pytest.approx(sum(scores) / 3, abs=1e-6)
        assert estimates["pass@1"].mean == pytest.approx(sum(score >= 0.5 for score in scores) / 3)
        assert estimates["response_length"].mean == pytest.approx(sum(length for _, _, length in rows) / 3)
    for way in (
        GREEDY,
        SAMPLED,
    ):  # several threads may cut the two roles' rows differently, by a rounding or two
        assert found.estimates["base"][way]["ref_kl"].mean == pytest.approx(0.0, abs=1e-5)
    assert abs(found.estimates[adapter][GREEDY]["ref_kl"].mean) > 0.1


def test_samples_differ_and_count_for_pass_and_majority(tmp_path: Path) -> None:
    found = evaluated(sections(tmp_path), "base", greedy=False, kl=False)
    estimates, said = found.estimates["base"][SAMPLED], found.responses["base"][SAMPLED]
    assert set(estimates) == {
        *("score", "response_length", "clip_ratio"),
        *(f"{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2, 4)),
    }
    assert len(set(said.sampled.responses)) > 6 and GREEDY not in found.estimates["base"]
    passed = torch.tensor([low_words(text) >= 0.5 for text in said.sampled.responses]).view(3, 4)
    assert estimates["pass@4"].mean == pytest.approx(passed.any(1).double().mean().item())
    assert estimates["pass@1"].mean == pytest.approx(passed.double().mean().item()) == estimates["maj@1"].mean
    assert 0 < estimates["pass@1"].mean < estimates["pass@4"].mean


def test_the_same_twice_ties_and_the_streams_are_paired(tmp_path: Path) -> None:
    settings, adapter = sections(tmp_path), write_policy(tmp_path / "policy")
    copy, other = write_policy(tmp_path / "copy"), write_policy(tmp_path / "other", seed=2)
    found = evaluated(settings, adapter, copy, other)
    assert found.responses[adapter][SAMPLED].sampled.responses == found.responses[copy][SAMPLED].sampled.responses
    rates = {(rate.of, rate.over, rate.by, rate.decoding): rate.rate.mean for rate in found.win_rates}
    assert set(rates) == {
        (of, over, "score", way)
        for of, over in ((copy, adapter), (other, adapter), (other, copy))
        for way in (GREEDY, SAMPLED)
    }
    assert rates[copy, adapter, "score", GREEDY] == 0.5
    assert rates[other, adapter, "score", SAMPLED] == rates[other, copy, "score", SAMPLED] != 0.5
    mine, theirs = (found.responses[label][SAMPLED].scores.view(3, 4).tolist() for label in (other, adapter))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for row in range(3) for a in mine[row] for b in theirs[row]]
    assert rates[other, adapter, "score", SAMPLED] == pytest.approx(sum(wins) / len(wins))


def test_the_reference_is_the_experiments_and_rewards_are_told_apart(tmp_path: Path) -> None:
    """With an adapter as reference its own KL is 0; a reward adapter's scores stand beside the function's."""
    adapter, reward = write_policy(tmp_path / "policy"), write_reward_adapter(tmp_path / "reward")
    settings = sections(tmp_path, **{"model.policy_adapter": adapter, "reward.adapter": str(reward)})
    found = evaluated(settings, adapter, "base")
    mine = found.responses[adapter][SAMPLED].kl
    assert mine is not None and mine.abs().max() < 1e-5
    assert abs(found.estimates["base"][SAMPLED]["ref_kl"].mean) > 0.05
    said = found.responses["base"][GREEDY]
    lengths = said.sampled.lengths()
    by_hand = torch.tensor(by_plain_peft(reward, said.sampled.sequences, lengths))
    torch.testing.assert_close(said.rewards["reward/adapter"], by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said.rewards["score"], by_hand + said.rewards["reward/low_words"], atol=1e-5, rtol=1e-5)
    assert {rate.by for rate in found.win_rates} == {"score", "reward/low_words", "reward/adapter"}


def test_the_command_prints_and_writes_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_experiment(tmp_path / "e.yaml", sections(tmp_path))
    adapter, out, lines = write_policy(tmp_path / "policy"), tmp_path / "out.json", tmp_path / "said.jsonl"
    words = ["evaluate", str(path), "base", adapter, "--samples", "2", "--out", str(out), "--responses", str(lines)]
    main([*words, "--set", "rollout.max_new_tokens=4"])
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    score = written["estimates"][adapter]["sampled"]["score"]
    assert f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in printed
    assert "3 prompts, 2 samples of each" in printed and f"{adapter} over base, by score (greedy)" in printed
    assert written["experiment"]["rollout"]["max_new_tokens"] == 4
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 2 * 3 * (1 + 2) and all(row["tokens"] <= 4 for row in rows)
    mine = [row["score"] for row in rows if (row["contestant"], row["decoding"]) == (adapter, "sampled")]
    assert sum(mine) / 6 == pytest.approx(score["mean"], abs=1e-6)
    assert [(row["row"], row["sample"]) for row in rows[3:9]] == [(i, j) for i in range(3) for j in range(2)]


def test_a_file_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_experiment(tmp_path / "e.yaml", sections(tmp_path))
    for option, place in (("--out", tmp_path / "no/out.json"), ("--responses", tmp_path)):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(path), "base", option, str(place)])
        said = capsys.readouterr().err.strip()
        assert ended.value.code == 1 and said.startswith(f"ConfigError: {place} cannot be written ("), said
        assert "\n" not in said


def test_a_missing_score_is_null_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "def odd(prompts, responses, **columns):\n    return [None if p == prompts[0] else 1.0 for p in prompts]\n"
    )
    entry = {"function": f"{tmp_path}/odd.py:odd", "on_failure": "drop"}
    settings = sections(tmp_path, **{"reward.function": None, "reward.functions": [entry]})
    found = evaluated({**settings, "reward": {k: v for k, v in settings["reward"].items() if v}}, "base", kl=False)
    found.write_responses(tmp_path / "said.jsonl")
    scores = [json.loads(line)["score"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert set(scores) == {None, 1.0}
    assert found.estimates["base"][SAMPLED]["score"].mean == 1.0
    assert found.estimates["base"][SAMPLED]["pass@4"].mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("changes", "contestants", "options", "kind", "message"),
    [
        (
            {f"reward.{name}": None for name in ("passes_at", "answer")}
            | {"data.evaluation": None, "run.evaluation_samples": 0},
            *(("base",), {}, ConfigError, r"data\.evaluation is missing"),
        ),
        ({}, ("base", "base"), {}, ConfigError, "base is named twice"),
        ({"run.evaluation_samples": 0}, ("base",), {"greedy": False}, ConfigError, "nothing to decode"),
        ({}, ("./nowhere",), {}, ModelError, r"\./nowhere is no folder"),
        ({"reward.answer": "x.py:f"}, ("base",), {}, ConfigError, r"reward\.answer='x\.py:f': there is no file x\.py"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    tmp_path: Path,
    changes: dict[str, Any],
    contestants: tuple[str, ...],
    options: dict[str, Any],
    kind: type[RLHFError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        evaluated(sections(tmp_path, **changes), *contestants, **options)


def test_a_reward_adapter_is_no_contestant(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds reward_head\.safetensors"):
        evaluated(sections(tmp_path), str(write_reward_adapter(tmp_path / "reward")))


def test_answers_without_a_threshold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.answer=.* votes for maj@k, but nothing says which answers are"):
        experiment_from_dict(sections(tmp_path, **{"reward.passes_at": None}))
