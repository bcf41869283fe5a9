"""Several rewards as one: the weighted sum by hand, rewards for tokens, early submission, what is refused."""

from __future__ import annotations

import math
import os
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError, RewardError
from rlhf_toolkit.rewards.compose import WARNINGS, Rewards
from rlhf_toolkit.rewards.scores import Scores
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt
from tests.support.rewards import MISBEHAVING, batch_of, prompts_for, rewards_of, tokens_for

RESPONSES = ["a", "bb", "ccc", "dddd", "eeeee"]


def of(name: str, /, **keys: Any) -> dict[str, Any]:
    return {"function": f"{MISBEHAVING}:{name}", **keys}


def scored(*entries: dict[str, Any], responses: list[str] = RESPONSES, **columns: Any) -> Scores:
    with rewards_of(*entries) as rewards:
        return rewards.collect(*batch_of(responses, **columns))


# ---- the sum ---------------------------------------------------------------------------------------------------------


def test_one_reward() -> None:
    assert scored(of("quick")) == Scores(
        [1.0, 2.0, 3.0, 4.0, 5.0], {"quick": [1.0, 2.0, 3.0, 4.0, 5.0]}, [True] * 5, None, {"quick": 0}
    )


@pytest.mark.parametrize("workers", [{}, {"workers": 2}, {"workers": 1, "batch_size": 2}], ids=str)
def test_weights_by_hand(workers: dict[str, int]) -> None:
    entries = (
        of("quick", weight=0.5, **workers),
        of("doubled", weight=-3, kwargs={"factor": 10}, **workers),
        of("doubled", name="logged", weight=0),
    )
    scores = scored(*entries, responses=["a", "bbb", "cc"])
    assert scores.parts == {"quick": [1, 3, 2], "doubled": [10, 30, 20], "logged": [2, 6, 4]}
    assert scores.totals == [0.5 - 30, 1.5 - 90, 1 - 60]
    assert scores.token_rewards is None and scores.failures == {"quick": 0, "doubled": 0, "logged": 0}


@pytest.mark.parametrize("workers", [{}, {"workers": 1}], ids=str)
def test_rewards_for_tokens_and_numbers_on_the_last_token(workers: dict[str, int]) -> None:
    entries = of("from_tokens", weight=0.5, **workers), of("now_and_then", weight=2), of("quick", weight=-1)
    scores = scored(*entries, responses=["ab", "abc"])
    a, b, c = map(ord, "abc")
    assert scores.parts == {"from_tokens": [a + b, a + b + c], "now_and_then": [5, 3], "quick": [2, 3]}
    assert scores.token_rewards == [[a / 2, b / 2 + 10 - 2], [a / 2 + 2, b / 2 + 2, c / 2 + 2 - 3]]
    assert scores.totals == [sum(row) for row in scores.token_rewards]


def test_dropped_rows_have_no_reward_on_any_token() -> None:
    scores = scored(of("from_tokens"), of("act", workers=1, on_failure="drop"), responses=["ab", "raise", "cd"])
    assert scores.kept == [True, False, True]
    assert scores.token_rewards == [[97, 98 + 2], [0] * 5, [99, 100 + 2]]
    assert scores.totals == [97 + 98 + 2, 0, 99 + 100 + 2]
    assert math.isnan(scores.parts["act"][1]) and scores.parts["from_tokens"][1] == sum(map(ord, "raise"))


def test_a_row_is_dropped_whichever_reward_drops_it() -> None:
    first, second = of("act", name="a", workers=1, on_failure="drop"), of("quick", name="b")
    for entries in ((first, second), (second, first)):
        assert scored(*entries, responses=["x", "nan"]).kept == [True, False]


def test_a_failure_that_is_scored_brings_back_no_dropped_row() -> None:
    first, second = of("act", name="a", on_failure="drop"), of("act", name="b", on_failure="score")
    for entries in ((first, second), (second, first)):
        assert scored(*entries, responses=["x", "nan"]).kept == [False, False]


