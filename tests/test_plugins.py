"""Finding and loading the functions that users bring, and calling them with what they ask for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError, RLHFError
from rlhf_toolkit.plugins import arguments_for, find, load_function
from tests.support.offenders import for_each


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def message_of(caught: pytest.ExceptionInfo[Any]) -> str:
    """The text of an error, which has to be one line."""
    assert isinstance(caught.value, RLHFError)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- load_function ---------------------------------------------------------------------------------------------------


def test_a_function_of_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "reward.py", "def length(prompts, responses, **columns):\n    return list(map(len, responses))"
    )
    assert load_function(f"{path}:length", "reward.function")([], ["a", "bcd"]) == [1, 3]


def test_a_function_of_a_module() -> None:
    function: Any = load_function("os.path:commonprefix", "reward.function")
    assert function(["abc", "abd"]) == "ab"


def test_a_relative_path_and_a_name_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a:b.py", "def f(prompts, responses):\n    return [1.0]")
    monkeypatch.chdir(tmp_path)
    assert load_function("a:b.py:f", "reward.function")([], [""]) == [1.0]


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    functions = []
    for score in (1, 2):
        folder = tmp_path / str(score)
        folder.mkdir()
        write(folder / "reward.py", f"SCORE = {score}\ndef f(prompts, responses):\n    return [SCORE]")
        functions.append(load_function(f"{folder / 'reward.py'}:f", "reward.function"))
    assert [function([], [""]) for function in functions] == [[1], [2]]
    assert functions[0].__module__ != functions[1].__module__


def test_a_file_is_run_once_and_its_functions_share_its_variables(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.py",
        "from pathlib import Path\n"
        "with Path(__file__).with_name('runs').open('a') as file:\n    file.write('x')\n"
        "seen = []\n"
        "def note(word):\n    seen.append(word)\n"
        "def noted():\n    return seen\n",
    )
    (tmp_path / "link.py").symlink_to(path)
    load_function(f"{path}:note", "reward.function")("heard")
    assert load_function(f"{tmp_path}/link.py:noted", "ppo.advantage")() == ["heard"]
    assert (tmp_path / "runs").read_text() == "x"


def test_a_file_that_has_changed_is_run_anew(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    functions = []
    for score in ("1", "2"):  # as many bytes, perhaps within one tick of the file system's clock
        write(path, f"def f(prompts, responses):\n    return [{score}]")
        functions.append(load_function(f"{path}:f", "reward.function"))
    assert [function([], [""]) for function in functions] == [[1], [2]]
    assert functions[0].__module__ != functions[1].__module__


def test_a_file_that_raised_is_run_again(tmp_path: Path) -> None:
    path = write(
        tmp_path / "reward.py",
        "from pathlib import Path\n"
        "if not Path(__file__).with_name('there').exists():\n    raise ValueError\n"
        "def f(): ...",
    )
    with pytest.raises(ConfigError):
        load_function(f"{path}:f", "reward.function")
    write(tmp_path / "there", "")
    assert load_function(f"{path}:f", "reward.function")() is None


def test_neighbours_can_be_imported_and_the_path_is_as_before(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_reward.py", "SCORE = 4.0")
    path = write(
        tmp_path / "reward.py",
        "from neighbour_of_reward import SCORE\n\ndef f(prompts, responses):\n    return [SCORE]",
    )
    before = list(sys.path)
    try:
        assert load_function(f"{path}:f", "reward.function")([], [""]) == [4.0]
    finally:
        sys.modules.pop("neighbour_of_reward", None)
    assert sys.path == before


def test_a_file_with_a_dataclass(tmp_path: Path) -> None:
    path = write(
        tmp_path / "reward.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Fixed:\n"
        "    score: float = 2.0\n    def __call__(self, prompts, responses):\n        return [self.score]\n"
        "fixed = Fixed()",
    )
    assert load_function(f"{path}:fixed", "reward.function")([], [""]) == [2.0]


def test_a_name_that_a_module_makes_on_demand(tmp_path: Path) -> None:
    path = write(
        tmp_path / "lazy.py",
        "def __getattr__(name):\n    if name == 'f':\n        return len\n    raise AttributeError",
    )
    function: Any = load_function(f"{path}:f", "reward.function")
    assert function is len


@for_each("spec", ["", "reward.py", "reward", ":f", "reward.py:", ":"])
def test_a_name_of_no_function_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_function(spec, "reward.function")
    assert message_of(caught) == (
        f"reward.function={spec!r} names no function; write path/to/file.py:name or package.module:name"
    )


def test_missing_file() -> None:
    with pytest.raises(ConfigError) as caught:
        load_function("no/such.py:f", "reward.function")
    assert message_of(caught) == (
        f"reward.function='no/such.py:f': there is no file no/such.py (looked in {Path.cwd()}); check the path"
    )


def test_missing_module() -> None:
    with pytest.raises(ConfigError) as caught:
        load_function("no_such_package.rewards:f", "reward.function")
    assert message_of(caught) == (
        "reward.function='no_such_package.rewards:f': importing no_such_package.rewards raised ModuleNotFoundError: "
        "No module named 'no_such_package'; repair it, or give path/to/file.py:name"
    )


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("lenght", "did you mean length?"), ("zzz", "it has length, other"), ("_f", "it has length, other")],
)
def test_a_name_that_is_not_there(tmp_path: Path, name: str, way_out: str) -> None:
    path = write(tmp_path / "reward.py", "def other(): ...\ndef length(): ...\ndef _hidden(): ...\nLENGTHS = 3")
    with pytest.raises(ConfigError) as caught:
        load_function(f"{path}:{name}", "reward.function")
    assert message_of(caught) == f"reward.function='{path}:{name}': {name} is not defined there; {way_out}"


def test_a_file_without_functions(tmp_path: Path) -> None:
    path = write(tmp_path / "reward.py", "x = 1")
    with pytest.raises(ConfigError, match=r"f is not defined there; it has no functions$"):
        load_function(f"{path}:f", "reward.function")


def test_a_name_that_cannot_be_called(tmp_path: Path) -> None:
    path = write(tmp_path / "reward.py", "weight = 0.5")
    with pytest.raises(ConfigError) as caught:
        load_function(f"{path}:weight", "reward.function")
    assert message_of(caught) == (
        f"reward.function='{path}:weight': weight is 0.5 (float), which cannot be called; name a function"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("import json\n\nraise ValueError('first\\nsecond')", "ValueError: first second at reward.py:3"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package' at reward.py:1"),
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax (reward.py, line 2)"),
    ],
)
def test_a_file_that_raises_when_imported(tmp_path: Path, text: str, shown: str) -> None:
    path = write(tmp_path / "reward.py", text)
    before = (list(sys.path), set(sys.modules))
    with pytest.raises(ConfigError) as caught:
        load_function(f"{path}:f", "reward.function")
    assert message_of(caught) == (
        f"reward.function='{path}:f': importing {path} raised {shown}; repair it, or give path/to/file.py:name"
    )
    assert caught.value.__cause__ is not None
    assert (list(sys.path), set(sys.modules)) == before


# ---- find and arguments_for ------------------------------------------------------------------------------------------


def plain(rewards: Any, gamma: float, *, share: float = 0.5) -> None: ...


def test_a_file_that_ends_the_process_or_raises_where_a_name_is_looked_up(tmp_path: Path) -> None:
    """A script that says sys.exit(0) would end the run as if it were done."""
    for text, shown in (
        ("import sys\nsys.exit(0)\n", "raised SystemExit: 0 at own.py:2; repair it"),
        ("def __getattr__(name):\n    return 1 / 0\n", "raised ZeroDivisionError: division by zero at own.py:2; rep"),
    ):
        path = write(tmp_path / "own.py", text)
        with pytest.raises(ConfigError) as caught:
            load_function(f"{path}:f", "reward.function")
        assert shown in str(caught.value), caught.value


def test_a_function_that_does_not_say_what_it_takes() -> None:
    for name in ("max", "dict", "type"):
        with pytest.raises(ConfigError, match=f"{name} does not say what parameters it takes; name a function in Pyth"):
            load_function(f"builtins:{name}", "ppo.advantage")


def test_a_known_name_or_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", "def f(x): ...")
    assert find("plain", {"plain": plain}, "ppo.advantage") is plain
    assert find(f"{path}:f", {"plain": plain}, "ppo.advantage").__name__ == "f"
    with pytest.raises(ConfigError) as caught:
        find("plian", {"plain": plain}, "ppo.advantage")
    assert message_of(caught) == (
        "ppo.advantage='plian'; did you mean plain?; known are plain, or give path/to/file.py:name"
    )


def test_a_function_gets_what_its_parameters_name() -> None:
    offered = {"rewards": 1, "gamma": 2, "values": 3}
    assert arguments_for(plain, offered, {}, setting="x") == {"rewards": 1, "gamma": 2}
    assert arguments_for(plain, offered, {"share": 0.1}, setting="x") == {"rewards": 1, "gamma": 2, "share": 0.1}


@pytest.mark.parametrize(
    ("offered", "kwargs", "message"),
    [
        ({"rewards": 1, "gamma": 2}, {"gamma": 3}, "x_kwargs.gamma is given to plain anyway; leave it out"),
        (
            {"rewards": 1, "gamma": 2},
            {"shore": 3},
            "x_kwargs.shore: plain has no such parameter; did you mean share?; it takes share",
        ),
        (
            {"rewards": 1},
            {},
            "x: plain needs gamma; set it in x_kwargs, give it a default, or use one of rewards",
        ),
    ],
)
def test_arguments_that_do_not_fit(offered: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments_for(plain, offered, kwargs, setting="x")
    assert message_of(caught) == message
