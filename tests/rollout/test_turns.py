"""Responses of several turns: what the environment says is read by the policy and trained on by nobody."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_toolkit.data.response_texts import response_texts
from rlhf_toolkit.errors import ConfigError, RewardError
from rlhf_toolkit.rollout.turns import Conversation, Environment, decode_with_turns
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.support.builders import tiny_tokenizer
from tests.support.chat_tokenizers import word_tokenizer
from tests.support.launch import run_recipe
from tests.support.tiny import WORDS, merged, tiny_llama, write_experiment, write_task
from tests.support.values import named, there

STOP, PAD = 1, 1
ENVIRONMENT = '''

def tool(prompts, responses, *, turn, **columns):
    """Answers every response that stops, until the last turn; a long answer now and then."""
    return [" ".join(["w27"] * (1 + len(prompt) % 3)) for prompt in prompts]


def none(prompts, responses, *, turn, **columns):
    return [None] * len(prompts)


def broken(prompts, responses, *, turn, **columns):
    import os
    if os.environ.get("RANK", "0") == "1" or os.environ.get("WORLD_SIZE", "1") == "1":
        raise ValueError("no such tool")
    return [None] * len(prompts)
'''


class Script:
    """A policy that writes what the script of its row says, turn by turn; -1 in a script is the budget's end."""

    def __init__(self, scripts: dict[int, list[list[int]]]) -> None:
        self.scripts, self.seen = scripts, list[tuple[int, tuple[int, ...], int]]()

    def __call__(self, batch: PromptBatch, budgets: list[int], turn: int) -> Rollout:
        rows = []
        for prompt, budget in zip(batch.prompts, budgets, strict=True):
            self.seen.append((turn, prompt.token_ids, budget))
            rows.append(self.scripts[prompt.index][turn][:budget])
        width = max((len(row) for row in rows), default=1)
        return Rollout(
            responses=torch.tensor([row + [PAD] * (width - len(row)) for row in rows]).reshape(len(rows), width),
            lengths=torch.tensor([len(row) for row in rows], dtype=torch.long),
            rollout_logprobs=-torch.ones(len(rows), width),
            drawn_logprobs=-2 * torch.ones(len(rows), width),
            finished=torch.tensor([bool(row) and row[-1] == STOP for row in rows], dtype=torch.bool),
        )


def decoded(
    script: Script, answers: Any, *, budget: int = 10, max_turns: int = 3, left_out: frozenset[int] | None = None
) -> Rollout:
    prompts = tuple(Prompt(i, f"w{i}", (40 + i,), {"n": i}) for i in script.scripts)
    batch = PromptBatch(prompts, (0,) * len(prompts))
    environment = Environment(answers, max_turns, "rollout.environment=x.py:f")
    tokenizer = tiny_tokenizer(words=WORDS, pad="</s>", chat_template=None)
    texts_of = partial(response_texts, tokenizer=tokenizer, left_out=left_out)
    return decode_with_turns(script, tokenizer, batch, environment, texts_of=texts_of, budget=budget, pad_id=PAD)


def test_a_rank_without_rows_has_an_empty_rollout_of_the_same_kind() -> None:
    nobody, somebody = decoded(Script({}), None), decoded(Script({0: [[5]]}), lambda prompts, responses, turn, n: [])
    for name in ("responses", "lengths", "rollout_logprobs", "finished", "written", "drawn_logprobs"):
        none, one = getattr(nobody, name), getattr(somebody, name)
        assert (none.dtype, none.shape) == (one.dtype, (0, *one.shape[1:]))


def test_turns_alternate_until_the_environment_is_content() -> None:
    w = tiny_tokenizer(words=WORDS, pad="</s>", chat_template=None).get_vocab()
    script = Script({0: [[w["w1"], STOP], [w["w2"], STOP]], 1: [[w["w3"], STOP]], 2: [[w["w4"]] * 10]})

    def answer(prompts: list[str], responses: list[str], *, turn: int, n: list[int]) -> Sequence[str | None]:
        assert turn == 0 or n == [0]
        return ["w5 w6" if number == 0 and turn == 0 else None for number in n]

    found = decoded(script, answer)
    first = [w["w1"], STOP, w["w5"], w["w6"], w["w2"], STOP]
    assert found.responses.tolist() == [first + [PAD] * 4, [w["w3"], STOP] + [PAD] * 8, [w["w4"]] * 10]
    assert found.lengths.tolist() == [6, 2, 10] and found.finished.tolist() == [True, True, False]
    assert found.written is not None
    assert found.written[0].tolist() == [True, True, False, False, True, True] + [False] * 4
    assert found.rollout_logprobs[0].tolist() == [-1, -1, 0, 0, -1, -1, 0, 0, 0, 0]
    assert found.drawn_logprobs is not None
    assert found.drawn_logprobs[0].tolist() == [-2, -2, 0, 0, -2, -2, 0, 0, 0, 0]
    assert script.seen[-1] == (1, (40, *first[:4]), 6), "the second turn reads all of it and has the rest of the budget"