def test_numbers_that_do_not_fit_the_tokens_are_a_failure_of_that_response_only() -> None:
    with pytest.raises(RewardError, match="reward too_many_tokens gave 2 numbers for a response of 1 tokens"):
        scored(of("too_many_tokens"))
    scores = scored(of("too_many_tokens", on_failure="score", failure_score=7))
    assert scores.totals == [7.0] * 5 and scores.token_rewards is None and scores.failures == {"too_many_tokens": 1}


def test_a_sum_beyond_float32() -> None:
    with pytest.raises(RewardError) as caught:
        scored(of("huge", weight=1), of("huge", name="again"))
    assert str(caught.value) == (
        r"the weighted sum of all rewards is 6e+38 for 'prompt\n0' (row 100 of the dataset), which float32 cannot "
        "hold; lower the weights"
    )


def test_nothing_to_score() -> None:
    assert scored(of("quick"), of("act", workers=1), responses=[]) == Scores(
        [], {"quick": [], "act": []}, [], None, {"quick": 0, "act": 0}
    )


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [({}, [5] * 5), ({"workers": 1}, [1] * 5), ({"workers": 2, "batch_size": 2}, [2, 2, 2, 2, 1])],
    ids=str,
)
def test_how_many_responses_a_call_gets(keys: dict[str, int], sizes: list[int]) -> None:
    assert scored(of("calls_at_once", **keys), folder="x").totals == sizes


def test_in_process_means_in_this_process_and_workers_are_others() -> None:
    scores = scored(of("pid"), of("pid", name="elsewhere", workers=1))
    assert set(scores.parts["pid"]) == {os.getpid()}
    assert len(set(scores.parts["elsewhere"])) == 1 and os.getpid() not in scores.parts["elsewhere"]


def test_early_in_any_order_equals_late() -> None:
    entries = (
        of("from_tokens", workers=2, batch_size=3, weight=0.1),
        of("act", workers=2, on_failure="score", failure_score=-1),
        of("quick"),
    )
    responses = [f"response {i}" * (i % 3) + "!" for i in range(17)]
    responses[5] = "raise"
    prompts, responses, tokens = batch_of(responses, label=3)
    with rewards_of(*entries) as rewards:
        late = rewards.collect(prompts, responses, tokens)
        order = list(range(len(responses)))
        for seed, count in ((1, len(order)), (2, len(order)), (3, 6)):
            random.Random(seed).shuffle(order)
            for i in order[:count]:
                rewards.submit(i, prompts[i], responses[i], tokens[i])
            assert str(rewards.collect(prompts, responses, tokens)) == str(late)  # NaN equals itself as text


def test_workers_start_on_what_is_submitted(tmp_path: Path) -> None:
    """The mark of each response is there before the batch is collected; without early calls this would never end."""
    with rewards_of(
        of("waits_for_the_others", workers=1, batch_size=1, kwargs={"others": 0}),
        of("calls_at_once"),
    ) as rewards:
        prompts, responses, tokens = batch_of(["x", "y", "last"], folder=str(tmp_path))
        for i in (1, 0):
            rewards.submit(i, prompts[i], responses[i], tokens[i])
        while sorted(path.name for path in tmp_path.iterdir()) != ["x", "y"]:
            pass
        assert rewards.collect(prompts, responses, tokens).parts == {
            "waits_for_the_others": [1, 1, 4],
            "calls_at_once": [3, 3, 3],
        }


