"""The reasoning-gym reward, over every dataset that the installed version has."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any

import pytest
from reasoning_gym import factory

from rlhf_toolkit.errors import ConfigError, DataError
from rlhf_toolkit.rewards.gym import BY_EQUALITY, entry_of, entry_text, reasoning_gym
from rlhf_toolkit.rewards.gym_texts import LITERAL_SCORERS, LONGEST_TEXT, SYMPY_SCORERS, is_arithmetic
from tests.support.offenders import for_each

NEEDS_CONFIG = {"composite": "Must specify at least one dataset"}
"""Datasets that cannot be built as they are, and what they say."""
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Datasets whose entries have no answer: any that the scorer accepts will do."""
NAMES = sorted(set(factory.DATASETS) - set(NEEDS_CONFIG))
Entry = dict[str, Any]


@cache
def entries(name: str, count: int = 3) -> tuple[Entry, ...]:
    dataset = factory.create_dataset(name, size=count, seed=7)
    return tuple(dataset[index] for index in range(count))


def scores(name: str, answers: list[str], items: tuple[Entry, ...] | list[Entry], **options: Any) -> list[float]:
    columns: dict[str, Any] = {"entry": [entry_text(item) for item in items], "dataset": [name] * len(items)}
    return reasoning_gym(["p"] * len(items), answers, **columns, **options)


# ---- every dataset ---------------------------------------------------------------------------------------------------


def test_the_lists_of_this_test_are_those_of_the_library() -> None:
    assert len(NAMES) >= 100
    assert set(NAMES) >= WITHOUT_ANSWER | BY_EQUALITY | LITERAL_SCORERS | SYMPY_SCORERS
    assert {name for name in NAMES if entries(name)[0]["answer"] is None} == WITHOUT_ANSWER
    for name, reason in NEEDS_CONFIG.items():
        with pytest.raises(AssertionError, match=reason):
            factory.create_dataset(name)


@for_each("name", [name for name in NAMES if name not in WITHOUT_ANSWER])
def test_its_own_answer_is_right_and_another_is_not(name: str) -> None:
    items = entries(name)
    answers = [item["answer"] for item in items]
    assert scores(name, answers, items) == [1.0] * len(items)
    assert scores(name, [f" \n{answer}\n" for answer in answers], items, exact=True) == [1.0] * len(items)
    tagged = [f"<answer>no</answer> hm <answer> {answer} </answer>." for answer in answers]
    assert scores(name, tagged, items, answer_tags=True) == [1.0] * len(items)
    assert max(scores(name, ["certainly not"] * len(items), items)) < 1.0
    assert scores(name, [""] * len(items), items) == [0.0] * len(items)
    assert scores(name, answers, items, answer_tags=True) == [0.0] * len(items)  # no tag


@pytest.mark.parametrize("name", sorted(BY_EQUALITY))
def test_scorers_that_are_not_asked_take_anything(name: str) -> None:
    """Once the library repairs them, this fails and they can be asked."""
    dataset = factory.create_dataset(name, size=1, seed=7)
    assert dataset.score_answer("certainly not", dataset[0]) == 1.0


def colouring(entry: Entry) -> str:
    """By trying all of them."""
    puzzle = entry["metadata"]["puzzle"]
    vertices, edges = puzzle["vertices"], puzzle["edges"]
    for colours in product(puzzle["color_options"], repeat=len(vertices)):
        of = dict(zip(vertices, colours, strict=True))
        if all(of[a] != of[b] for a, b in edges):
            return json.dumps({str(vertex): colour for vertex, colour in of.items()})
    raise AssertionError("no colouring")


KNOWN: dict[str, Callable[[Entry], str]] = {
    "graph_color": colouring,
    "propositional_logic": lambda entry: entry["metadata"]["example_answer"],
    "rubiks_cube": lambda entry: entry["metadata"]["example_correct_answer"],
}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_without_an_answer_a_solution_is_right(name: str) -> None:
    config = {"min_num_vertices": 5, "max_num_vertices": 5, "num_colors": 3} if name == "graph_color" else {}
    dataset = factory.create_dataset(name, size=3, seed=7, **config)
    items = [dataset[index] for index in range(3)]
    assert scores(name, [KNOWN[name](item) for item in items], items) == [1.0] * 3
    assert max(scores(name, ["certainly not"] * 3, items)) < 1.0


