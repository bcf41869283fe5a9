"""The command line: words in, lines and status out. What the commands do is tested in tests/export."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_toolkit.cli import main
from rlhf_toolkit.reporting.report import print_report
from tests.support.chat_tokenizers import TURNS, ask
from tests.support.exports import peft_model, write_adapter, write_base
from tests.support.launch import run
from tests.support.tiny import write_task


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base = write_base(tmp_path / "base")
    return base, write_adapter(tmp_path / "policy", base)


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_merge_and_verify(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = folders
    (base / "README.md").write_text("card")
    main(["merge", str(base), str(adapter), str(tmp_path / "out"), "--verify", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: 14 layers merged") and lines[0].endswith("in float32")
    assert lines[2] == "not copied from the base: README.md"
    assert lines[3].startswith("logits: largest difference from base + adapter ") and len(lines) == 4


def test_merge_errors_are_one_line(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = map(str, folders)
    assert "exists; choose" in ended(["merge", base, adapter, base], capsys)
    assert ended(["merge", base, base, str(tmp_path / "out")], capsys).startswith("ModelError: ")
    assert "is no folder" in ended(["merge", "./none", adapter, str(tmp_path / "out")], capsys)


def test_verify_fails_with_status_1(
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A merge with half the scale is caught."""
    from rlhf_toolkit.export.lora_weights import LoraWeights

    whole = LoraWeights.update
    monkeypatch.setattr(LoraWeights, "update", lambda lora: whole(lora) / 2)
    line = ended(["merge", *map(str, folders), str(tmp_path / "out"), "--verify", "1"], capsys)
    assert line.startswith("ModelError: ") and "more than rounding to float32 explains" in line


