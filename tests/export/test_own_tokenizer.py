"""A base model is taught to end turns as a template of one's own has it; merged, in a chat and by its card's code it
still ends them there, since its tokenizer and stop tokens lie beside the adapter."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.export.card import card, push, write_card
from rlhf_toolkit.export.chat import load_chat
from rlhf_toolkit.export.finished import read_run
from rlhf_toolkit.export.merge import merge
from rlhf_toolkit.export.own_tokenizer import own_tokenizer, tokenizer_files
from rlhf_toolkit.runs.evaluation import compare_contestants
from rlhf_toolkit.runs.fine_tuning import FineTuningRun, prepare_fine_tuning
from rlhf_toolkit.runs.ppo import PPOKind, prepare
from rlhf_toolkit.settings.experiment import SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.docs.test_data import start_of
from tests.export.test_card import FakeHub, names_of
from tests.support.builders import tiny_tokenizer
from tests.support.chat_tokenizers import ask
from tests.support.tiny import WORDS, merged, tiny_llama, write_task

END, EOS = "<|im_end|>", 1
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
BUDGET, ANSWER = 12, "w3 w4"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FineTuningRun]:
    """SFT of a base model, whose tokenizer has no template and another EOS."""
    folder = tmp_path_factory.mktemp("turns")
    tiny_llama(initializer_range=0.2).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer(words=(*WORDS[:-1], END), pad="</s>", chat_template=None)
    tokenizer.save_pretrained(folder / "model")
    (folder / "own.jinja").write_text(TEMPLATE)
    rows = [{"messages": ask(" ".join(f"w{(5 * i + j) % 20 + 5}" for j in range(1 + i % 3)), ANSWER)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"name": str(folder / "model"), "dtype": "float32", "lora_rank": 8, "eos_token": END},
        "data": {"train": str(folder / "rows.jsonl"), "chat_template": str(folder / "own.jinja")},
        "sft": {"batch_size": 8, "epochs": 24.0},
        "update": {"lr": 2e-2},
        "run": {"output_dir": str(folder / "run"), "wandb": "off", "save_every": 12},
    }
    threads: list[threading.Thread] = []
    real = PreTrainedTokenizerBase.save_pretrained

    def saved(tokenizer: Any, *args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return real(tokenizer, *args, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", saved)
        run = prepare_fine_tuning(experiment_from_dict(sections, SFTExperiment))
        run.train()
    assert set(threads) == {threading.main_thread()}, "a thread that writes a checkpoint takes no tokenizer in use"
    yield run


def test_a_model_that_is_trained_whole_has_them_in_its_folder(trained: FineTuningRun, tmp_path: Path) -> None:
    settings = merged(
        trained.experiment.as_dict(),
        {"sft.full": True, "sft.epochs": 1.0, "run.output_dir": str(tmp_path), "run.save_every": 1},
    )
    kept = {name: settings["model"][name] for name in ("name", "dtype", "eos_token")}
    prepare_fine_tuning(experiment_from_dict({**settings, "model": kept}, SFTExperiment)).train()
    for folder in (tmp_path / "policy", *tmp_path.glob("checkpoint-*/policy")):
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == END
        assert model.generation_config.eos_token_id == [EOS, stop_of(trained)]


def stop_of(run: FineTuningRun) -> int:
    tokenizer: Any = run.trainer.processing_class
    return int(tokenizer.convert_tokens_to_ids(END))


def ended(model: Any, tokenizer: Any, **options: Any) -> list[int]:
    """The tokens of a greedy answer."""
    asked = tokenizer.apply_chat_template(ask("w9 w7"), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
    found: list[int] = model.generate(input_ids=ids, max_new_tokens=BUDGET, do_sample=False, **options)[0].tolist()
    return found[ids.shape[1] :]


def test_the_end_of_a_turn_is_trained_and_learned(trained: FineTuningRun) -> None:
    stop = stop_of(trained)
    for item in trained.trainer.items:
        (row,) = item.rows
        own = [token for token, on in zip(row.token_ids[row.prompt_length :], row.trained, strict=True) if on]
        assert own[-1] == stop and EOS not in row.token_ids
    losses = [json.loads(line) for line in (trained.folder / "log.jsonl").read_text().splitlines()]
    assert losses[0]["sft/loss"] > 1 and losses[-1]["sft/loss"] < 0.15


def test_every_folder_of_the_adapter_has_them(trained: FineTuningRun) -> None:
    folders = [trained.folder / "policy", *trained.folder.glob("checkpoint-*/policy")]
    assert len(folders) >= 2
    for folder in folders:
        tokenizer, stops = own_tokenizer(folder, trained.trainer.model.causal_lm.config, trust_remote_code=False)
        assert tokenizer is not None and tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == END
        assert stops == (EOS, stop_of(trained))


def test_the_merged_model_ends_its_turn_in_plain_transformers(trained: FineTuningRun, tmp_path: Path) -> None:
    found = merge(str(trained.folder.parent / "model"), str(trained.folder / "policy"), tmp_path / "merged")
    assert found.own_tokenizer
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    answer = ended(model, tokenizer)
    assert tokenizer.decode(answer) == f"{ANSWER} {END}"
    assert len(ended(model, tokenizer, eos_token_id=EOS)) == BUDGET, "or this test could not fail"


def test_a_chat_ends_the_turn_and_the_base_keeps_its_own_tokenizer(trained: FineTuningRun) -> None:
    out, policy = io.StringIO(), str(trained.folder / "policy")
    options: dict[str, Any] = {"dtype": None, "trust_remote_code": False, "max_new_tokens": BUDGET}
    chat = load_chat(str(trained.folder.parent / "model"), [policy], out, **options)
    base, tuned = chat.contestants
    assert base.tokenizer.chat_template is None and tuned.tokenizer.chat_template == TEMPLATE
    assert base.stop_ids == (EOS,) and tuned.stop_ids == (EOS, stop_of(trained))
    chat.run(["w9 w7", "w8"])
    assert out.getvalue().count(f"[{policy}] {ANSWER}\n") == 2
    assert tuned.messages[:2] == ask("w9 w7", ANSWER)


def test_the_cards_code_and_what_is_sent_have_them(trained: FineTuningRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(trained.folder)
    assert r"| `model.eos_token` | `<\|im_end\|>` |" in card(run)
    hub = FakeHub()
    write_card(run)
    push(run, "me/mine", hub)
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {f"policy/{name}" for name in beside} <= hub.files
    names = names_of(trained.folder, monkeypatch)
    assert names["tokenizer"].chat_template == TEMPLATE and names["tokenizer"].eos_token == END
    with torch.no_grad():
        answer = ended(names["model"], names["tokenizer"], eos_token_id=names["tokenizer"].eos_token_id)
    assert names["tokenizer"].decode(answer) == f"{ANSWER} {END}"


def test_whoever_goes_on_with_other_tokens_is_told(
    trained: FineTuningRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PPO from the adapter, and an evaluation of it, with the base's tokenizer and with the one it was trained with."""
    folder, policy = trained.folder.parent, str(trained.folder / "policy")
    task = merged(write_task(tmp_path), {"model.name": str(folder / "model"), "model.policy_adapter": policy})
    del task["model"]["lora_rank"], task["model"]["lora_alpha"]
    task = merged(task, {"data.evaluation": str(tmp_path / "heldout.jsonl"), "rollout.max_new_tokens": 2})
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("<assistant> ", "<assistant>  "))
    asked = {"model.eos_token": END, "data.chat_template": str(folder / "own.jinja"), "data.max_prompt_tokens": 16}
    ways = {
        "": asked,
        f"data.chat_template: '{policy}/chat_template.jinja'": asked
        | {"data.chat_template": f"{tmp_path}/other.jinja"},
        f"model.eos_token: '{END}'": {},
    }
    for way_out, changes in ways.items():
        experiment: Any = experiment_from_dict(merged(task, changes))
        start_of(PPOKind, partial(prepare, experiment), monkeypatch)
        told = capsys.readouterr().out
        assert (f"{policy} was trained with " in told) == bool(way_out), told
        assert told.endswith(f"set {way_out}\n") or not way_out
    compare_contestants(experiment, [policy], kl=False)
    assert told.splitlines()[-1] in capsys.readouterr().out.splitlines()


def test_a_tokenizer_that_the_base_has_no_rows_for_is_refused(trained: FineTuningRun, tmp_path: Path) -> None:
    config = trained.trainer.model.causal_lm.config
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert tokenizer_files(tmp_path) == [] and own_tokenizer(tmp_path, config, trust_remote_code=False) == (None, ())
    tiny_tokenizer(words=(*WORDS, "w40")).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"has a tokenizer with the token 32, but its base has rows for 32 tokens"
    ) as e:
        own_tokenizer(tmp_path, config, trust_remote_code=False)
    assert "\n" not in str(e.value)