def moves(board: str) -> Iterator[tuple[str, str]]:
    """Each legal move of a rush hour board of 6 x 6, by the rules in its question, and the board after it."""
    for car in sorted(set(board) - set("ox")):
        cells = [i for i, label in enumerate(board) if label == car]
        step = cells[1] - cells[0]
        for sign, ahead in (("+", cells[-1] + step), ("-", cells[0] - step)):
            inside = 0 <= ahead < 36 and (step == 6 or ahead // 6 == cells[0] // 6)
            if inside and board[ahead] == "o":
                moved = list(board)
                moved[cells[0] if sign == "+" else cells[-1]] = "o"
                moved[ahead] = car
                yield f"{car}{sign}1", "".join(moved)


def test_rush_hour_takes_a_solution_found_by_search() -> None:
    """Breadth first from the board of the entry with the fewest pieces."""
    dataset = factory.create_dataset("rush_hour", size=4, seed=7, max_moves=8)
    entry = min((dataset[i] for i in range(4)), key=lambda e: len(set(e["metadata"]["board_config"])))
    start = entry["metadata"]["board_config"]
    came: dict[str, tuple[str, str]] = {start: ("", "")}
    frontier = [start]
    solved = next((board for board in frontier if board[17] == "A"), None)
    while frontier and solved is None:
        following = []
        for board in frontier:
            for move, after in moves(board):
                if after not in came:
                    came[after] = (board, move)
                    following.append(after)
        frontier, solved = following, next((board for board in following if board[17] == "A"), None)
    assert solved is not None
    path: list[str] = []
    while solved != start:
        solved, move = came[solved]
        path.insert(0, move)
    assert scores("rush_hour", [" ".join(path)], [entry]) == [1.0]
    assert scores("rush_hour", [" ".join(path[:-1])], [entry])[0] < 1.0


def test_boxnet_takes_a_plan_that_walks_each_box_home() -> None:
    item = entries("boxnet")[0]
    state = {place: list(things) for place, things in item["metadata"]["initial_state"].items()}
    goals = {thing[7:]: place for place, things in state.items() for thing in things if thing.startswith("target_")}
    plan: list[dict[str, str]] = []
    for place, things in state.items():
        for box in [thing for thing in things if thing.startswith("box_")]:
            here, goal = ([float(number) for number in at.split("_")] for at in (place, goals[box[4:]]))
            while here != goal:
                axis = 0 if here[0] != goal[0] else 1
                there = list(here)
                there[axis] += 1 if goal[axis] > here[axis] else -1
                plan.append({f"Agent{here}": f"move({box}, square{there})"})
                here = there
            plan.append({f"Agent{here}": f"move({box}, target_{box[4:]})"})
    assert scores("boxnet", [json.dumps(plan)], [item]) == [1.0]
    assert scores("boxnet", [json.dumps(plan[:-1])], [item])[0] < 1.0
    assert scores("boxnet", ["certainly not"], [item]) == [0.0]


# ---- what the reward adds --------------------------------------------------------------------------------------------


def test_partial_scores_are_the_librarys_unless_exact() -> None:
    item = factory.create_dataset("chain_sum", size=1, seed=1)[0]
    text = f"It is {item['answer']}"
    part = len(item["answer"]) / len(text)
    assert scores("chain_sum", [text], [item]) == [pytest.approx(part)]
    assert scores("chain_sum", [text], [item], exact=True) == [0.0]


def test_rows_of_different_datasets_and_other_columns() -> None:
    items = [entries("gcd")[0], entries("lcm")[0]]
    columns: dict[str, Any] = {"entry": [entry_text(i) for i in items], "dataset": ["gcd", "lcm"], "source": ["a", "b"]}
    assert reasoning_gym(["p"] * 2, [i["answer"] for i in items], **columns) == [1.0, 1.0]


def test_settings_reach_the_scorer() -> None:
    """Decimals count as equal up to one unit in the last of the places that are set."""
    item = {"question": "q", "answer": "1.25", "metadata": {}}
    few, many = (json.dumps({"min_num_decimal_places": 1, "max_num_decimal_places": places}) for places in (1, 8))
    assert scores("decimal_arithmetic", ["1.3"], [item], config=[few]) == [1.0]
    assert scores("decimal_arithmetic", ["1.3"], [item], config=[many])[0] < 1.0


@for_each("name", ["prime_factorization", "chain_sum", "time_intervals", "game_of_life"])
@for_each("answer", ["x" * (LONGEST_TEXT + 1), "[" * 5000, "\x00", "9" * 6000, "{}", "null", "1e999"])
def test_odd_answers_are_wrong_and_raise_nothing(name: str, answer: str) -> None:
    assert max(scores(name, [answer] * 3, entries(name))) < 1.0


def test_an_entry_that_its_scorer_cannot_score_is_refused() -> None:
    broken = {"question": "q", "answer": "two", "metadata": {}}
    with pytest.raises(DataError, match=r"prime_factorization raised ValueError.* cannot score the entry"):
        scores("prime_factorization", ["three"], [broken])


@for_each("entry", ["", "no json", "[]", "{}", '{"question": "q", "answer": "a"}'])
def test_what_is_no_entry_is_refused(entry: str) -> None:
    with pytest.raises(DataError, match="column entry holds"):
        reasoning_gym(["p"], ["a"], entry=[entry], dataset=["gcd"])


def test_unknown_datasets_and_settings_are_named() -> None:
    item = entries("gcd")[0]
    with pytest.raises(DataError, match=r"no dataset 'gdc'; did you mean gcd\?"):
        scores("gdc", ["1"], [item])
    with pytest.raises(ConfigError, match=r"cannot build gcd with .*nonsense.*repair column config"):
        scores("gcd", ["1"], [item], config=['{"nonsense": 1}'])


def test_without_reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf_toolkit\[tasks\]'"):
        scores("gcd", ["1"], [entries("gcd")[0]])


# ---- entries as text -------------------------------------------------------------------------------------------------


def test_text_keeps_tuples_and_keys() -> None:
    metadata = {"grid": ((1, 2), [3, (4,)]), "colours": {1: "red", (2, 3): "blue"}, "empty": ((), {}), "name": "a"}
    entry = {"question": "q é", "answer": None, "metadata": metadata}
    back = entry_of(entry_text(entry))
    assert back == entry
    assert isinstance(back["metadata"]["grid"], tuple) and isinstance(back["metadata"]["grid"][1], list)
    assert entry_of(entry) == entry
    with pytest.raises(TypeError):
        entry_text({"question": "q", "answer": "a", "metadata": {"set": {1}}})


@for_each("name", NAMES)
def test_every_entry_survives_as_text(name: str) -> None:
    for item in entries(name):
        assert typed(entry_of(entry_text(item))) == typed(item)


def typed(value: Any) -> Any:
    """`value` in which a tuple differs from a list, and a number from a text."""
    if isinstance(value, Mapping):
        return {typed(key): typed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(typed, value))
    return ("text", str(value)) if isinstance(value, str) else value


# ---- answers that would run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LITERAL_SCORERS))
def test_the_answer_cannot_be_read_from_the_entry(name: str) -> None:
    """`entry` is a name where the scorer calls eval."""
    for attack in ("entry['answer'].split()", "entry['answer']", "oracle_answer", "[*entry['answer']]"):
        assert scores(name, [attack] * 3, entries(name)) == [0.0] * 3


def test_lists_still_get_what_the_library_gives_for_them() -> None:
    item = entries("spiral_matrix")[0]
    assert scores("spiral_matrix", [str(item["answer"].split())], [item]) == [0.1]


@for_each("name", sorted(SYMPY_SCORERS))
def test_sympy_scorers_take_their_own_answers(name: str) -> None:
    answers = [item["answer"] for item in entries(name, 40)]
    refused = [answer for answer in answers if not is_arithmetic(answer)]
    assert all("Integral(" in answer for answer in refused) and len(refused) < 20
    items = entries(name)
    spaced = [item["answer"].replace("*", " * ").replace(" *  * ", "**") for item in items]
    if not refused:
        assert scores(name, spaced, items) == [1.0] * len(items)


def test_an_integral_that_is_only_written_down_is_no_answer() -> None:
    item = entries("simple_integration")[0]
    metadata = item["metadata"]
    assert scores("simple_integration", [f"Integral({metadata['integrand']}, {metadata['variable']})"], [item]) == [0.0]


@for_each(
    "text",
    ["x**2 + 3*x", "-34*x**8/15 - 5*x/4 + C", "(2*x - 8)**(3/2)", "2*exp(x) - sin(x)**2", "x**-1", "((x**2)**3)**4"],
)
def test_what_counts_as_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@for_each(
    "text",
    [
        *("9**9**9", "(9**999)**999", "((x**99)**99)**99", "x**1001", "x**(10*10*11)", "9**(9**9)", "x**1e9"),
        *(
            "x.y",
            "f(x)",
            "open('a')",
            "'a'",
            "[1]",
            "x if y else z",
            "x = 1",
            "x; y",
            "lambda: 1",
            "x!",
            "x^2",
            "__x",
            "True",
        ),
        *("", "1 2", "exp(x, evaluate=False)", "(" * 300 + "x" + ")" * 300, "1" * 5000, "\x00"),
    ],
)
def test_what_does_not_count_as_arithmetic(text: str) -> None:
    assert not is_arithmetic(text)


@for_each("dataset", [["number_sorting"], None, "composite", "number_sorting "])
def test_a_dataset_that_is_none_is_refused(dataset: Any) -> None:
    """``composite`` would hand the entry to another scorer, by a name in it, for which nothing has been looked at."""
    entry = {"question": "q", "answer": "x", "metadata": {"source_dataset": "number_sorting"}}
    with pytest.raises(DataError, match="dataset"):
        reasoning_gym(["p"], ["[1]"], entry=[json.dumps(entry)], dataset=[dataset])
