"""Rewards that are models: an adapter on the shared base against plain PEFT, a reward model against plain transformers,
and both on two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from rlhf_toolkit.distributed.topology import Launch, Topology
from rlhf_toolkit.errors import ConfigError, ModelError, OutOfMemoryError, RewardError
from rlhf_toolkit.models.loading import load_tokenizer
from rlhf_toolkit.models.reward_model import RewardModel, load_reward_model
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers.ppo import PPOTrainer
from rlhf_toolkit.types import Prompt
from tests.rollout.test_evaluated import sampled as evaluated
from tests.support.builders import tiny_tokenizer
from tests.support.launch import run_recipe
from tests.support.offenders import for_each
from tests.support.roles import lora
from tests.support.tiny import SIZES, WORDS, merged, tiny_llama, write_experiment, write_task
from tests.support.values import named

VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}


def write_reward_adapter(folder: Path, *, rank: int = 5) -> Path:
    """A LoRA folder with a head, of another rank than the policy's, as a reward trainer leaves it."""
    torch.manual_seed(11)
    model = get_peft_model(tiny_llama(), lora(r=rank, lora_alpha=2 * rank))
    model.save_pretrained(str(folder))
    head = {"weight": torch.randn(SIZES["hidden_size"]), "bias": torch.randn(1)}
    save_file(head, folder / "reward_head.safetensors")
    return folder


def write_reward_model(folder: Path, *, labels: int = 1) -> Path:
    """A classifier whose tokenizer numbers the words in the opposite order."""
    torch.manual_seed(12)
    config = tiny_llama().config
    config.num_labels, config.initializer_range = labels, 0.3
    LlamaForSequenceClassification(config).save_pretrained(folder)
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    tiny_tokenizer(words=WORDS[::-1], pad="</s>", chat_template=template).save_pretrained(folder)
    return folder


def prepared(folder: Path, **changes: Any) -> PPOTrainer:
    run = prepare(experiment_from_dict(merged(write_task(folder), {"rollout.max_new_tokens": 12, **changes})))
    run.progress.close()
    return run.trainer


def by_plain_peft(adapter: Path, sequences: torch.Tensor, lengths: list[int]) -> list[float]:
    """The head on the last token's state, row by row, without our code."""
    model: Any = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    head = load_file(adapter / "reward_head.safetensors")
    with torch.no_grad():
        states = [
            model.base_model.model.model(row[None, :length]).last_hidden_state[0, -1]
            for row, length in zip(sequences, lengths, strict=True)
        ]
    return [float(state @ head["weight"] + head["bias"]) for state in states]


@pytest.mark.parametrize("packing", ["on", "off"])
def test_the_reward_adapters_score_is_plain_pefts(tmp_path: Path, packing: str) -> None:
    adapter = write_reward_adapter(tmp_path / "adapter")
    changes = {"reward.function": "", "reward.adapter": str(adapter), "update.packing": packing}
    trainer = prepared(tmp_path, **changes)
    collected = trainer.maker.collect(trainer.model, 0)
    experience = collected.tokens
    expected = by_plain_peft(adapter, experience.sequences, experience.lengths())
    assert [sample["score"] for sample in collected.samples] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 4, "equal scores would not show which row is which"


def test_weights_of_function_adapter_and_model_add_up(tmp_path: Path) -> None:
    adapter, model = write_reward_adapter(tmp_path / "adapter"), write_reward_model(tmp_path / "rm")
    changes = {"reward.adapter": str(adapter), "reward.model": str(model)}
    alone = {}
    for name, weights in {
        "function": (0.0, 0.0),
        "adapter": (1.0, 0.0),
        "model": (0.0, 1.0),
        "all": (0.5, -2.0),
    }.items():
        folder = tmp_path / f"run {name}"
        folder.mkdir()
        both = {"reward.adapter_weight": weights[0], "reward.model_weight": weights[1]}
        trainer = prepared(folder, **changes, **both)
        collected = trainer.maker.collect(trainer.model, 0)
        alone[name] = torch.tensor([float(sample["score"]) for sample in collected.samples])
    function = alone["function"]
    expected = function + 0.5 * (alone["adapter"] - function) - 2.0 * (alone["model"] - function)
    torch.testing.assert_close(alone["all"], expected, rtol=1e-5, atol=1e-5)
    assert {"reward/low_words", "reward/adapter", "reward/model"} <= collected.metrics.keys()