@pytest.mark.parametrize("arguments", [[], ["merge"], ["merge", "b", "a", "o", "--verify", "0"], ["marge"]])
def test_wrong_words_end_with_where_the_right_ones_stand(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and " --help\n" in capsys.readouterr().err


def test_chat_reads_the_terminal_to_its_end(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = folders
    model = peft_model(base, adapter)
    ids = torch.tensor([[5, 6]])  # w1 w2: </s> and <unk>, <user>, <assistant> and w0 come before
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, max_new_tokens=4)[0, 2:]
    tuned = model.generate(input_ids=ids, max_new_tokens=4)[0, 2:]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer("w1 w2")["input_ids"] == ids[0].tolist()
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n"))
    main(["chat", str(base), str(adapter), "--max-new-tokens", "4"])
    told = capsys.readouterr().out
    said = [tokenizer.decode(answer, skip_special_tokens=True) for answer in (plain, tuned)]
    assert told.endswith(f"> [base] {said[0]}\n[{adapter}] {said[1]}\n> ")


def test_report_prints_what_the_run_printed(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_run / "run"
    main(["report", str(folder)])
    told = capsys.readouterr().out
    print_report(folder, json.loads((folder / "summary.json").read_text()))
    assert told == capsys.readouterr().out and "held-out score, after" in told
    assert "has no run.json" in ended(["report", str(finished_run)], capsys)
    code = f"import sys; from rlhf_toolkit.cli import main; main(['report', {str(folder)!r}])\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'it is to be quick'"
    assert run([sys.executable, "-c", code], seconds=600).succeeded().output == told


def test_card_of_a_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished_run / "run", tmp_path / "run")
    main(["card", str(tmp_path / "run")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'run'}/README.md\n"
    assert "## Training" in (tmp_path / "run/README.md").read_text()


def test_merge_takes_what_a_run_wrote(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The policy of a real run, merged and verified; its value is refused."""
    base, run_folder = str(finished_run / "model"), finished_run / "run"
    main(["merge", base, str(run_folder / "policy"), str(tmp_path / "out"), "--verify", "2"])
    assert "rounding to float32 changed 0.00%" in capsys.readouterr().out
    assert "value_head.safetensors" in ended(["merge", base, str(run_folder / "value"), str(tmp_path / "v")], capsys)


def test_the_command_starts_as_a_module(folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_toolkit.cli"]
    finished = run([*command, "merge", *map(str, folders), str(tmp_path / "out")], seconds=600).succeeded()
    assert "14 layers merged" in finished.output and (tmp_path / "out/model.safetensors").is_file()
    failed = run([*command, "merge", *map(str, folders), str(tmp_path / "out")], seconds=600)
    assert failed.status == 1 and failed.output.startswith("CheckpointError: ") and failed.output.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = "import sys, rlhf_toolkit.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    run([sys.executable, "-c", code], seconds=600).succeeded()


def test_data_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path)
    rows = [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w5", "completion": " "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = task["model"]["name"]
    main(["data", "show", str(tmp_path / "rows.jsonl"), "--model", model, "--no-chat-template", "--count", "1"])
    shown = capsys.readouterr().out
    assert "w3 w4" in shown and "</s>" in shown and "1 empty response" in shown.replace("1 as ", "1 ")
    assert ended(["data", "show", "none.jsonl", "--model", model], capsys).startswith("DataError: ")


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": ask("w1", answer)} for answer in ("w2 w3", "", "w4")],
    "prompt and completion": [{"prompt": "w1", "completion": answer} for answer in ("w2 w3", "", "w4")],
    "prompt and response": [{"prompt": ask("w1"), "response": answer} for answer in ("w2 w3", "", "w4")],
    "verl": [{"prompt": ask("w1"), "reward_model": {"ground_truth": answer}} for answer in ("w2 w3", "", "w4")],
    "ShareGPT": [
        {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": answer}]}
        for answer in ("w2 w3", "", "w4")
    ],
    "Alpaca": [{"instruction": "w1", "input": "", "output": answer} for answer in ("w2 w3", "", "w4")],
}
PAIRS: dict[str, list[dict[str, Any]]] = {
    "strings": [{"prompt": "w1", "chosen": answer, "rejected": "w5"} for answer in ("w2 w3", "w5", "w4")],
    "whole conversations": [
        {"chosen": ask("w1", answer), "rejected": ask("w1", "w5")} for answer in ("w2 w3", "w5", "w4")
    ],
    "transcripts": [
        {"chosen": f"\n\nHuman: w1\n\nAssistant: {answer}", "rejected": "\n\nHuman: w1\n\nAssistant: w5"}
        for answer in ("w2 w3", "w5", "w4")
    ],
    "ShareGPT": [
        {
            "conversations": [{"from": "human", "value": "w1"}],
            "chosen": {"from": "gpt", "value": answer},
            "rejected": {"from": "gpt", "value": "w5"},
        }
        for answer in ("w2 w3", "w5", "w4")
    ],
    "Alpaca": [{"instruction": "w1", "chosen": answer, "rejected": "w5"} for answer in ("w2 w3", "w5", "w4")],
}


def test_data_show_of_each_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them show the same tokens, at once or streamed; the third row is beyond --max-rows."""
    words, rows = ["--model", write_task(tmp_path, chat_template=TURNS)["model"]["name"]], tmp_path / "rows.jsonl"
    for kind, shapes in (("examples", EXAMPLES), ("pairs", PAIRS)):
        for name, lines in shapes.items():
            rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
            for option in ([], ["--streaming"]):
                main(["data", "show", str(rows), *words, "--as", kind, "--max-rows", "2", *option])
                shown = capsys.readouterr().out.splitlines()[3:]  # behind model, template and stop tokens
                assert shown[1].endswith("3 | <user> w1 <assistant>"), (name, shown)
                assert shown[2].endswith("3 > w2 w3 </s>"), (name, shown)
                assert shown[3].endswith("2 > w5 </s>" if kind == "pairs" else "mask 3x0 3x1"), (name, shown)
                reason = "chosen equals rejected" if kind == "pairs" else "empty response"
                assert f"1 of 2 {kind}," in shown[4] and f"dropped 1 {reason};" in shown[4], (name, shown)
    rows.write_text('{"text": "w1 w2"}\n')
    main(["data", "show", str(rows), *words])
    shown = capsys.readouterr().out.splitlines()[3:]
    assert shown[1].endswith("1 | w1") and shown[2].endswith("2 > w2 </s>") and shown[3] == "  mask 1x0 2x1"


def test_data_show_of_broken_rows_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, rows = ["--model", write_task(tmp_path)["model"]["name"]], tmp_path / "rows.jsonl"
    for option in ([], ["--streaming"]):
        rows.write_text('{"text": "w1"}\n{"text" "w2"}\n')
        line = ended(["data", "show", str(rows), *words, *option], capsys)
        assert line.endswith(": line 2: Expecting ':' delimiter; repair that line\n")
        rows.write_text('{"conversations": [{"from": "bot", "value": "w1"}]}\n')
        line = ended(["data", "show", str(rows), *words, *option], capsys)
        assert line.startswith("DataError: row 0: conversations has a turn from 'bot'; those who speak are human, ")


def test_data_show_of_any_column_as_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversation is continued where the assistant has the last word; an option that says nothing is refused."""
    words, rows = ["--model", write_task(tmp_path, chat_template=TURNS)["model"]["name"]], tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": ask("w1", "w2"), "chosen": "w3", "question": "w4 w5"}) + "\n")
    for column, shown in (("messages", "4 | <user> w1 <assistant> w2"), ("question", "4 | <user> w4 w5 <assistant>")):
        main(["data", "show", str(rows), *words, "--as", "prompts", "--column", column, "--stop-string", "w9"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[2] == "stop tokens: '</s>'; stop strings: 'w9'"
        assert lines[4].endswith(shown) and ("continues" in lines[3]) == (column == "messages")
    for option, kind in ((["--column", "question"], "examples"), (["--stop-string", "w9"], "examples")):
        line = ended(["data", "show", str(rows), *words, *option], capsys)
        assert line.startswith(f"ConfigError: {option[0]} is about prompts, and these rows are read as {kind}; ")
    line = ended(
        ["data", "show", str(rows), *words, "--as", "prompts", "--column", "chosen", "--turns", "last"], capsys
    )
    assert line.startswith("ConfigError: --turns last is about examples")


def test_report_of_a_supervised_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"losses": [2.0] * 10 + [1.0] * 10, "evaluations": [], "seconds": 60.0, "peak_memory_gib": 1.0}
    print_report(tmp_path, summary)
    shown = capsys.readouterr().out
    assert re.search(r"loss, first tenth +2\.000", shown) and re.search(r"loss, last tenth +1\.000", shown)
