"""The card of a real run says what its files say; the code on it runs; a fake hub gets card and adapters only."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from peft import PeftModel
from safetensors.torch import load_file

from rlhf_toolkit.cli import main
from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.export.card import ROWS, _numbers, card, push, write_card
from rlhf_toolkit.export.card_kinds import KINDS
from rlhf_toolkit.export.finished import read_run
from rlhf_toolkit.export.folders import trained_quantised
from rlhf_toolkit.reporting.report import print_report
from rlhf_toolkit.reporting.seal import SEAL, sealed
from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.settings.experiment import RewardExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.builders import tiny_tokenizer
from tests.support.offenders import for_each
from tests.support.tiny import WORDS
from tests.trainers.test_fine_tuning import prepared, sections
from tests.trainers.test_full_fine_tuning import prepared as prepared_whole


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    shutil.copytree(finished_run / "run", tmp_path / "run")
    return tmp_path / "run"


def table(text: str, title: str) -> list[list[str]]:
    """The rows below a heading, without its head and rule."""
    part = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows][2:]


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return str(found)


def test_the_tables_are_what_the_log_says(folder: Path) -> None:
    text = card(read_run(folder))
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    evaluated = [record for record in records if record["kind"] == "eval"]
    assert [float(row[1]) for row in table(text, "Training")] == [round(r["critic/score/mean"], 3) for r in train]
    assert [row[0] for row in table(text, "Training")] == ["1", "2"]
    scores = [round(record["eval/score/mean"], 3) for record in evaluated]
    assert [float(row[1]) for row in table(text, "Evaluation")] == scores and len(scores) >= 2
    assert all(cell for title in ("Training", "Evaluation") for row in table(text, title) for cell in row)
    versions = json.loads((folder / "summary.json").read_text())["versions"]
    assert versions.items() <= dict(map(tuple, table(text, "Machine and versions"))).items()  # type: ignore[arg-type]


def test_settings_and_adapters(folder: Path) -> None:
    text = card(read_run(folder))
    recipe = {row[0].strip("`"): row[1].strip("`") for row in table(text, "Recipe")}
    assert recipe["reward.function"] == "reward.py:low_words" and recipe["ppo.kl_coef"] == "0.05"
    assert "reward.adapter" not in recipe
    adapters = {row[0]: row[1:4] for row in table(text, "Adapters")}
    assert adapters == {"`policy/`": ["4", "8", "8 / 4"], "`value/`": ["4", "8", "8 / 4"]}
    settings = yaml.safe_load(block(text, "yaml"))
    mine = json.loads((folder / "run.json").read_text())
    assert settings["ppo"] == {**mine["ppo"], **{key: settings["ppo"][key] for key in mine["ppo"] if "kwargs" in key}}
    assert list(settings) == list(mine)


def with_settings(folder: Path, section: str, **changes: Any) -> None:
    """As if the run had had these settings."""
    settings, summary = (json.loads((folder / name).read_text()) for name in ("run.json", "summary.json"))
    settings[section] |= changes
    (folder / "run.json").write_text(json.dumps(settings))
    del summary[SEAL]
    (folder / "summary.json").write_text(json.dumps(sealed(folder, summary)))


def test_no_place_of_this_machine_and_no_secret(folder: Path) -> None:
    functions = [{"function": "/home/me/a.py:f", "kwargs": {"token": "hf_secret"}}]
    with_settings(folder, "reward", kwargs={"api_key": "hf_secret"}, functions=functions)
    text = card(read_run(folder))
    assert "hf_secret" not in text and "/home/me" not in text and str(folder.parent) not in text
    assert block(text, "yaml").count("(not shown)") == 2 and "a.py:f" in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_a_base_of_the_hub_is_named_in_the_metadata(folder: Path) -> None:
    with_settings(folder, "model", name="Qwen/Qwen2.5-7B")
    text = card(read_run(folder), "me/mine")
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "Qwen/Qwen2.5-7B"
    assert "\n# mine\n" in text and 'from_pretrained(base, "me/mine", subfolder="policy")' in text
    assert "put its path" not in text


def test_the_code_on_the_card_loads_the_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is a folder: the code finds it by what lies beside the adapter."""
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(block(card(read_run(Path("run").resolve())), "python"), names)
    model = names["model"]
    assert isinstance(model, PeftModel) and names["tokenizer"]("w3 w4")["input_ids"]
    assert adapter_speaks(model)