def test_what_was_submitted_has_to_be_what_is_collected() -> None:
    prompts, responses, tokens = batch_of(["a", "b"])
    other = prompts_for(3)
    cases: list[tuple[int, Prompt, str, list[int], str]] = [
        (0, prompts[0], "A", tokens[0], "response 0 was submitted as 'A', but collected is 'a'"),
        (0, other[1], "a", tokens[0], "response 0 was submitted as 'a', but collected is 'a'"),
        (0, prompts[0], "a", [1, 2], "response 0 was submitted as 'a', but collected is 'a'"),
        (2, other[2], "c", [1], "response 2 was submitted as 'c', but collected is only 2 responses"),
        (-1, prompts[1], "b", tokens[1], "response -1 was submitted as 'b', but collected is only 2 responses"),
    ]
    for entries in ([of("quick")], [of("quick", workers=1)]):
        with rewards_of(*entries) as rewards:
            for *row, message in cases:
                rewards.submit(*row)  # type: ignore[arg-type]
                with pytest.raises(RuntimeError) as caught:
                    rewards.collect(prompts, responses, tokens)
                assert str(caught.value) == message
                assert rewards.collect(prompts, responses, tokens).totals == [1, 1]  # the next batch starts afresh
            rewards.submit(0, prompts[0], "a", tokens[0])
            with pytest.raises(RuntimeError, match="response 0 was submitted twice for one batch"):
                rewards.submit(0, prompts[0], "a", tokens[0])


def test_lists_of_different_lengths() -> None:
    with rewards_of(of("quick")) as rewards, pytest.raises(ValueError, match="shorter"):
        rewards.collect(prompts_for(2), ["a", "b"], tokens_for(["a"]))


def test_the_batch_after_a_failure_is_scored_as_if_nothing_had_been() -> None:
    with rewards_of(of("act", workers=2), of("quick")) as rewards:
        with pytest.raises(RewardError, match="raised LookupError"):
            rewards.collect(*batch_of(["raise", *RESPONSES]))
        assert rewards.collect(*batch_of(RESPONSES)).totals == [2, 4, 6, 8, 10]


def test_nothing_is_called_after_close() -> None:
    with rewards_of(of("quick", workers=1)) as rewards:
        rewards.close()
        with pytest.raises(RuntimeError, match="after it was closed"):
            rewards.collect(*batch_of(["a"]))


# ---- async -----------------------------------------------------------------------------------------------------------


def test_an_async_function_with_a_limit() -> None:
    entry = of("gently", timeout=0.2, on_failure="score", failure_score=-2)
    assert scored({**entry, "timeout": 60}).totals == [1, 2, 3, 4, 5]
    assert scored(entry, responses=["a", "sleep"]).totals == [-2, -2]  # one call, which never came to its end
    with pytest.raises(RewardError, match=r"reward gently took longer than its 0\.2 s; make it faster, or raise its"):
        scored({**of("gently"), "timeout": 0.2}, responses=["a", "sleep"])
    with pytest.raises(RewardError, match="reward gently raised TimeoutError: not the limit"):
        scored({**of("gently"), "timeout": 60}, responses=["a", "timeout"])


def test_an_async_function_in_workers() -> None:
    entry = of("gently", workers=1, timeout=1, on_failure="drop")
    scores = scored(entry, responses=["a", "sleep", "bb"])
    assert (scores.totals, scores.kept) == ([1, 0, 2], [True, False, True])


def test_a_limit_that_nothing_could_keep() -> None:
    with pytest.raises(ConfigError) as caught:
        scored(of("quick", timeout=5))
    assert str(caught.value) == (
        f"reward.functions[0].timeout=5 cannot be kept: nothing interrupts {MISBEHAVING}:quick in the rank's own "
        "process; set reward.functions[0].workers: 1 or more, or write it as async def"
    )


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_have_to_differ() -> None:
    with pytest.raises(ConfigError) as caught:
        scored(of("quick"), of("act", name="quick"))
    assert str(caught.value) == (
        "reward.functions[0] and reward.functions[1] are both called quick; give one of them another name"
    )


def test_no_reward_at_all() -> None:
    with pytest.raises(ConfigError, match=r"reward\.functions is empty"):
        Rewards([])