def test_an_answer_that_leaves_no_room_counts_as_cut_off() -> None:
    script = Script({0: [[5, 6, STOP]]})
    found = decoded(script, lambda prompts, responses, turn, n: ["w1 w2"], budget=5)
    assert found.lengths.tolist() == [3] and found.finished.tolist() == [False]
    assert found.written is not None and found.written.all()


def test_the_last_turn_is_not_answered() -> None:
    asked: list[int] = []

    def answer(prompts: list[str], responses: list[str], turn: int, n: list[int]) -> list[str]:
        asked.append(turn)
        return ["w1"]

    found = decoded(Script({0: [[5, STOP]] * 3}), answer, budget=100)
    assert asked == [0, 1] and found.finished.tolist() == [True] and found.lengths.tolist() == [8]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda *a, **k: 1 / 0, "rollout.environment=x.py:f raised ZeroDivisionError: division by zero; repair"),
        (
            lambda *a, **k: [],
            r"rollout.environment=x.py:f returned \[\] for 1 responses; return a text or None for each",
        ),
        (lambda *a, **k: [3], r"rollout.environment=x.py:f returned \[3\] for 1 responses"),
    ],
)
def test_what_an_environment_may_not_do(answers: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        decoded(Script({0: [[5, STOP]]}), answers)


def test_messages_answer_in_the_models_own_template_and_turns_have_budgets() -> None:
    tokenizer = word_tokenizer(words=(*WORDS, "<tool>"), pad="</s>")
    stop, w = tokenizer.eos_token_id, tokenizer.get_vocab()
    script = Script({0: [[w["w1"], stop], [w["w2"], stop]], 1: [[w["w3"], stop], [w["w4"]] * 9], 2: [[w["w5"]] * 9]})
    messages = ({"role": "user", "content": "w0"},)
    prompts = tuple(Prompt(i, "", (40 + i,), {"n": i}, messages) for i in script.scripts)
    seen: list[Any] = []

    def answer(prompts: list[str], responses: list[str], turns: list[Any], n: list[int], **more: Any) -> list[Any]:
        seen.append(turns)
        said = {0: {"role": "tool", "content": "w7"}, 1: [{"role": "user", "content": "w8"}] * 2}
        return [said[number] if len(each) == 1 else None for number, each in zip(n, turns, strict=True)]

    found = decode_with_turns(
        script,
        tokenizer,
        PromptBatch(prompts, (0,) * 3),
        Environment(answer, 3, most_tokens=4),
        texts_of=partial(response_texts, tokenizer=tokenizer),
        budget=20,
        pad_id=PAD,
        stop_ids={stop},
    )
    first = ["w1", "</s>", "<tool>", "w7", "<assistant>", "w2", "</s>"]
    assert tokenizer.convert_ids_to_tokens(found.responses[0, :7].tolist()) == first
    second = ["w3", "</s>", "<user>", "w8", "<user>", "w8", "<assistant>", *["w4"] * 4]
    assert tokenizer.convert_ids_to_tokens(found.responses[1, :11].tolist()) == second
    assert found.written is not None
    assert found.written[0, :7].tolist() == [True, True, False, False, False, True, True]
    assert found.lengths.tolist() == [7, 11, 4] and found.finished.tolist() == [True, False, False]
    assert [budget for *_, budget in script.seen] == [4, 4, 4, 4, 4]
    ours = {"role": "assistant", "content": "w1"}
    assert seen[0] == [[ours], [{"role": "assistant", "content": "w3"}]]
    assert found.turns is not None
    assert found.turns[0] == (ours, {"role": "tool", "content": "w7"}, {"role": "assistant", "content": "w2"})
    assert [len(row) for row in found.turns] == [3, 4, 1]


def test_what_messages_may_not_answer() -> None:
    def tool(prompts: Any, responses: Any, **more: Any) -> list[Any]:
        return [{"role": "tool", "content": "w1"}] * len(prompts)

    with pytest.raises(RewardError, match=r"answers row 0 with messages, but its prompt is a plain text; set data"):
        decoded(Script({0: [[5, STOP]]}), tool)
    with pytest.raises(RewardError, match=r"or messages of role user or tool"):
        decoded(Script({0: [[5, STOP]]}), lambda *a, **k: [{"role": "assistant", "content": "w1"}])

    def asks(prompts: Any, responses: Any, turns: Any, **more: Any) -> list[Any]:
        return [None]

    with pytest.raises(ConfigError, match="the dataset has a column turns; rename one of the two"):
        Environment(asks, 2).require_columns(["turns"])


def test_a_prefilled_turn_is_one_turn_of_the_conversation() -> None:
    prompt = Prompt(0, "", (40,), {}, ({"role": "user", "content": "w0"}, {"role": "assistant", "content": "So "}))
    turns = [{"role": "assistant", "content": "it is."}, {"role": "tool", "content": "1"}, {"role": "assistant"}]
    row = Conversation(prompt, turns=turns)
    assert [message["content"] for message in row.messages] == ["w0", "So it is.", "1"]


# ---- in a run --------------------------------------------------------------------------------------------------------

CHANGES = {
    "rollout.max_new_tokens": 24,
    "rollout.max_turns": 3,
    "rollout.responses_per_prompt": 2,
    "update.micro_batch_tokens": 96,
    "ppo.mini_batches": 2,
}


def task(folder: Path, environment: str, **changes: Any) -> dict[str, Any]:
    sections = write_task(folder, model=tiny_llama(initializer_range=0.3))
    with (folder / "reward.py").open("a") as file:
        file.write(ENVIRONMENT)
    return merged(sections, {**CHANGES, "rollout.environment": f"{folder}/reward.py:{environment}", **changes})


def test_the_policy_reads_the_answers_and_no_loss_sees_them(tmp_path: Path) -> None:
    """Sampling's log-probs equal the training path's where the policy wrote: so it has read the same prefixes. And a
    change of an answer's log-prob changes nothing."""
    run = prepare(experiment_from_dict(task(tmp_path, "tool")))
    run.progress.close()
    experience = run.trainer.maker.collect(run.trainer.model, 0).experience
    written, width = experience.token_mask, experience.token_mask.shape[1]
    real = torch.arange(width) < experience.response_lengths[:, None]
    answers = real & ~written
    assert answers.sum() > 10 and (answers.any(1) & written.any(1)).sum() > 4
    tokenizer: Any = run.trainer.processing_class
    word = tokenizer.get_vocab()["w27"]
    placed = [experience.sequences[b, experience.prompt_lengths[b] + t].item() for b, t in answers.nonzero().tolist()]
    assert set(placed) == {word}
    gap = (experience.rollout_logprobs - there(experience.old_logprobs))[written].abs()
    assert gap.max() < 1e-4
    assert not (experience.response_mask & answers).any()
    assert not there(experience.advantages)[answers].any() and not there(experience.returns)[answers].any()


def test_an_environment_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        sections = task(tmp_path / name, "none")
        if name == "without":
            del sections["rollout"]["environment"], sections["rollout"]["max_turns"]
        prepare(experiment_from_dict(sections)).train()
        found.append(load_file(tmp_path / name / "run/policy/adapter_model.safetensors"))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_two_ranks_in_window_and_stream_train_as_one_process_does(tmp_path: Path) -> None:
    """With rules that look at what is written, in turns too, and weights by what tokens were drawn from."""
    runs = {"alone": (1, None, "auto"), "window": (2, 3, "window"), "stream": (2, 3, "stream")}
    drawn = {
        "rollout.repetition_penalty": 1.3,
        "rollout.min_p": 0.02,
        "rollout.bad_words": ["w5 w6", "w8"],
        "rollout.logit_bias": {"1": 1.5},
        "ppo.importance_correction": "token",
    }
    found = {}
    for name, (processes, stage, mode) in runs.items():
        (tmp_path / name).mkdir()
        path = write_experiment(
            tmp_path / name / "run.yaml", task(tmp_path / name, "tool", **drawn, **{"rollout.mode": mode})
        )
        run_recipe(path, processes=processes, stage=stage).succeeded()
        files = sorted((tmp_path / name / "run").glob("*/*.safetensors"))
        found[name] = {f"{f.parent.name}/{key}": t for f in files for key, t in load_file(f).items()}
    for name in ("window", "stream"):
        for key, tensor in found["alone"].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-5, atol=1e-5, msg=named(key))


@pytest.mark.parametrize("mode", ["window", "stream"])
def test_a_tool_that_fails_on_one_rank_ends_all(tmp_path: Path, mode: str) -> None:
    path = write_experiment(tmp_path / "run.yaml", task(tmp_path, "broken", **{"rollout.mode": mode}))
    finished = run_recipe(path, processes=2, stage=3)
    assert finished.status == 1
    phase = "sampling" if mode == "window" else "the environment"
    assert f"RewardError: rank 1 failed in {phase}: rollout.environment=" in finished.output
    assert "raised ValueError: no such tool; repair the function" in finished.output