def test_the_value_starts_at_the_reward_adapters_score(tmp_path: Path) -> None:
    """After the last token the value is the score: same adapter, same head, one forward. Other rows of one product, and
    so to rounding."""
    adapter = write_reward_adapter(tmp_path / "adapter")
    changes = {"reward.adapter": str(adapter), "model.value_adapter": str(adapter), "model.value_head_std": 0.0}
    trainer = prepared(tmp_path, **changes)
    experience = trainer.maker.collect(trainer.model, 0).tokens
    layout = trainer.maker.scored_sampler.cutting.layout(
        experience.sequences, experience.prompt_lengths, experience.response_lengths
    )
    with torch.no_grad():
        out = trainer.model(layout, roles=("value", "reward"))
    torch.testing.assert_close(out.final_values, out.reward_scores, rtol=1e-5, atol=1e-5)
    assert out.reward_scores.std() > 0.01
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(".reward." in name for name in trained) and any(".value." in name for name in trained)


def plain_scores(folder: Path, texts: list[str]) -> list[float]:
    """The classifier on one text at a time."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(str(folder))
    with torch.no_grad():
        return [float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in texts]


def reward_model(folder: Path) -> RewardModel:
    return RewardModel("rm", AutoModelForSequenceClassification.from_pretrained(folder), load_tokenizer(str(folder)))


def test_the_reward_model_reads_text_by_its_own_tokenizer_and_template(tmp_path: Path) -> None:
    model = reward_model(write_reward_model(tmp_path / "rm"))
    prompts = [
        Prompt(0, "w1 w2", (1,), {}),
        Prompt(1, "rendered by another template", (1,), {}, ({"role": "user", "content": "w4"},)),
        Prompt(2, "w9", (1,), {}),
    ]
    responses = [" w3 w4 w5 w6 w7", "w5 w6", " w1"]
    found = model.scores(prompts, responses)
    texts = ["w1 w2 w3 w4 w5 w6 w7", "<user> w4 <assistant> w5 w6 ", "w9 w1"]
    assert found == pytest.approx(plain_scores(tmp_path / "rm", texts), abs=1e-5)
    assert len({round(score, 3) for score in found}) == 3


def test_a_reward_model_that_runs_out_of_memory_scores_the_same_in_smaller_batches(tmp_path: Path) -> None:
    model, told = reward_model(write_reward_model(tmp_path / "rm")), list[str]()
    prompts, responses = [Prompt(i, f"w{i}", (1,), {}) for i in range(6)], [" w3" * (1 + i % 3) for i in range(6)]
    expected, forward = model.scores(prompts, responses), model._forward

    def small(rows: list[list[int]]) -> list[float]:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(rows)

    model._forward, model.batch_tokens = small, 24  # type: ignore[method-assign]
    assert model.scores(prompts, responses, note_retry=lambda what, said: told.append(what)) == pytest.approx(expected)
    assert told == [f"the reward model runs again with at most {most} tokens" for most in (12, 6)]
    model._forward = lambda rows: small(rows * 3)  # type: ignore[method-assign]
    with pytest.raises(OutOfMemoryError):
        model.scores(prompts, responses)
    assert model.batch_tokens < 6


def test_a_score_that_is_not_finite_spoils_its_row_alone() -> None:
    rows = evaluated().rows(range(4))
    rows = replace(rows, token_rewards=torch.tensor([[0.5, -0.5, 0.0, 0.0]] * 4))
    scores = torch.tensor([1.0, torch.inf, 3.4e38, torch.nan])
    found = rows.plus("model", scores, 2.0)
    assert found.spoiled.tolist() == [False, True, True, True] and found.kept.tolist() == [True, False, False, False]
    assert found.raw_scores[0] == rows.raw_scores[0] + 2 and found.failures["model"] == 2
    assert found.parts["model"].isnan().tolist() == [False, True, False, True]
    assert torch.equal(found.token_rewards[0], rows.token_rewards[0]) and not found.token_rewards[1:].any()
    assert not rows.plus("model", scores[:1].expand(4), 2.0).failures


@for_each("pad", [0, None])
def test_a_row_s_score_alone_is_its_score_in_a_batch_where_the_text_config_is_nested(pad: int | None) -> None:
    """Kinds that can also see keep another pad id, or none, inside their config; padding must not be read as text."""
    torch.manual_seed(3)
    text = {**SIZES, "vocab_size": 40, "head_dim": 8, "pad_token_id": pad, "eos_token_id": 1, "bos_token_id": 2}
    config = Gemma3Config(text_config=text, vision_config=VISION)
    config.num_labels = 1
    tokenizer = tiny_tokenizer(words=WORDS[::-1], pad="<pad>")
    model = RewardModel("rm", Gemma3ForSequenceClassification(config), tokenizer)
    prompts, responses = [Prompt(i, "w1", (1,), {}) for i in range(2)], [" w2", " w3 w4 w5 w6 w7 w8"]
    alone = [model.scores([prompts[i]], [responses[i]])[0] for i in range(2)]
    assert model.scores(prompts, responses) == pytest.approx(alone, abs=1e-6) and abs(alone[0] - alone[1]) > 1e-3


def test_the_reward_model_continues_what_the_prompt_begins(tmp_path: Path) -> None:
    model = reward_model(write_reward_model(tmp_path / "rm"))
    begun = ({"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"})
    found = model.scores([Prompt(0, "<user> w4 <assistant>w5", (1,), {}, begun)], [" w6"])
    assert found == pytest.approx(plain_scores(tmp_path / "rm", ["<user> w4 <assistant> w5 w6 "]), abs=1e-5)


def test_a_reward_model_that_cannot_read_the_prompts_is_found_at_the_start(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
    for name, given, expected in (
        ("none", None, r"reward\.model=\S*rm cannot read the prompts: the tokenizer of \S*rm has no chat template; "),
        ("no system", template, r"cannot read the prompts: row 0: the chat template of .* rejects messages of roles "),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_reward_model(folder / "rm").joinpath("chat_template.jinja").unlink()
        tiny_tokenizer(words=WORDS[::-1], pad="</s>", chat_template=given).save_pretrained(folder / "rm")
        task = write_task(folder)
        template_of_policy = "{% for m in messages %}{{ m.content }} {% endfor %}"
        tiny_tokenizer(chat_template=template_of_policy).save_pretrained(folder / "model")
        chat = {"data.chat_template": True, "data.system_prompt": "w1", "data.max_prompt_tokens": 40}
        with pytest.raises(ModelError, match=expected):
            prepare(experiment_from_dict(merged(task, {"reward.model": str(folder / "rm"), **chat})))


def test_what_a_reward_model_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reward\.model=rm gives 2 labels; a reward model gives one score"):
        reward_model(write_reward_model(tmp_path / "two", labels=2))
    alone = Topology(Launch.from_environment({}), rank=0, world_size=1, device=torch.device("cpu"))
    language_model = write_reward_model(tmp_path / "lm")
    tiny_llama(num_labels=1).save_pretrained(language_model)
    with pytest.raises(ModelError, match=r"lack score\.weight, one of 1 weights"):  # or numbers made up would score
        load_reward_model(str(language_model), alone, dtype=torch.float32, trust_remote_code=False)
    model = reward_model(write_reward_model(tmp_path / "rm"))
    model.most = 3
    with pytest.raises(RewardError, match=r"prompt 7 with its response has 4 tokens .* reads at most 3; lower rollout"):
        model.scores([Prompt(7, "w1 w2", (1,), {})], [" w3 w4"])
    with pytest.raises(ConfigError, match=r"model\.value_adapter=x needs an adapter of the value's own"):
        experiment_from_dict({"model": {"name": "m", "value_adapter": "x", "value_on": "policy_trunk"}})


def test_two_ranks_under_zero3_train_as_one_process_does(tmp_path: Path) -> None:
    adapter, model = write_reward_adapter(tmp_path / "adapter"), write_reward_model(tmp_path / "rm")
    found = []
    for processes, stage in ((1, None), (2, 3)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        changes = {
            "reward.function": "",
            "reward.adapter": str(adapter),
            "reward.model": str(model),
            "reward.model_weight": 0.5,
            "model.value_adapter": str(adapter),
            "model.value_head_std": 0.0,
            "rollout.max_new_tokens": 12,
        }
        path = write_experiment(folder / "run.yaml", merged(write_task(folder), changes))
        run_recipe(path, processes=processes, stage=stage).succeeded()
        files = sorted((folder / "run").glob("*/*.safetensors"))
        found.append({f"{f.parent.name}/{name}": t for f in files for name, t in load_file(f).items()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-5, msg=named(name))