def adapter_speaks(model: PeftModel) -> bool:
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            return not torch.equal(adapted, model(ids).logits)


# ---- supervised runs -------------------------------------------------------------------------------------------------

TURNS = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% if m['role'] == 'assistant' %} </s>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
SETTINGS = {
    "sft": {"sft.epochs": "2.0", "sft.batch_size": "6"},
    "reward_model": {"reward_model.centring": "0.3", "reward_model.normalise": "True"},
    "dpo": {"dpo.beta": "0.5", "dpo.loss": "sigmoid", "dpo.label_smoothing": "0.1"},
}
HEADS = {
    "sft": ["step", "loss", "entropy"],
    "reward_model": ["step", "loss", "accuracy", "margin"],
    "dpo": ["step", "loss", "accuracy", "margin"],
}


def names_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's code defines, run beside the run folder as the card asks."""
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    exec(block(card(read_run(run)), "python"), names)
    return names


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_card_of_a_supervised_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"reward_model.normalise": True} if kind == "reward_model" else {}
    summary = prepared(tmp_path, kind, **more).train()
    run = tmp_path / "run"
    text = write_card(read_run(run)).read_text()
    head = text.partition("\n## Training\n\n")[2].splitlines()[0]
    assert [cell.strip() for cell in head.strip("|").split("|")] == HEADS[kind]
    rows = table(text, "Training")
    assert [float(row[1]) for row in rows] == [round(loss, 3) for loss in summary["losses"]] and len(rows) == 3
    assert f"in {len(rows)} steps" in text and "rollout" not in text.partition("## All settings")[0]
    held_out = summary["evaluations"]
    evaluated = table(text, "Evaluation")
    assert [float(row[1]) for row in evaluated] == [round(each["eval/loss"], 3) for each in held_out]
    if kind != "sft":
        assert [row[2] for row in rows] == [f"{share:.1%}" for share in summary["accuracies"]]
        assert [row[2] for row in evaluated] == [f"{each['eval/accuracy']:.1%}" for each in held_out]
    recipe = {row[0].strip("`"): row[1].strip("`") for row in table(text, "Recipe")}
    assert SETTINGS[kind].items() <= recipe.items() and recipe["update.lr"] == "0.01"
    assert ("before, their mean was" in text) == (kind == "reward_model")
    if kind != "reward_model":
        assert adapter_speaks(names_of(run, monkeypatch)["model"])