@pytest.mark.parametrize("keys", [{}, {"workers": 1}], ids=str)
def test_a_kwarg_or_the_tokens_with_the_name_of_a_column(keys: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        scored(of("doubled", kwargs={"factor": 2}, **keys), factor=1)
    assert str(caught.value) == (
        "reward.functions[0].kwargs.factor is also a column of the dataset; rename one of the two"
    )
    with pytest.raises(
        ConfigError, match=r"reward\.functions\[0\]\.function: the parameter tokens gets the response's token ids"
    ):
        scored(of("from_tokens", **keys), tokens=1)
    assert scored(of("quick", **keys), tokens=1).totals == [1, 2, 3, 4, 5]  # the column, for who does not ask for ids


@pytest.mark.parametrize("keys", [{}, {"workers": 2}], ids=str)
def test_a_function_that_cannot_be_loaded(keys: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    cases = [
        ("def scores(p, r): pass", f"='{path}:score': score is not defined there; did you mean scores?"),
        ("1 / 0", f"='{path}:score': importing {path} raised ZeroDivisionError: division by zero at reward.py:1"),
        ("score = 5", f"='{path}:score': score is 5 (int), which cannot be called; name a function"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            scored({"function": f"{path}:score", **keys})
        assert str(caught.value).startswith(f"reward.functions[0].function{message}")


def test_a_long_prompt_is_cut_in_the_message() -> None:
    with rewards_of(of("act")) as rewards, pytest.raises(RewardError) as caught:
        rewards.collect([Prompt(7, "long\n" * 1000, (1,), {})], ["raise"], [[1]])
    message = str(caught.value)
    assert r"its prompt was 'long\nlong\n" in message and message.endswith("... (row 7 of the dataset)")
    assert len(message) < 400 and "\n" not in message


# ---- lines about failures --------------------------------------------------------------------------------------------


def test_a_line_for_each_batch_with_failures_up_to_a_few() -> None:
    lines: list[str] = []
    batch = batch_of(["a", "raise", "nan", "b"])
    with rewards_of(of("act", workers=1, on_failure="drop"), of("quick"), warn=lines.append) as rewards:
        rewards.collect(*batch_of(["a"]))
        assert lines == []
        for count in range(WARNINGS + 3):
            assert rewards.collect(*batch).failures == {"act": 2, "quick": 0}
            assert len(lines) == min(count + 1, WARNINGS)
    first = (
        "the first: reward act raised LookupError: nobody knows; repair the function (see its traceback); its prompt "
        r"was 'prompt\n1' (row 101 of the dataset)"
    )
    assert lines[0] == f"reward act: 2 of 4 calls failed and were dropped; {first}"
    assert lines[WARNINGS - 1] == (
        f"reward act: 2 of 4 calls failed and were dropped; the last line about this reward; {first}"
    )
    assert lines[WARNINGS:] == ["reward act: 6 more failed calls had no line of their own"]


def test_lines_go_to_stderr_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    spec = RewardSpec.parse(of("act", on_failure="score", failure_score=-0.5))
    with closing(Rewards([spec])) as rewards:
        rewards.collect(*batch_of(["none", "b"]))
    assert capfd.readouterr().err.startswith("reward act: 1 of 1 calls failed and were scored as -0.5; the first: ")


# ---- names of columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("function", "column"), [("gsm8k", "flexible"), ("countdown", "format_score"), ("math", "time_limit")]
)
def test_a_column_never_sets_an_option(function: str, column: str, workers: int) -> None:
    entry = {"function": f"rlhf_toolkit.rewards.verifiable:{function}", "workers": workers}
    given = {"answer": "3", "numbers": [3], "target": 3, column: 1}
    said = rf"the dataset has a column '{column}', and {function} an option of that name"
    with rewards_of(entry) as rewards, pytest.raises(ConfigError, match=said):
        rewards.collect(*batch_of(["a"], **given))
