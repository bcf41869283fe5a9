"""Every estimator and every loss learns: a tiny model, a rule as reward, a bound that a wrong sign does not reach.

The rule is to write words below w14, half of the words there are. Estimators that discount, and the losses with one of
them, get it as a reward of each token and discount it away: a token's advantage is then its own reward, so that what is
a position off learns nothing. The others get the share of such words as the score of the response.

Seen in the last four rollouts, with seeds 0 to 7: from 0.857 (remax; all others above 0.88) to 1. With signs flipped as
in ``tests/mutations.py`` and seeds 0 to 2: at most 0.18. With what a token earned a position off (gae,
reinforce_plus_plus, gpg): at most 0.54, as without learning. What learns all the same, such as another group's baseline
or a mask that lets zeros in, is left to unit tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS
from rlhf_toolkit.algorithms.policy_losses import POLICY_LOSSES
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.models.test_architectures import GEMMA4
from tests.support.tiny import merged, tiny_llama, tiny_recurrent, write_task

BOUND = 0.7  # of the mean score of the last rollouts; the first have about 0.5
LEARNING = {
    "rollout.prompts_per_rollout": 12,
    "rollout.responses_per_prompt": 4,
    "rollout.max_new_tokens": 4,
    "ppo.num_rollouts": 12,
    "ppo.mini_batches": 2,
    "ppo.kl_coef": 0.0,
    "update.micro_batch_tokens": 512,
    "update.policy_lr": 5e-2,
    "update.value_lr": 5e-2,
    "update.value_head_lr": 5e-2,
}
SHARP = tiny_llama(num_hidden_layers=1, initializer_range=0.3)  # with 0.02 no adapter could make one word much likelier
LOW_TOKENS = '''
def low_tokens(prompts, responses, tokens, **columns):
    """For each token whether it is a word below w14; w0 has the id 4. A response's sum is the share of such tokens."""
    return [[(4 <= token < 18) / len(row) for token in row] for row in tokens]
'''
REWARDED_BY_TOKEN = ("gae", "reinforce_plus_plus")
OF_ESTIMATOR: dict[str, dict[str, Any]] = {"vapo": {"ppo.advantage_kwargs": {"alpha": 1.0}}}  # lambda 0.75, not 0
OF_LOSS: dict[str, dict[str, Any]] = {"dro": {"ppo.policy_loss_kwargs": {"beta": 0.1}}}


def scores(folder: Path, estimator: str, changes: dict[str, Any], model: PreTrainedModel = SHARP) -> list[float]:
    """The mean score of each rollout of a run."""
    task = write_task(folder, model=model)
    if estimator in REWARDED_BY_TOKEN:
        (folder / "tokens.py").write_text(LOW_TOKENS)
        changes = {**changes, "reward.function": f"{folder}/tokens.py:low_tokens", "ppo.gamma": 0.0}
    run = prepare(experiment_from_dict(merged(task, {**LEARNING, "ppo.advantage": estimator, **changes})))
    return run.train()["mean_scores"]


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
def test_every_estimator_learns(tmp_path: Path, estimator: str) -> None:
    found = scores(tmp_path, estimator, OF_ESTIMATOR.get(estimator, {}))
    assert mean(found[-4:]) > BOUND > mean(found[:2]), found


def test_a_model_with_recurrent_states_learns(tmp_path: Path) -> None:
    """And what it samples with, token by token, is what it learns from, whole rows at once."""
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}
    found = scores(tmp_path, "gae", {}, tiny_recurrent(initializer_range=0.3, **layers))
    assert mean(found[-4:]) > BOUND > mean(found[:2]), found
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    gaps = [record["rollout/logprob_gap_max"] for record in records if "rollout/logprob_gap_max" in record]
    ratios = [record["actor/first_ratio_deviation"] for record in records if "actor/first_ratio_deviation" in record]
    assert len(gaps) >= 12 and max(gaps) < 1e-4
    assert ratios and max(ratios) < 1e-5


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_every_loss_learns(tmp_path: Path, loss: str) -> None:
    found = scores(tmp_path, "reinforce_plus_plus", {"ppo.policy_loss": loss, **OF_LOSS.get(loss, {})})
    assert mean(found[-4:]) > BOUND > mean(found[:2]), found


def test_layers_that_read_the_keys_of_others_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = {"vocab_size": 32, "vocab_size_per_layer_input": 32, "pad_token_id": 1, "eos_token_id": 1}
    sizes = {**GEMMA4, **tokens, "bos_token_id": None, "final_logit_softcapping": None, "initializer_range": 0.3}
    gemma4 = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma4_text"](**sizes))
    found = scores(tmp_path, "reinforce_plus_plus", {}, gemma4)
    assert mean(found[-4:]) > BOUND > mean(found[:2]), found