def test_the_card_of_a_run_of_all_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_whole(tmp_path).train()
    run = tmp_path / "run"
    text = write_card(read_run(run)).read_text()
    assert "with all of its weights (`policy/`), trained with rlhf_toolkit by supervised" in text
    assert "## Adapters" not in text and "LoRA" not in text.partition("## All settings")[0]
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and "lora" not in front["tags"]
    names = names_of(run, monkeypatch)
    assert not isinstance(names["model"], PeftModel) and names["tokenizer"]("w3 w4")["input_ids"]
    trained = load_file(run / "policy/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(names["model"].model.layers[0].mlp.up_proj.weight, trained)
    hub = FakeHub()
    push(read_run(run), "me/mine", hub)
    assert {"README.md", "policy/config.json", "policy/model.safetensors", "policy/tokenizer.json"} <= hub.files
    assert all(name == "README.md" or name.startswith("policy/") for name in hub.files)


@pytest.mark.parametrize("chat", ["", "chat template", "a template of one's own"])
def test_the_code_on_a_reward_models_card_scores_as_the_run_did(
    chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of all training responses were normalised; only head, adapter and tokens as in the run give that again."""
    changes: dict[str, Any] = {"reward_model.normalise": True, "data.chat_template": bool(chat)}
    if chat.startswith("a"):
        (tmp_path / "own.jinja").write_text(TURNS.replace("</s>", "<end>"))
        changes |= {"data.chat_template": str(tmp_path / "own.jinja"), "model.eos_token": "<end>"}
    settings = sections(tmp_path, "reward_model", changes)
    tiny_tokenizer(words=(*WORDS[:-1], "<end>"), pad="</s>", chat_template=TURNS).save_pretrained(tmp_path / "model")
    prepare_fine_tuning(experiment_from_dict(settings, RewardExperiment)).train()
    score = names_of(tmp_path / "run", monkeypatch)["score"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        for side in ("chosen", "rejected"):
            asked = {"role": "user", "content": row["prompt"]}
            answer = {"role": "assistant", "content": row[side]}
            found.append(score([asked, answer]) if chat else score(row["prompt"], row[side]))
    assert sum(found) / len(found) == pytest.approx(0, abs=1e-4)
    assert torch.tensor(found).std().item() == pytest.approx(1, abs=1e-4)


def test_a_reward_model_of_the_hub_gets_its_head_from_there(tmp_path: Path) -> None:
    prepared(tmp_path, "reward_model").train()
    text = card(read_run(tmp_path / "run"), "me/mine")
    code = block(text, "python")
    assert 'load_file(hf_hub_download("me/mine", "reward/reward_head.safetensors"))' in code
    assert "from huggingface_hub import hf_hub_download" in code and "text-classification" in text
    compile(code, "card", "exec")


def test_a_long_curve_is_thinned_and_keeps_both_ends() -> None:
    records, trained = [{"rollout": i, "critic/score/mean": i / 7} for i in range(1, 101)], KINDS["ppo"].trained
    rows = list(_numbers(records, trained))
    numbers = [int(row[0]) for row in rows]
    assert len(rows) == ROWS and numbers[0] == 1 and numbers[-1] == 100
    assert max(b - a for a, b in pairwise(numbers)) == 11
    assert rows[0][2] == ""  # a run without a reference has no KL
    for count in (0, 1, 9, 10, 11):
        assert len(list(_numbers(records[:count], trained))) == min(count, ROWS)


def test_a_readme_of_somebody_else_stays(folder: Path) -> None:
    assert "Model Card for Model ID" in (folder / "README.md").read_text()  # PEFT's form, which Trainer leaves there
    write_card(read_run(folder))
    write_card(read_run(folder), "me/mine")  # our own may be replaced
    assert "me/mine" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("my notes")
    with pytest.raises(CheckpointError, match="written by somebody else; move it away"):
        write_card(read_run(folder))
    assert (folder / "README.md").read_text() == "my notes"


# ---- push ------------------------------------------------------------------------------------------------------------


class FakeHub:
    """Takes what HfApi takes and keeps the files that fit the patterns."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.files = error, set[str]()
        self.repos: list[Any] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        if self.error is not None:
            raise self.error
        self.repos.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = [str(path.relative_to(folder_path)) for path in paths]
        self.files = {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)}


def test_card_and_adapters_are_sent_and_nothing_else(folder: Path) -> None:
    assert list(folder.glob("checkpoint-*/policy/adapter_config.json"))  # there is something to leave behind
    hub, run = FakeHub(), read_run(folder)
    write_card(run, "me/mine")
    push(run, "me/mine", hub)
    assert hub.repos == [("me/mine", True, True)]
    assert hub.files == {
        "README.md",
        *(
            f"{role}/{name}"
            for role in ("policy", "value")
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ),
        "value/value_head.safetensors",
    }


def test_a_head_without_an_adapter_is_sent_too(folder: Path) -> None:
    (folder / "value/adapter_config.json").unlink()
    (folder / "value/adapter_model.safetensors").unlink()
    assert push(read_run(folder), "me/mine", FakeHub()) == ["README.md", "policy/*", "value/value_head.safetensors"]


def test_what_the_hub_says_is_one_line(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not be sent to me/mine \(LocalTokenNotFoundError: no token\)"):
        push(read_run(folder), "me/mine", FakeHub(LocalTokenNotFoundError("no token")))


def test_the_real_hub_takes_what_the_fake_one_takes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HfApi itself, which is made to be offline: its signature fits and its refusal is one line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"could not be sent to me/mine \(OfflineModeIsEnabled"):
        push(read_run(folder), "me/mine", HfApi())
    with pytest.raises(SystemExit) as ended:
        main(["card", str(folder), "--push", "me/mine"])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == f"wrote {folder}/README.md\n"
    assert err.startswith("CheckpointError: ") and err.count("\n") == 1


# ---- folders that hold no finished run -------------------------------------------------------------------------------


@for_each("name", ["run.json", "log.jsonl", "samples.jsonl", "summary.json"])
def test_a_file_that_is_not_as_the_run_left_it_is_named(finished_run: Path, tmp_path: Path, name: str) -> None:
    """One digit is another one: nothing but the hashes in the summary can tell."""
    folder = Path(shutil.copytree(finished_run / "run", tmp_path / name))
    assert read_run(folder).summary[SEAL].keys() == {"run.json", "log.jsonl", "samples.jsonl", "summary.json"}
    text = (folder / name).read_text()
    digit = next(match for match in re.finditer(r"(?<=\d\.)[1-8]", text))
    (folder / name).write_text(f"{text[: digit.start()]}9{text[digit.end() :]}")
    with pytest.raises(
        CheckpointError, match=rf"{name} is not as it was when the run ended; restore that file, or let"
    ):
        read_run(folder)
    (folder / name).unlink()
    if name != "summary.json":  # without it the run has not ended
        with pytest.raises(CheckpointError):
            read_run(folder)


def interrupted(folder: Path) -> Path:
    """What is left of a run that was killed after its first checkpoint, in the middle of a line of its log."""
    for name in ("policy", "value", "checkpoint-2"):
        shutil.rmtree(folder / name)
    for name in ("summary.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
    text = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(text + '{"kind": "train", "roll')
    return folder


def test_a_run_that_was_interrupted_has_a_report_from_its_newest_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_run(folder).summary
    found = read_run(interrupted(folder)).summary
    assert found["mean_scores"] == whole["mean_scores"][:1], "not what comes after the checkpoint"
    assert [each["rollout"] for each in found["evaluations"]] == [0, 1]
    assert found["seconds"] == found["seconds_per_rollout"][0] and found["versions"] == whole["versions"]
    print_report(folder, found)
    said = capsys.readouterr().out
    assert said.startswith(
        "\n  the run has not ended: this is checkpoint-1, after rollout 1 of 2\n\n  mean score, first"
    )
    assert said.endswith(f"  adapters    {folder}/checkpoint-1/policy, {folder}/checkpoint-1/value\n")


def test_and_a_card_whose_code_loads_that_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(interrupted(folder).resolve())
    text = card(run)
    assert "The run has not ended: this is checkpoint-1, after rollout 1 of 2.\n" in text
    assert [row[0] for row in table(text, "Adapters")] == ["`checkpoint-1/policy/`", "`checkpoint-1/value/`"]
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(block(text, "python"), names)
    assert adapter_speaks(names["model"])
    with pytest.raises(
        CheckpointError, match=r"the run has not ended: this is checkpoint-1, after rollout 1 of 2; let"
    ):
        push(run, "me/mine", FakeHub())


def test_unfinished_and_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no run\.json, so it is not a run folder"):
        read_run(tmp_path)
    (folder / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary\.json cannot be read"):
        read_run(folder)
    shutil.rmtree(interrupted(folder) / "checkpoint-1")
    said = r"no summary\.json, which is written when training ends, and no sound checkpoint; let the run end"
    with pytest.raises(CheckpointError, match=said):
        read_run(folder)


def test_the_card_of_a_run_on_a_quantised_base_says_so(folder: Path) -> None:
    """It loads NF4 by bitsandbytes (``tests/models/test_quantised.py``: the same weights); other kinds differ."""
    run = read_run(folder)
    run.settings["model"]["quantization"] = "nf4"
    text = card(run)
    assert "| `model.quantization` | `nf4` |" in text
    (call,) = re.findall(r"BitsAndBytesConfig\((.*?)\n\)\)", text, flags=re.DOTALL)
    dtype = run.settings["model"]["dtype"]
    assert call.strip() == f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{dtype}'
    compile(block(text, "python"), "card", "exec")
    run.settings["model"]["quantization"] = "int8"
    assert "stored in `int8` while the adapter was trained" in card(run)


def test_an_adapter_knows_that_its_base_was_quantised_where_it_lies_in_its_run(tmp_path: Path) -> None:
    policy, kept = tmp_path / "policy", tmp_path / "checkpoint-4/policy"
    for kind, said in (("none", False), ("nf4", True)):
        (tmp_path / "run.json").write_text(json.dumps({"model": {"quantization": kind}}))
        for adapter in (policy, kept):
            assert ("in 'nf4'" in (trained_quantised(adapter) or "")) == said
    assert trained_quantised(tmp_path.parent / "elsewhere/policy/x") is None
